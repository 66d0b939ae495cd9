"""A batch's scores: every process scores its own pictures, and all of them get all the scores."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from realgen_jax.hosts import local_rows, sum_over_processes
from realgen_jax.training.run import Run
from reward_bridge.bridge import PendingScores, RewardError

Pending = tuple[
    PendingScores, np.ndarray
]  # a batch's scores, and which rows of it this process scores


def submit(
    run: Run,
    images: jax.Array,
    texts: Sequence[str],
    only: Sequence[str] | None = None,
    observe: int | None = None,
) -> Pending:
    """Have this process's rows of a batch scored; texts has one for every row. `observe`: as the bridge's."""
    rows = local_rows(images)
    return run.bridge.submit(images, [texts[i] for i in rows], only, observe), rows


def scores_of_all(pending: Sequence[Pending], images: int) -> dict[str, np.ndarray]:
    """{reward: float32 [batches x images]}, every process's rows put together. A reward that failed in one process
    ends them all.
    """
    found, failure = [], None
    try:
        found = [one.result() for one, _ in pending]
    except RewardError as error:
        failure = error
    failures = sum_over_processes(np.int32([failure is not None]))[0]
    if failures:
        raise failure or RewardError(
            f"a reward failed in {failures} other processes; their output says which and why"
        )
    scores = {}
    for name in found[0]:
        whole = np.zeros((len(found), images), np.float32)
        for batch, one, (_, rows) in zip(whole, found, pending, strict=True):
            batch[rows] = one[name]
        scores[name] = sum_over_processes(whole).ravel()
    return scores


def weighted_mean(scores: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """The trained rewards' weighted mean, picture by picture."""
    return sum(weight * scores[name] for name, weight in weights.items()) / sum(weights.values())
