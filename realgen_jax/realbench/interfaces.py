"""What RealBench sees of rewards and judges. It is handed both and imports neither."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from realgen_jax.realbench.questions import Question


class Scores(Protocol):
    """What a batch's pictures scored."""

    rewards: Mapping[str, np.ndarray]  # {reward: float32 [n]}


class PendingScores(Protocol):
    """Scores that are being computed."""

    def result(self) -> Scores:
        """Wait for the scores.

        An error that a picture caused has an attribute `image`, the picture's index in the batch or
        None if it concerns them all. RealBench adds the picture's file to such an error's message.
        """


class Scorer(Protocol):
    """Computes rewards in the background."""

    def submit(
        self, images: np.ndarray, prompts: Sequence[str], names: Sequence[str]
    ) -> PendingScores:
        """Queue uint8 images [n, 3, h, w] for the named rewards and return at once."""

    def close(self) -> None:
        """Drop what is queued and stop."""


# Stores one verdict (first, second, tie, refused, unreadable, undone) and the judge's reply.
Keep = Callable[[Question, str, str], None]


class Judge(Protocol):
    """Says which of two pictures of a prompt looks more like a photograph."""

    name: str  # what its verdicts are filed under
    is_person: bool  # a person is shown each pair once, in random order

    def compare(
        self,
        questions: Sequence[Question],
        *,
        answered: int,
        keep: Keep,
        say: Callable[[str], None],
    ) -> None:
        """Answer questions in their order, calling `keep` with each verdict as soon as it is known.

        answered: how many pairs earlier calls have answered. A question whose pictures cannot be
        read is left out, and so are those that the judge fails to answer; `say` tells why.
        """
