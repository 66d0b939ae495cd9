"""What the documentation tells people to type: flags and keys exist, files parse."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ml_collections import ConfigDict

from realgen_configs import (
    flux_grpo,
    flux_objectives,
    rewriter_grpo,
    sd3_grpo,
    serve_rewards,
    small_cards,
    zimage_grpo,
)
from tests.helpers.goldens import ROOT

JOBS = [ROOT / "examples" / "jobset.yaml", ROOT / "examples" / "slurm.sh"]
TEXTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "examples" / "README.md",
    *JOBS,
]


def has_key(config: ConfigDict, key: str) -> bool:
    """Whether a config has a key such as "train.learning_rate"."""
    value = config
    for name in key.split("."):
        if name not in value:
            return False
        value = value[name]
    return True


def keys_in(text: str) -> set[str]:
    """The config's keys that a text sets (--config.KEY) or names (`config.KEY`)."""
    return set(re.findall(r"(?:--config|`config)\.([a-z_][a-z0-9_.]*[a-z0-9_])", text)) - {"json"}


def presets_in(text: str) -> set[str]:
    """The presets that follow a colon (flux_grpo.py:PRESET) or begin a row of a table."""
    names = r"(?:(?:flux|sd3|zimage|rewriter)_grpo|small_cards)(?:\.py)?:([a-z0-9_]+)"
    named = re.findall(names, text)
    in_tables = re.findall(r"^\| `(\w+_\d+x\w+)`", text, re.MULTILINE)
    return {*named, *in_tables}


def test_keys_and_presets_are_found():
    text = "--config flux_grpo.py:a1 --config.train.beta=1, `config.seed`, `config.json`\n"
    text += "sd3_grpo:b2\n| `flux_dev_2xh100` | 2 GPUs |"
    assert keys_in(text) == {"train.beta", "seed"}
    assert presets_in(text) == {"a1", "b2", "flux_dev_2xh100"}


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: file.name)
def test_every_key_and_preset_exists(file):
    text = file.read_text()
    configs = (flux_grpo.get_config(), serve_rewards.get_config())
    for key in keys_in(text):
        assert any(has_key(config, key) for config in configs), key
    files = (flux_grpo, flux_objectives, rewriter_grpo, sd3_grpo, small_cards, zimage_grpo)
    presets = {name for file in files for name in file.PRESETS}
    assert presets_in(text) <= presets


@pytest.mark.slow
def test_the_job_scripts_know_the_flags_of_train():
    train = [sys.executable, ROOT / "scripts" / "train.py", "--helpfull"]
    help_text = subprocess.run(train, capture_output=True, text=True).stdout
    flags = set(re.findall(r"^  --(?:\[no\])?([a-z_]+)", help_text, re.MULTILINE))

    used = set()
    for file in JOBS:
        arguments = re.sub(r"#SBATCH.*|srun --\S+|#.*", "", file.read_text())
        used |= set(re.findall(r"--(?!config\.)([a-z_]+)", arguments))
    assert {"auto_resume", "distributed", "coordinator"} <= used <= flags


def test_the_job_scripts_parse():
    subprocess.run(["bash", "-n", ROOT / "examples" / "slurm.sh"], check=True)

    job = yaml.safe_load((ROOT / "examples" / "jobset.yaml").read_text())
    (trainer,) = job["spec"]["replicatedJobs"]
    pods = trainer["template"]["spec"]
    (train,) = pods["template"]["spec"]["containers"]
    assert Path(train["command"][1]).name == "train.py"

    arguments = dict(argument.split("=", 1) for argument in train["args"] if "=" in argument)
    assert pods["parallelism"] == pods["completions"] == int(arguments["--num_processes"])
    name = job["metadata"]["name"]
    assert arguments["--coordinator"].startswith(f"{name}-{trainer['name']}-0-0.{name}:")
    grace = float(arguments["--config.preemption_grace"])
    assert grace < pods["template"]["spec"]["terminationGracePeriodSeconds"]


@pytest.mark.parametrize(
    ("extra_flag", "accepted"), [("", True), (" --xla_gpu_no_such_flag=true", False)]
)
def test_xla_knows_the_flags_of_the_documents(extra_flag, accepted):
    """jaxlib stops at an unknown flag, its CPU build too."""
    found = set()
    for file in TEXTS:
        found |= set(re.findall(r"--xla_(?!jf_)\w+=\w*", file.read_text()))  # jf: libtpu
    assert "--xla_gpu_enable_latency_hiding_scheduler=true" in found

    done = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env={**os.environ, "XLA_FLAGS": " ".join(sorted(found)) + extra_flag},
    )
    assert (done.returncode == 0) == accepted
