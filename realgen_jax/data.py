"""Prompt files, the order in which a run uses the prompts, and the layout of a batch."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grain
import numpy as np

from realgen_jax.files import expand_home
from realgen_jax.input_files import check_text, read_lines


def read_prompts(path: str | Path) -> list[str]:
    """Read a prompt file: each line is a prompt (.txt) or a JSON object with "prompt" (.jsonl).

    The file is UTF-8, and only line feeds end a line. Raises FileNotFoundError, or ValueError
    naming the first bad line.
    """
    return [line.prompt for line in _read_lines(path)]


def read_categorised(path: str | Path) -> list[tuple[str, str]]:
    """Read a prompt file as (prompt, category) pairs.

    The category is the "category" of a JSON line, or "" if it has none. Raises FileNotFoundError,
    or ValueError naming the first bad line.
    """
    return [(line.prompt, line.category) for line in _read_lines(path)]


def read_originals(path: str | Path) -> list[str]:
    """Read the "original" of each line of a prompt file, or the prompt itself if it has none.

    scripts/rewrite.py writes such JSON lines: the user's prompt is the rewrite's original. Raises
    FileNotFoundError, or ValueError naming the first bad line.
    """
    return [line.original or line.prompt for line in _read_lines(path)]


@dataclass(frozen=True)
class _Line:
    """A line of a prompt file. category, original: "" if it has none."""

    prompt: str
    category: str = ""
    original: str = ""


def _read_lines(path: str | Path) -> list[_Line]:
    """The lines of a prompt file. Raises as `read_prompts` does."""
    path = expand_home(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; expected a prompt file (.txt, one a line, or .jsonl)"
        )
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(
            f"{path} ends in {path.suffix!r}; expected .txt (one prompt a line) or .jsonl"
        )

    prompts = []
    for number, line in enumerate(read_lines(path), start=1):
        place = f"{path}, line {number}"
        if not line.strip():
            raise ValueError(f"{place} is blank; every line must be a prompt")
        if path.suffix == ".jsonl":
            prompts.append(_parse_record(line, place))
        elif "\r" in line.strip():
            raise ValueError(f"{place} has a carriage return inside; end lines with line feeds")
        else:
            prompts.append(_Line(line.strip()))

    if not prompts:
        raise ValueError(f"{path} is empty; expected at least one prompt")
    return prompts


def _parse_record(line: str, place: str) -> _Line:
    """The content of a JSON line, ignoring other keys."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f'{place} is not JSON ({error}); expected {{"prompt": ...}}') from error

    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(
            f'{place} has no "prompt"; expected a JSON object with a string under "prompt"'
        )
    check_text(prompt, place)

    others = {}
    for name in ("category", "original"):
        value = record.get(name) or ""
        if not isinstance(value, str):
            raise ValueError(f'{place} has {value!r} under "{name}"; expected a string')
        check_text(value, place)
        others[name] = value.strip()
    return _Line(prompt.strip(), **others)


def overlaps(name: str, prompts: Sequence[str], others: Mapping[str, Sequence[str]]) -> list[str]:
    """Return one line for each of `others`, {name: prompts}, that shares prompts with `prompts`.

    Prompts are the same if they differ only in case and white space.
    """
    known = set(map(_normalised, prompts))
    lines = []
    for other, other_prompts in others.items():
        shared = [prompt for prompt in other_prompts if _normalised(prompt) in known]
        if shared:
            lines.append(
                f"{len(shared)} of the {len(other_prompts)} prompts in {other} are also in {name}, "
                f"such as {shared[0]!r}"
            )
    return lines


def _normalised(prompt: str) -> str:
    return " ".join(prompt.lower().split())


def prompt_batches(count: int, groups: int, seed: int) -> grain.DatasetIterator:
    """Return endless batches of row numbers, int [groups], each in [0, count).

    Every pass over the rows is reshuffled. The iterator's `get_state` and `set_state` save and
    restore its position.
    """
    rows = grain.MapDataset.source(np.arange(count)).seed(seed).shuffle().repeat()
    # There is no remainder to drop, but grain rounds the number of batches up without this, and
    # batches of one are then more than it can count.
    batches = rows.batch(groups, drop_remainder=True)
    return iter(batches.to_iter_dataset())


@dataclass(frozen=True)
class Layout:
    """How the images of an epoch are divided into rollout calls, slots and groups.

    Images are numbered call by call and, within a call, slot by slot. A slot is `branches`
    consecutive images that share a prefix of the rollout; a group is `group` consecutive images of
    one prompt. The scores of an epoch therefore reshape to [groups, group].
    """

    calls: int  # rollout calls per epoch
    images: int  # images per call, over all devices
    branches: int  # images per slot
    group: int  # images per group
    previews: int = 0  # of a prompt, among which a group is selected; 0: none

    def check(self, parts: int) -> None:
        """Raise ValueError if sizes do not divide evenly; `parts` devices share a call's slots."""
        whole_groups = self.images % self.group == 0
        whole_calls = self.group % self.images == 0
        if self.calls * self.images % self.group or not (whole_groups or whole_calls):
            raise ValueError(
                f"num_batches_per_epoch {self.calls} x train_batch_size {self.images} cannot be "
                f"divided into groups of num_image_per_prompt {self.group}: a call must hold whole "
                "groups, or a group whole calls"
            )
        if self.group % self.branches or self.images % (self.branches * parts):
            raise ValueError(
                f"branches {self.branches} must divide num_image_per_prompt {self.group}, and "
                f"train_batch_size {self.images} must be a multiple of branches x {parts} (the "
                "mesh's data x fsdp)"
            )
        if self.previews:
            self._check_previews()

    def _check_previews(self) -> None:
        """Raise ValueError if previews cannot be selected from."""
        if self.previews <= self.group:
            raise ValueError(
                f"config.sample.scout.previews is {self.previews}; expected more than "
                f"num_image_per_prompt {self.group}, which are selected among them, or 0 for none"
            )
        if self.groups * self.previews % self.images:
            raise ValueError(
                f"config.sample.scout.previews is {self.previews}, but {self.groups} prompts an "
                f"epoch with {self.previews} previews each are not whole calls of "
                f"train_batch_size {self.images}"
            )
        if self.branches > 1:
            raise ValueError(
                f"config.sample.scout.previews is {self.previews}, which selects single pictures, "
                f"but config.sample.branches is {self.branches}; expected 1"
            )

    @property
    def slots(self) -> int:
        """Slots per call."""
        return self.images // self.branches

    @property
    def groups(self) -> int:
        """Groups per epoch."""
        return self.calls * self.images // self.group

    def groups_of_slots(self, call: int) -> np.ndarray:
        """Return the group of each slot of a call: int [slots]."""
        first_image = call * self.images + np.arange(self.slots) * self.branches
        return first_image // self.group
