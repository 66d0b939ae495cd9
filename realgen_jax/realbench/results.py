"""What an evaluation is made of: who is compared, on what, and what came of it. Plain data, no JAX and no PyTorch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PromptSet:
    """One variant of the prompts (short, long). Line i of every set describes the same scene."""

    name: str
    prompts: Sequence[str]
    categories: Sequence[str]  # per line, "" where the file names none


@dataclass(frozen=True)
class Entry:
    """One of those compared. Pictures of `model` and `lora` are made here; `folder` and `photographs` are found."""

    name: str
    kind: str  # model, lora, folder, photographs
    source: str  # the model's, LoRA's or pictures' path as given


@dataclass(frozen=True)
class Scored:
    """One picture and what every reward says of it."""

    entry: str
    set: str
    line: int
    copy: int  # 0 for the first picture of a prompt
    file: Path
    sha256: str  # of the file
    width: int
    height: int
    scores: dict[str, float]


@dataclass(frozen=True)
class Problem:
    """A picture that is not as it should be. Those of another size are scored, and no others."""

    entry: str
    set: str
    file: Path
    what: str  # missing, unreadable, other size, extra (of no prompt)
    detail: str


@dataclass(frozen=True)
class Evaluated:
    """Everything that tables and the report are made of."""

    sets: Sequence[PromptSet]
    entries: Sequence[Entry]  # the first one is what the others are compared with
    rewards: Sequence[str]
    pictures: Sequence[Scored]  # by entry, set, line, copy
    problems: Sequence[Problem]

    def set(self, name: str) -> PromptSet:
        return next(one for one in self.sets if one.name == name)


@dataclass(frozen=True)
class Judgement:
    """One answer of a judge to one pair, in the order in which it saw the pictures."""

    set: str
    line: int
    first: str  # entries
    second: str
    verdict: str  # first, second, tie, refused, unreadable
    reply: str
