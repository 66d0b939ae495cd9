"""Interfaces of the rewards and judges that callers pass to RealBench; it imports neither."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from realgen_jax.realbench.questions import Question


class Scores(Protocol):
    """The scores of a batch of pictures."""

    rewards: Mapping[str, np.ndarray]  # {reward: float32 [n]}


class PendingScores(Protocol):
    """Scores that are being computed."""

    def result(self) -> Scores:
        """Wait for the scores.

        An error caused by a picture has an attribute `image`: the picture's index in the batch, or
        None if it concerns the whole batch. RealBench adds the picture's file to the message.
        """


class Scorer(Protocol):
    """Computes rewards in the background."""

    def submit(
        self, images: np.ndarray, prompts: Sequence[str], names: Sequence[str]
    ) -> PendingScores:
        """Queue uint8 images [n, 3, h, w] for the named rewards and return at once."""

    def close(self) -> None:
        """Drop all queued work and stop."""


# Stores one verdict (first, second, tie, refused, unreadable, undone) and the judge's reply.
Keep = Callable[[Question, str, str], None]


class Judge(Protocol):
    """Says which of two pictures of a prompt looks more like a photograph."""

    name: str  # the name under which its verdicts are stored
    is_person: bool  # a person is shown each pair once, in random order

    def compare(
        self,
        questions: Sequence[Question],
        *,
        answered: int,
        keep: Keep,
        say: Callable[[str], None],
    ) -> None:
        """Answer questions in order, calling `keep` with each verdict as soon as it is known.

        answered: how many pairs earlier calls have answered. A question is skipped if its pictures
        cannot be read or the judge fails to answer; `say` reports why.
        """
