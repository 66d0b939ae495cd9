"""Judges of the arena: who says which of two pictures looks more like a photograph.

A judge has

    name                what its verdicts are filed under
    is_person           whether a person judges: each pair is shown once, in random order
    compare(...)        answer questions, handing every verdict to a callback at once

`embedded` is a reward in this process, `api` a vision-language model behind an endpoint, `human` a
person in front of a page. Judges see a question as the protocol `Question` below describes it.
"""

import importlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol


class Question(Protocol):
    """Two pictures of one prompt, "first" and "second" in the order in which they are shown."""

    prompt: str  # of both pictures
    text: str  # what the judge is asked, "" for a person
    image_format: str  # PNG, JPEG

    def picture(self, position: str) -> bytes:
        """The file of the "first" or "second" picture. Raises ValueError if it has changed."""

    def read(self, reply: str) -> str | None:
        """The verdict in a reply: first, second, tie, or None if there is none."""


# Stores a verdict (first, second, tie, refused, unreadable, undone) and the judge's reply.
Keep = Callable[[Question, str, str], None]
Say = Callable[[str], None]


@dataclass
class Failures:
    """Questions without a verdict, and why the judge was not asked further."""

    reasons: Counter[str] = field(default_factory=Counter)
    stopped: str = ""  # "": every question was asked

    def report(self, judge: str, say: Say) -> None:
        """Say the five commonest reasons, and why the judge stopped."""
        for reason, count in self.reasons.most_common(5):
            say(f"arena: {count} questions failed: {reason}")
        if self.stopped:
            say(f"WARNING: arena: stopped asking {judge}: {self.stopped}")


# Name -> "module:function", called with config.evaluate.arena. A judge is one file and one line.
JUDGES = {
    "embedded": "reward_bridge.judges.reward:make_judge",
    "api": "reward_bridge.judges.api:make_judge",
    "human": "reward_bridge.judges.human:make_judge",
}


def make_judge(name: str, settings: Any) -> Any:
    """Return the judge of this name, or of one's own "module:Class".

    settings: config.evaluate.arena. Raises ValueError for a judge that does not exist, and for
    `api` if its environment variables are wrong.
    """
    path = JUDGES.get(name, name)
    module, colon, attribute = path.partition(":")
    if not colon:
        raise ValueError(
            f"there is no judge {name!r}; choose {', '.join(JUDGES)}, or module:Class of your own"
        )
    try:
        make = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"the judge {name!r} cannot be imported: {error}") from error
    return make(settings)
