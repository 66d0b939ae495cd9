"""Rewards that cannot tell pictures apart, from which nothing is learned."""

from collections.abc import Mapping, Sequence
from typing import Any

from realgen_jax.rewriter.texts import TEXT_REWARDS

# A single epoch without spread can be chance, where a call has few groups or scores are coarse.
CONSTANT_EPOCHS = 3


class ConstantRewards:
    """Counts for how many epochs in a row a reward has given all pictures of a group one score.

    rows: those of metrics.jsonl that a resumed run has already.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]]):
        self._epochs: dict[str, int] = {}
        for row in rows:
            if row["kind"] == "train":
                self.add(row)

    def add(self, row: Mapping[str, Any]) -> list[str]:
        """Count an epoch's row. Returns the rewards that reach CONSTANT_EPOCHS with it."""
        reached = []
        for key, share in row.items():
            name = key.removeprefix("zero_spread/")
            # Text rewards are the same for all rewrites that have nothing wrong.
            if name == key or name in TEXT_REWARDS:
                continue
            self._epochs[name] = self._epochs.get(name, 0) + 1 if share == 1 else 0
            if self._epochs[name] == CONSTANT_EPOCHS:
                reached.append(name)
        return reached
