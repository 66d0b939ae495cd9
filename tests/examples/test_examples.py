"""What the documentation tells people to type: flags and keys exist, files parse."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.running import ROOT

TEXTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").iterdir()),
]


def known(config, key):
    """Whether a config has a dotted key."""
    for name in key.split("."):
        if name not in config:
            return False
        config = config[name]
    return True


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: file.name)
def test_every_key_and_preset_exists(monkeypatch, file):
    from realgen_configs import flux_grpo, serve_rewards

    text, configs = file.read_text(), (flux_grpo.get_config(), serve_rewards.get_config())
    keys = set(re.findall(r"(?:--config|`config)\.([a-z_][a-z_.]*[a-z_])", text)) - {"json"}
    assert not [key for key in keys if not any(known(config, key) for config in configs)]
    presets = set(
        re.findall(r"flux_grpo\.py:([a-z0-9_]+)", text)
        + re.findall(r"^\| `(flux_dev_\w+)`", text, re.M)
    )
    assert keys or presets
    assert presets <= set(flux_grpo.PRESETS)


def test_the_job_scripts_know_the_flags_of_train():
    train = [sys.executable, ROOT / "scripts" / "train.py", "--helpfull"]
    known = subprocess.run(train, capture_output=True, text=True).stdout
    flags = set(re.findall(r"^  --(?:\[no\])?([a-z_]+)", known, re.MULTILINE))
    used = set()
    for file in (ROOT / "examples").iterdir():
        words = re.sub(r"#SBATCH.*|srun --\S+|#.*", "", file.read_text())
        used |= set(re.findall(r"--(?!config\.)([a-z_]+)", words))
    assert {"auto_resume", "distributed", "coordinator"} <= used <= flags


def test_the_job_scripts_parse():
    subprocess.run(["bash", "-n", ROOT / "examples" / "slurm.sh"], check=True)
    job = yaml.safe_load((ROOT / "examples" / "jobset.yaml").read_text())
    (trainer,) = job["spec"]["replicatedJobs"]
    pods = trainer["template"]["spec"]
    (train,) = pods["template"]["spec"]["containers"]
    processes = next(word for word in train["args"] if word.startswith("--num_processes="))
    assert pods["parallelism"] == pods["completions"] == int(processes.split("=")[1])
    first = (
        f"--coordinator={job['metadata']['name']}-{trainer['name']}-0-0.{job['metadata']['name']}:"
    )
    assert any(word.startswith(first) for word in train["args"])
    grace = next(word for word in train["args"] if word.startswith("--config.preemption_grace="))
    assert float(grace.split("=")[1]) < pods["template"]["spec"]["terminationGracePeriodSeconds"]
    assert Path(train["command"][1]).name == "train.py"


def test_xla_knows_the_flags_of_the_documents():
    """jaxlib aborts at an unknown flag, its CPU build too."""
    flags = " ".join(
        sorted({flag for file in TEXTS for flag in re.findall(r"--xla_\w+=\w*", file.read_text())})
    )
    assert "--xla_gpu_enable_latency_hiding_scheduler=true" in flags
    for more, known in (("", True), (" --xla_gpu_no_such_flag=true", False)):
        done = subprocess.run(
            [sys.executable, "-c", "import jax; jax.devices()"],
            env={**os.environ, "XLA_FLAGS": flags + more},
        )
        assert (done.returncode == 0) == known
