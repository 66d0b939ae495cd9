"""The package as a user installs it: a wheel in an empty environment, run from an empty folder."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers.goldens import ROOT
from tests.helpers.running import QUICK

pytestmark = pytest.mark.slow

COMMANDS = [
    "realgen-diagnose",
    "realgen-encode-prompts",
    "realgen-evaluate",
    "realgen-export",
    "realgen-make-references",
    "realgen-preflight",
    "realgen-profile-summary",
    "realgen-quantize",
    "realgen-rewrite",
    "realgen-run-stages",
    "realgen-sample",
    "realgen-serve-judge",
    "realgen-serve-rewards",
    "realgen-train",
]
# The wheel is built from a copy without these. An older build/ would end up in it.
LEFT_OUT = shutil.ignore_patterns(".*", "build", "*.egg-info", "runs", "tests", "benchmarks")
OWN_CONFIG = """
import realgen_jax, reward_bridge
from realgen_configs.flux_grpo import tiny
from realgen_jax.config import base

def get_config():
    print(realgen_jax.__file__, reward_bridge.__file__)
    return tiny()
"""


def run(*command: object, folder: Path) -> subprocess.CompletedProcess:
    """Run a command in a folder, without the repository on Python's path."""
    environment = {**os.environ, **QUICK}
    environment.pop("PYTHONPATH", None)
    return subprocess.run(
        [str(argument) for argument in command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )


def succeed(*command: object, folder: Path) -> str:
    """Run a command that must exit with status 0. Returns what it printed."""
    done = run(*command, folder=folder)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Path:
    """The bin/ folder of a new environment in which the wheel is installed.

    Its dependencies are those of this environment, which a .pth file adds at the end of the path.
    """
    folder = tmp_path_factory.mktemp("install")
    shutil.copytree(ROOT, folder / "source", ignore=LEFT_OUT)
    wheel_of = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir=dist")
    succeed(sys.executable, *wheel_of, "./source", folder=folder)
    (wheel,) = (folder / "dist").glob("realgen_jax-*.whl")

    succeed(sys.executable, "-m", "venv", "environment", folder=folder)
    python = folder / "environment" / "bin" / "python"
    succeed(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel, folder=folder)

    (packages,) = (folder / "environment").glob("lib/python*/site-packages")
    dependencies = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "dependencies.pth").write_text("\n".join(dependencies) + "\n")
    return python.parent


def test_the_demo_runs_in_an_empty_folder(programs, tmp_path):
    succeed(
        programs / "realgen-train",
        "--config=flux_grpo",
        "--config.run_name=demo",
        "--config.num_epochs=2",
        "--config.sample.num_batches_per_epoch=1",
        "--config.sample.test_images_per_prompt=2",
        "--config.evaluate.after_training=False",
        "--config.compilation_cache=",
        "--config.prompts.cache=text",
        folder=tmp_path,
    )
    assert (tmp_path / "runs" / "demo" / "lora" / "pytorch_lora_weights.safetensors").exists()


def test_configs_of_ones_own_use_the_installed_package(programs, tmp_path):
    (tmp_path / "own.py").write_text(OWN_CONFIG)
    load = "from realgen_jax.config_files import load_config; load_config('own.py')"
    for path in succeed(programs / "python", "-c", load, folder=tmp_path).split():
        assert Path(path).is_relative_to(programs.parent)


def test_every_command_starts(programs, tmp_path):
    assert sorted(path.name for path in programs.glob("realgen-*")) == COMMANDS

    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(run, programs / name, "--help", folder=tmp_path) for name in COMMANDS]
    for call in calls:
        help_text = call.result().stdout
        assert "--help" in help_text or "--config" in help_text, help_text
        assert "Traceback" not in help_text
