"""The data of an evaluation. Plain data, without JAX or PyTorch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PromptSet:
    """One variant of the prompts (short, long). Line i of every set describes the same scene."""

    name: str
    prompts: Sequence[str]
    categories: Sequence[str]  # one per line, "" if the file names none


@dataclass(frozen=True)
class Entry:
    """A participant. Pictures of kind `model` and `lora` are generated; the others are read.

    rewriter: the folder of what rewrites the prompts before they are drawn; "" for none. of: the
    entry whose weights draw the pictures; "" for its own.
    """

    name: str
    kind: str  # model, lora, folder, photographs
    source: str  # path of the model, the LoRA or the pictures, as given by the user
    rewriter: str = ""
    of: str = ""

    @property
    def is_generated(self) -> bool:
        return self.kind in ("model", "lora")


@dataclass(frozen=True)
class ScoredPicture:
    """One picture and its score from every reward."""

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
    """Something wrong with a picture. Only pictures of kind "other size" are still scored."""

    entry: str
    set: str
    file: Path
    kind: str  # missing, unreadable, other size, extra (belongs to no prompt)
    detail: str


@dataclass(frozen=True)
class Results:
    """The outcome of an evaluation: all data for the tables and the report."""

    sets: Sequence[PromptSet]
    entries: Sequence[Entry]  # the others are compared with the first one
    rewards: Sequence[str]
    pictures: Sequence[ScoredPicture]  # ordered by entry, set, line and copy
    problems: Sequence[Problem]
    facts: Sequence[tuple[str, str]] = ()  # (name, value): of a benchmark
    report: str = "report"  # the name of the report's folder


@dataclass(frozen=True)
class Judgement:
    """A judge's answer to one question, in the order in which it saw the pictures."""

    set: str
    line: int
    first: str  # entries
    second: str
    verdict: str  # first, second, tie, refused, unreadable
    reply: str
