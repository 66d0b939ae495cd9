"""Where the window of noisy steps lies: drawn for each call, or moved from epoch to epoch.

The strategies that move are MixGRPO's (arXiv 2507.21802): the window stays for some epochs, then
its start moves by `stride`. The start is a function of the epoch alone, so a resumed run goes on
where it was. MixGRPO shrinks the window at the end of the schedule; here it keeps its size, and
turns back as soon as it does not fit any more.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Moves:
    """How the window moves.

    strategy: "random" (each call draws its start) or a key of STAYS. epochs: how long a window
    stays. stride: steps between two starts; 0: it never moves. rollback: whether the start returns
    to the first one at the end, or stays at the last one. most, least: epochs of the first and of
    the last start with "decay". threshold, rate: of "exp_decay".
    """

    strategy: str = "random"
    epochs: int = 25
    stride: int = 1
    rollback: bool = True
    most: int = 10
    least: int = 1
    threshold: int = 13
    rate: float = 0.1

    def start(self, epoch: int, last: int) -> int:
        """Return the start, from 0 to `last`, in an epoch, counted from 0."""
        starts = self.one_pass(last)
        if self.rollback:
            return int(starts[epoch % len(starts)])
        return int(starts[epoch]) if epoch < len(starts) else last

    def one_pass(self, last: int) -> np.ndarray:
        """Return the start in each epoch of one pass over the schedule, int [epochs]."""
        stay = STAYS[self.strategy]
        starts = range(0, last + 1, self.stride) if self.stride else [0]
        return np.repeat(starts, [stay(self, start, last) for start in starts])


DRAWN = Moves()  # every call draws its start


def _progressive(moves: Moves, start: int, last: int) -> int:
    """The same number of epochs everywhere."""
    return moves.epochs


def _decay(moves: Moves, start: int, last: int) -> int:
    """From `most` epochs at the first start, linearly, to `least` at the last one."""
    share = start / last if last else 0.0
    return max(moves.least, int(moves.most * (1.0 - share) + moves.least * share))


def _exp_decay(moves: Moves, start: int, last: int) -> int:
    """`epochs` up to the start `threshold`, then exponentially less."""
    return math.ceil(moves.epochs * math.exp(-moves.rate * max(0, start - moves.threshold)))


# strategy -> (moves, start, last start) -> the number of epochs at this start
STAYS: dict[str, Callable[[Moves, int, int], int]] = {
    "progressive": _progressive,
    "decay": _decay,
    "exp_decay": _exp_decay,
}
