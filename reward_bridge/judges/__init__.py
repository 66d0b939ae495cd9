"""Judges of the arena, which decide which of two pictures looks more like a photograph.

A judge has

    name                the name under which its verdicts are stored
    is_person           whether a person judges: each pair is shown once, in random order
    check_connection()  optional: raises ValueError if what the judge asks is not there
    compare(...)        answers questions and passes each verdict to a callback at once

`embedded` is a reward in this process, `api` a vision-language model behind an endpoint, `human` a
person in front of a page. The protocol `Question` below describes what a judge sees of a question.
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
        """The bytes of the "first" or "second" file. Raises ValueError if it has changed."""

    def read(self, reply: str) -> str | None:
        """The verdict in a reply: first, second, tie, or None if there is none."""


# Stores a verdict (first, second, tie, refused, unreadable, undone) and the judge's reply.
Keep = Callable[[Question, str, str], None]
Say = Callable[[str], None]


@dataclass
class Failures:
    """The questions without a verdict, and why asking stopped."""

    reasons: Counter[str] = field(default_factory=Counter)
    stopped: str = ""  # "": every question was asked

    def report(self, judge: str, say: Say) -> None:
        """Report the five most common reasons, and why asking stopped."""
        for reason, count in self.reasons.most_common(5):
            say(f"arena: {count} questions failed: {reason}")
        if self.stopped:
            say(f"WARNING: arena: stopped asking {judge}: {self.stopped}")


# Name -> "module:function", called with config.evaluate.arena. A new judge is a file and a line.
JUDGES = {
    "embedded": "reward_bridge.judges.reward:make_judge",
    "api": "reward_bridge.judges.api:make_judge",
    "human": "reward_bridge.judges.human:make_judge",
}


def make_judge(name: str, settings: Any) -> Any:
    """Return the judge of this name, or one that "module:Class" names.

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
