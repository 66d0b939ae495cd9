"""GenEval's checks: does a picture hold the objects that its prompt names? (arXiv 2310.11513)

Requirements are the lines of GenEval's evaluation_metadata.jsonl: "include" and "exclude" list
objects with a class and a count, and perhaps a colour, or a position relative to an earlier entry.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reward_bridge.detection import Detection

COLOURS = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white",
)  # fmt: skip
POSITIONS = ("left of", "right of", "above", "below")
LEAST_SCORE = 0.3  # of a detection
LEAST_SCORE_COUNTING = 0.9  # where objects are counted
MOST_OBJECTS = 16  # of a class
APART = 0.1  # share of both objects' sizes by which their centres must differ
COUNTING = "counting"  # the tag of prompts that ask for a number of objects

# GenEval's names of COCO's classes, where they differ.
NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}

# The colours of detections of a class: (detections, class) -> one colour each.
Colours = Callable[[Sequence[Detection], str], Sequence[str]]


@dataclass(frozen=True)
class Wanted:
    """An object that a picture shall hold, or shall not hold `count` times or more."""

    name: str
    count: int
    colour: str = ""  # "" for any
    position: str = ""  # relative to `target`; "" for any
    target: int = 0  # number of the earlier entry of "include"


@dataclass(frozen=True)
class Requirement:
    """What one prompt asks for."""

    prompt: str
    tag: str  # single_object, two_object, counting, colors, position, color_attr
    include: tuple[Wanted, ...]
    exclude: tuple[Wanted, ...] = ()

    @property
    def least_score(self) -> float:
        """The score above which a detection counts."""
        return LEAST_SCORE_COUNTING if self.tag == COUNTING else LEAST_SCORE

    @property
    def names(self) -> set[str]:
        """The classes of objects that matter."""
        return {wanted.name for wanted in (*self.include, *self.exclude)}


def read_requirements(file: Path) -> list[Requirement]:
    """Read evaluation_metadata.jsonl. Raises ValueError naming the first bad line."""
    requirements = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            requirements.append(_requirement(json.loads(line)))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file}, line {number}, is no line of GenEval's evaluation_metadata.jsonl "
                f"({type(error).__name__}: {error})"
            ) from error
    if not requirements:
        raise ValueError(f"{file} is empty; expected GenEval's evaluation_metadata.jsonl")
    return requirements


def _requirement(record: Mapping[str, Any]) -> Requirement:
    include = tuple(_wanted(entry, number) for number, entry in enumerate(record["include"]))
    exclude = tuple(_wanted(entry, 0) for entry in record.get("exclude", ()))
    return Requirement(record["prompt"], record["tag"], include, exclude)


def _wanted(entry: Mapping[str, Any], number: int) -> Wanted:
    """An entry of "include" or "exclude", the number-th of its list."""
    colour = entry.get("color", "")
    if colour and colour not in COLOURS:
        raise ValueError(f"color is {colour!r}; expected one of {', '.join(COLOURS)}")
    position, target = entry.get("position", ("", 0))
    if position and position not in POSITIONS:
        raise ValueError(f"position is {position!r}; expected one of {', '.join(POSITIONS)}")
    if position and not 0 <= target < number:
        raise ValueError(f"position is relative to entry {target}; expected one before {number}")
    return Wanted(entry["class"], int(entry["count"]), colour, position, target)


def check(detections: Sequence[Detection], requirement: Requirement, colours: Colours) -> bool:
    """Whether a picture meets a requirement.

    detections: the most certain first. Of each class, the first MOST_OBJECTS that are certain
    enough count. colours: asked only for objects that a colour is required of.
    """
    objects: dict[str, list[Detection]] = {}
    for detection in detections:
        if detection.score > requirement.least_score:
            name = NAMES.get(detection.name, detection.name)
            objects.setdefault(name, []).append(detection)

    # Each entry of "include" is met by the most certain objects of its class.
    met: list[list[Detection]] = []
    correct = True
    for wanted in requirement.include:
        candidates = objects.get(wanted.name, [])[: min(wanted.count, MOST_OBJECTS)]
        fits = len(candidates) == wanted.count
        if fits and wanted.colour:
            fits = list(colours(candidates, wanted.name)).count(wanted.colour) >= wanted.count
        if fits and wanted.position:
            targets = met[wanted.target]
            fits = bool(targets) and all(
                wanted.position in positions(a, b) for a in candidates for b in targets
            )
        met.append(candidates if fits else [])
        correct = correct and fits

    for unwanted in requirement.exclude:
        count = min(len(objects.get(unwanted.name, [])), MOST_OBJECTS)
        correct = correct and count < unwanted.count
    return correct


def positions(a: Detection, b: Detection) -> set[str]:
    """Where a is relative to b: up to two of POSITIONS.

    The offset of the boxes' centres is reduced by APART of their sizes. A direction counts if the
    rest is more than half of the offset's length.
    """
    box_a, box_b = np.reshape(a.box, (2, 2)), np.reshape(b.box, (2, 2))
    offset = box_a.mean(axis=0) - box_b.mean(axis=0)
    sizes = np.ptp(box_a, axis=0) + np.ptp(box_b, axis=0)
    rest = np.maximum(np.abs(offset) - APART * sizes, 0) * np.sign(offset)
    if np.all(np.abs(rest) < 1e-3):
        return set()
    x, y = rest / np.linalg.norm(offset)
    sides = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in sides.items() if holds}
