"""Prompt files, and the order in which a run goes through them."""

import json
from dataclasses import dataclass
from pathlib import Path

import grain
import numpy as np


def read_prompts(path: str | Path) -> list[str]:
    """One prompt a line (.txt), or one JSON object a line with "prompt" (.jsonl; other keys are left alone).

    Raises FileNotFoundError, or ValueError naming the first bad line.
    """
    return [prompt for prompt, _ in read_categorised(path)]


def read_categorised(path: str | Path) -> list[tuple[str, str]]:
    """As `read_prompts`, each with its "category"; "" where the line names none."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; expected a prompt file (.txt, one a line, or .jsonl)"
        )
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(
            f"{path} ends in {path.suffix!r}; expected .txt (one prompt a line) or .jsonl"
        )
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        where, category = f"{path}, line {number}", ""
        if not line.strip():
            raise ValueError(f"{where} is blank; every line is a prompt")
        if path.suffix == ".jsonl":
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f'{where} is not JSON ({error}); expected {{"prompt": ...}}'
                ) from error
            line = record.get("prompt") if isinstance(record, dict) else None
            if not isinstance(line, str) or not line.strip():
                raise ValueError(
                    f'{where} has no "prompt"; expected a JSON object with a text under "prompt"'
                )
            category = record.get("category") or ""
            if not isinstance(category, str):
                raise ValueError(f'{where} has {category!r} under "category"; expected a text')
        prompts.append((line.strip(), category.strip()))
    if not prompts:
        raise ValueError(f"{path} is empty; expected at least one prompt")
    return prompts


def prompt_batches(count: int, groups: int, seed: int) -> grain.DatasetIterator:
    """Endless batches of `groups` row numbers below `count`; every pass is a new shuffle of all rows.

    The iterator's `get_state` and `set_state` carry its position in a checkpoint.
    """
    rows = grain.MapDataset.source(np.arange(count)).seed(seed).shuffle().repeat()
    return iter(rows.batch(groups).to_iter_dataset())


@dataclass(frozen=True)
class Layout:
    """How an epoch's images fall into rollout calls, slots (images that share a prefix) and groups (of one prompt).

    Images are numbered call by call and, in a call, slot by slot; a group is `group` neighbours in that order, so the
    epoch's scores reshape to [groups, group]. `images` counts those of one call, over all devices.
    """

    calls: int
    images: int
    branches: int
    group: int

    def check(self, parts: int) -> None:
        """Raise ValueError for sizes that do not fall together; a call's slots are spread over `parts` devices."""
        if self.calls * self.images % self.group or (
            self.images % self.group and self.group % self.images
        ):
            raise ValueError(
                f"num_batches_per_epoch {self.calls} x train_batch_size {self.images} does not fall into groups of "
                f"num_image_per_prompt {self.group}: a call must hold whole groups, or a group whole calls"
            )
        if self.group % self.branches or self.images % (self.branches * parts):
            raise ValueError(
                f"branches {self.branches} must divide num_image_per_prompt {self.group}, and train_batch_size "
                f"{self.images} must be a multiple of branches x {parts} (the mesh's data x fsdp)"
            )

    @property
    def slots(self) -> int:
        return self.images // self.branches

    @property
    def groups(self) -> int:
        return self.calls * self.images // self.group

    def groups_of_slots(self, call: int) -> np.ndarray:
        """The group that each slot of a call belongs to: int [slots]."""
        return (call * self.images + np.arange(self.slots) * self.branches) // self.group
