"""Run the programs of scripts/ as a user does, in subprocesses, on the golden config."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers.goldens import ROOT

GOLDEN = ROOT / "tests" / "helpers" / "golden_config.py"
ADVERSARIAL = ROOT / "tests" / "helpers" / "adversarial_config.py"
# Compiles in two thirds of the time. Runs are only compared with runs compiled in the same way.
# test_embedded's demo and test_grpo's replay are compiled as a user's runs are.
QUICK = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}


def command(script: str, cache: Path, *arguments: object, config: object = GOLDEN) -> list[str]:
    """The command line of a program, with its caches in `cache`."""
    parts = [
        sys.executable,
        ROOT / "scripts" / script,
        "--config",
        config,
        f"--config.compilation_cache={cache / 'xla'}",
        f"--config.prompts.cache={cache / 'text'}",
        *arguments,
    ]
    return [str(part) for part in parts]


def call(
    script: str, cache: Path, *arguments: object, config: object = GOLDEN, **environment: str
) -> subprocess.CompletedProcess:
    """Run a program to its end."""
    return subprocess.run(
        command(script, cache, *arguments, config=config),
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **QUICK, **environment},
    )


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let programs that are started here receive Ctrl-C, which a shell's background jobs ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def begin(arguments: list[str], output: Path, **environment: str) -> subprocess.Popen:
    """Start a program whose output is appended to a file."""
    with output.open("a") as file, interruptible():
        return subprocess.Popen(
            arguments, stdout=file, stderr=file, env={**os.environ, **QUICK, **environment}
        )


def until(
    condition: Callable[[], bool],
    process: subprocess.Popen,
    output: Path,
    seconds: float = 240,
    pause: float = 0.02,
) -> None:
    """Wait until `condition()` is true while `process` runs; fail if the process ends first."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, output.read_text()
        assert time.monotonic() < end, output.read_text()
        time.sleep(pause)


def rows(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl, without what each process measures: times, memory."""
    measured = ("seconds/", "images_per", "reward_wait_share", "memory/", "cache_error")
    kept = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        kept.append({key: row[key] for key in row if not key.startswith(measured)})
    return kept


def epochs_done(folder: Path) -> int:
    """The number of finished epochs, also while metrics.jsonl is being written."""
    file = folder / "metrics.jsonl"
    if not file.exists():
        return 0
    complete_lines = file.read_text().split("\n")[:-1]
    rows = [json.loads(line) for line in complete_lines]
    return max((row["epoch"] for row in rows if row["kind"] == "train"), default=0)


def assert_close(one: Path, other: Path, tolerance: float = 1e-5, rate: float = 1e-3) -> None:
    """Assert that two runs have the same rows and LoRA, up to rounding.

    Counts of clipped samples are not compared. 99 % of the LoRA must agree to a hundredth of the
    step size and 99.9 % to half the step size: where a gradient is only rounding, Adam makes a
    whole step of it, in either direction.
    """
    uncompared = {"kind", "ratio_deviation", "clipfrac", "clipfrac_gt_one", "clipfrac_lt_one"}
    rows_one = rows(one)
    rows_other = rows(other)
    assert [(row["kind"], row["epoch"]) for row in rows_one] == [
        (row["kind"], row["epoch"]) for row in rows_other
    ]
    for first, second in zip(rows_one, rows_other, strict=True):
        for key in first.keys() - uncompared:
            if key.startswith(("correlation/", "noise/")):
                continue
            expected = pytest.approx(second[key], rel=tolerance, abs=tolerance)
            assert first[key] == expected, (first["epoch"], key)
        assert first.get("first_ratio_deviation", 0) == 0
        assert second.get("first_ratio_deviation", 0) == 0

    lora_one = load_file(one / "lora" / "pytorch_lora_weights.safetensors")
    lora_other = load_file(other / "lora" / "pytorch_lora_weights.safetensors")
    differences = [np.abs(lora_one[key] - lora_other[key]).ravel() for key in lora_one]
    difference = np.concatenate(differences)
    assert np.quantile(difference, 0.99) < rate / 100
    assert np.quantile(difference, 0.999) < rate / 2
