"""What the benchmarks share: medians of wall-clock times, tables in the terminal, one JSON file per machine kind."""

import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """The accelerator's name, or the CPU's architecture and number of cores."""
    kind = jax.devices()[0].device_kind
    return (
        kind
        if jax.default_backend() != "cpu"
        else f"cpu-{platform.machine()}-{os.cpu_count()}-cores"
    )


def alternate(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, taken in turns (A B A B ...) so that a slow minute of the machine meets all of them.

    A call returns what it computed; arrays of jax are waited for. Each runs once unmeasured before.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
    return statistics.median(alternate({"": call}, repeats)[""])


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their longest cell; the first is aligned to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    for line in (header, ["-" * width for width in widths], *rows):
        first, *numbers = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join([first, *(cell.strip().rjust(len(cell)) for cell in numbers)]), flush=True)


def save(benchmark: str, found: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write <folder>/<benchmark>_<machine>.json with the versions beside the figures, and return it."""
    versions = {}
    for package in ("jax", "jaxlib", "flax", "optax", "torch", "diffusers", "peft"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    text = json.dumps({"machine": machine(), "versions": versions, **found}, indent=2)
    file = folder / f"{benchmark}_{machine().replace(' ', '-').lower()}.json"
    file.write_text(text + "\n")
    return file
