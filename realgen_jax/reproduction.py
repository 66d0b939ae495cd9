"""Compare a run with a recorded run of the same recipe: a folder such as examples/embedded/demo.

    recipe.json      the config's name, the options of train.py, and the figures of several seeds
    config.json      the config, with file names relative to the repository
    digests.json     digests of the files that the config names
    machine.json     CPU, cores, devices and versions of the recorded run
    metrics.jsonl    its log
    lora/            what it trained
    report.md        its report

On the same kind of machine with the same versions, every row of the log must be equal bit for bit.
Elsewhere floating-point sums have another order, which training amplifies: there the rows of the
first epoch must agree within NEAR, and the figures at the end within the spread of the seeds.
"""

import importlib.metadata
import json
import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realgen_jax.config import base
from realgen_jax.nn.tensors import read_json
from realgen_jax.training.run_folder import changed_keys, with_defaults

NEAR = 1e-4  # of the first epoch's values, relative to values above 1
# Columns that measure the machine, not the training.
TIMED = ("seconds/", "memory/", "images_per_second", "reward_wait_share")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers")


@dataclass(frozen=True)
class Outcome:
    """Whether a run reproduces a recorded one, and the lines that say how it was compared."""

    equal: bool
    lines: list[str]


def compare(recorded: Path, run: Path, machine: Mapping[str, Any]) -> Outcome:
    """Compare the log of `run` with a recorded one. machine: `this_machine` of the run.

    Raises FileNotFoundError for a missing file, and ValueError for one that is damaged.
    """
    changed = changed_recipe(recorded, run)
    if changed:
        return Outcome(False, ["another recipe than the recorded one:", *changed])

    rows = [read_rows(folder / "metrics.jsonl") for folder in (recorded, run)]
    differences = machine_differences(read_json(recorded / "machine.json"), machine)
    if not differences:
        return compare_bits(*rows)
    heading = "another machine than the recorded one, so bits are not compared:"
    figures = read_json(recorded / "recipe.json")["figures"]
    outcome = compare_nearly(*rows, figures)
    return Outcome(outcome.equal, [heading, *differences, *outcome.lines])


def changed_recipe(recorded: Path, run: Path) -> list[str]:
    """Return a line for each key, or file, that changes what is computed."""
    before = with_defaults(read_json(recorded / "config.json"), base().to_dict())
    digests = [read_json(folder / "digests.json") for folder in (recorded, run)]
    _, changed = changed_keys(before, read_json(run / "config.json"), *digests)
    return changed


def compare_bits(recorded: Sequence[Mapping], rows: Sequence[Mapping]) -> Outcome:
    """Compare every recorded value of every row, but for those of TIMED.

    Columns that did not exist when the run was recorded are told, but are no difference.
    """
    if len(recorded) != len(rows):
        return Outcome(False, [f"{len(rows)} rows; the recorded run has {len(recorded)}"])
    new: set[str] = set()
    for before, now in zip(recorded, rows, strict=True):
        new |= trained(now).keys() - before.keys()
        for column, value in trained(before).items():
            if now.get(column) != value:
                place = f"epoch {before['epoch']}, {before['kind']}, {column}"
                return Outcome(False, [f"{place}: {now.get(column)}, recorded {value}"])
    equal = f"all {len(rows)} rows are equal bit for bit"
    lines = [f"the recorded kind of machine and versions: {equal}"]
    if new:
        lines.append(f"columns that the recorded run does not have: {', '.join(sorted(new))}")
    return Outcome(True, lines)


def compare_nearly(
    recorded: Sequence[Mapping], rows: Sequence[Mapping], figures: Mapping[str, Sequence[float]]
) -> Outcome:
    """Compare the first epoch within NEAR, and the last evaluation's figures.

    figures: {column: its value at the end of the run for several seeds}.
    """
    lines = []
    equal = True

    # -- The first evaluation and the first epoch.
    worst = (0.0, "")
    for before, now in zip(first_rows(recorded), first_rows(rows), strict=True):
        for column, value in trained(before).items():
            if isinstance(value, float):
                distance = abs(now.get(column, math.nan) - value) / max(1.0, abs(value))
                worst = max(worst, (math.inf if math.isnan(distance) else distance, column))
    equal &= worst[0] <= NEAR
    lines.append(f"first epoch: largest difference {worst[0]:.1e} ({worst[1]}), limit {NEAR:g}")

    # -- The figures at the end.
    ends = [evaluations(log)[-1] for log in (recorded, rows)]
    epochs = [end["epoch"] for end in ends]
    if epochs[0] != epochs[1]:
        lines.append(f"the last evaluation is of epoch {epochs[1]}, recorded {epochs[0]}")
        return Outcome(False, lines)
    for column, seeds in figures.items():
        before, now = (figure(end, column) for end in ends)
        spread = max(seeds) - min(seeds)
        near = abs(now - before) <= spread + NEAR
        equal &= near
        word = "within" if near else "NOT within"
        lines.append(
            f"{column}: {now:.3f}, recorded {before:.3f}, {word} the seeds' spread of {spread:.3f}"
        )
    return Outcome(bool(equal), lines)


def trained(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of a row that do not depend on time or memory."""
    return {column: value for column, value in row.items() if not column.startswith(TIMED)}


def evaluations(rows: Sequence[Mapping]) -> list[Mapping]:
    """Return the rows of the evaluations. Raises ValueError if there are none."""
    found = [row for row in rows if row["kind"] == "eval"]
    if not found:
        raise ValueError("the log has no evaluation")
    return found


def first_rows(rows: Sequence[Mapping]) -> list[Mapping]:
    """Return the first evaluation and the first epoch of a log."""
    epochs = [row for row in rows if row["kind"] == "train"]
    if not epochs:
        raise ValueError("the log has no epoch")
    return [evaluations(rows)[0], epochs[0]]


def figure(row: Mapping[str, Any], column: str) -> float:
    """Return a figure of an evaluation. Raises ValueError if the evaluation does not have it."""
    if not isinstance(row.get(column), float):
        raise ValueError(f"evaluations have no column {column!r}, which recipe.json compares")
    return row[column]


# -- The machine


def this_machine(devices: Sequence[str]) -> dict[str, Any]:
    """Return what the bits of a run depend on. devices: kind of each device that JAX uses."""
    versions = {"python": ".".join(map(str, sys.version_info[:2]))}
    for package in PACKAGES:
        versions[package] = importlib.metadata.version(package)
    return {
        "cpu": cpu_kind(),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "devices": list(devices),
        "versions": versions,
    }


def cpu_kind() -> str:
    """Return the CPU's name, family, model and stepping, as Linux tells them."""
    names = ("model name", "cpu family", "model", "stepping")
    found = {}
    file = Path("/proc/cpuinfo")
    for line in file.read_text().splitlines() if file.exists() else []:
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    words = [f"{name} {found[name]}".removeprefix("model name ") for name in names if name in found]
    return ", ".join([platform.machine(), *words])


def machine_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a line for each respect in which two machines differ."""
    old = {**before, **before["versions"]}
    new = {**now, **now["versions"]}
    keys = [key for key in [*old, *(new.keys() - old.keys())] if key != "versions"]
    return [
        f"  {key}: {new.get(key)}, recorded {old.get(key)}"
        for key in keys
        if old.get(key) != new.get(key)
    ]


# -- Files


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Read a log."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        return [json.loads(line) for line in file.read_text().splitlines()]
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
