"""Programs of scripts/ as a user runs them, for the tests: subprocesses on the golden config."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers.goldens import ROOT

GOLDEN = ROOT / "tests" / "helpers" / "golden_config.py"
ADVERSARIAL = ROOT / "tests" / "helpers" / "adversarial_config.py"
# Compiles in two thirds of the time. Runs are compared with runs that were compiled alike; test_embedded's demo and
# test_grpo's replay are compiled as a user's.
QUICK = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}


def command(script, cache, *words, config=GOLDEN):
    shared = [
        f"--config.compilation_cache={cache / 'xla'}",
        f"--config.prompts.cache={cache / 'text'}",
    ]
    return [
        str(word)
        for word in (sys.executable, ROOT / "scripts" / script, "--config", config, *shared, *words)
    ]


def call(script, cache, *words, config=GOLDEN, **environment):
    """Run a program to its end."""
    words = command(script, cache, *words, config=config)
    return subprocess.run(
        words,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **QUICK, **environment},
    )


def begin(words, output, **environment):
    """Start a program whose output goes to a file."""
    with output.open("a") as file:
        return subprocess.Popen(
            words, stdout=file, stderr=file, env={**os.environ, **QUICK, **environment}
        )


def until(condition, process, output, seconds=240, pause=0.02):
    """Wait until `condition()` is true, while `process` runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, output.read_text()
        assert time.monotonic() < end, output.read_text()
        time.sleep(pause)


def rows(folder):
    """metrics.jsonl without what was measured of time and memory."""
    measured = ("seconds/", "images_per", "reward_wait_share", "memory/")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(measured)} for row in lines]


def epochs_done(folder):
    """Finished epochs, by the whole rows of a metrics.jsonl that is being written."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return max(
        (row["epoch"] for row in map(json.loads, lines) if row["kind"] == "train"), default=0
    )


def assert_close(one, other, tolerance=1e-5, rate=1e-3):
    """Two runs' rows, but for numbers of clipped samples and of bytes, and their LoRA: 99 % of it to a hundredth of the
    step size, all to half of it, as Adam makes a large step of a gradient that is nothing but rounding.
    """
    rounding = {"ratio_deviation", "clipfrac", "clipfrac_gt_one", "clipfrac_lt_one"}
    a, b = rows(one), rows(other)
    assert [(row["kind"], row["epoch"]) for row in a] == [(row["kind"], row["epoch"]) for row in b]
    for x, y in zip(a, b, strict=True):
        for key in x.keys() - {"kind"} - rounding:
            if not key.startswith(("correlation/", "noise/")):
                assert x[key] == pytest.approx(y[key], rel=tolerance, abs=tolerance), (
                    x["epoch"],
                    key,
                )
        assert x.get("first_ratio_deviation", 0) == y.get("first_ratio_deviation", 0) == 0
    lora = [
        load_file(folder / "lora" / "pytorch_lora_weights.safetensors") for folder in (one, other)
    ]
    apart = np.concatenate([np.abs(lora[0][key] - lora[1][key]).ravel() for key in lora[0]])
    assert np.quantile(apart, 0.99) < rate / 100
    assert apart.max() < rate / 2
