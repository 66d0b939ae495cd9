"""Shared by the benchmarks: medians of times, tables, and a JSON file for each kind of machine."""

import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "diffusers", "peft")


def machine() -> str:
    """Return the accelerator's name, or the CPU's architecture and number of cores."""
    if jax.default_backend() == "cpu":
        return f"cpu-{platform.machine()}-{os.cpu_count()}-cores"
    return jax.devices()[0].device_kind


def alternate(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Time the calls in turns (A B A B ...) and return the seconds of each.

    In turns, a slow minute of the machine affects all of them. Each call runs once before it is
    timed. It returns what it computed, so that JAX's arrays can be waited for.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def train_command(folder: Path, name: str, preset: str, *options: str) -> list[str]:
    """Return the command that trains a preset of configs/embedded.py in `folder`/`name`."""
    return [
        sys.executable,
        str(ROOT / "scripts" / "train.py"),
        "--config",
        f"{ROOT}/configs/embedded.py:{preset}",
        f"--config.run_root={folder}",
        f"--config.run_name={name}",
        "--config.evaluate.after_training=False",
        *options,
    ]


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Return the median time of a call."""
    return statistics.median(alternate({"": call}, repeats)[""])


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table. The first column is aligned to the left, the others to the right."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    rule = ["-" * width for width in widths]
    for line in (header, rule, *rows):
        cells = [line[0].ljust(widths[0])]
        for cell, width in zip(line[1:], widths[1:], strict=True):
            cells.append(cell.rjust(width))
        print("  ".join(cells), flush=True)


def file_name(benchmark: str) -> str:
    """Return the name of a benchmark's results on this machine."""
    return f"{benchmark}_{machine().replace(' ', '-').lower()}.json"


def save(benchmark: str, results: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write <folder>/<benchmark>_<machine>.json with the packages' versions; return its path."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    text = json.dumps({"machine": machine(), "versions": versions, **results}, indent=2)
    file = folder / file_name(benchmark)
    file.write_text(text + "\n")
    return file
