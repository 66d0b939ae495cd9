"""What the documentation tells people to type: flags and keys exist, files parse."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ml_collections import ConfigDict

from realgen_configs import flux_grpo, serve_rewards
from tests.helpers.goldens import ROOT

TEXTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").iterdir()),
]


def has_key(config: ConfigDict, key: str) -> bool:
    """Whether a config has a key such as "train.learning_rate"."""
    value = config
    for name in key.split("."):
        if name not in value:
            return False
        value = value[name]
    return True


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: file.name)
def test_every_key_and_preset_exists(file):
    text = file.read_text()

    configs = (flux_grpo.get_config(), serve_rewards.get_config())
    keys = set(re.findall(r"(?:--config|`config)\.([a-z_][a-z_.]*[a-z_])", text))
    keys -= {"json"}  # config.json, a file
    unknown = [key for key in keys if not any(has_key(config, key) for config in configs)]
    assert not unknown

    presets = set(re.findall(r"flux_grpo(?:\.py)?:([a-z0-9_]+)", text))
    presets |= set(re.findall(r"^\| `(flux_dev_\w+)`", text, re.MULTILINE))
    assert presets <= set(flux_grpo.PRESETS)


def test_keys_and_presets_are_found():
    """The patterns of the test above find what they look for."""
    clusters = (ROOT / "docs" / "clusters.md").read_text()
    assert "`config.preemption_grace`" in clusters
    assert "--config.profile.steps=3" in clusters
    assert "| `flux_dev_6x2`" in clusters
    assert "flux_grpo.py:flux_dev_16xh200" in (ROOT / "examples" / "slurm.sh").read_text()


def test_the_job_scripts_know_the_flags_of_train():
    train = [sys.executable, ROOT / "scripts" / "train.py", "--helpfull"]
    help_text = subprocess.run(train, capture_output=True, text=True).stdout
    flags = set(re.findall(r"^  --(?:\[no\])?([a-z_]+)", help_text, re.MULTILINE))

    used = set()
    for file in (ROOT / "examples").iterdir():
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
        found |= set(re.findall(r"--xla_\w+=\w*", file.read_text()))
    assert "--xla_gpu_enable_latency_hiding_scheduler=true" in found

    done = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env={**os.environ, "XLA_FLAGS": " ".join(sorted(found)) + extra_flag},
    )
    assert (done.returncode == 0) == accepted
