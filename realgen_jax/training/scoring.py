"""Scoring: each process scores its own pictures, and all processes get all scores."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

from realgen_jax.advantages import weight_sum
from realgen_jax.hosts import local_rows, sum_over_processes


class Scores(Protocol):
    """{reward: float32 [n]} of a batch, and of the references drawn for it."""

    rewards: dict[str, np.ndarray]
    references: dict[str, np.ndarray]


class Pending(Protocol):
    """A result that is being computed in another thread."""

    def result(self) -> Any:
        """Wait for the result. Raises the error of a reward that failed."""

    def raise_if_failed(self) -> None:
        """Raise as `result` does, but without waiting."""


class Scorer(Protocol):
    """The interface of a run's rewards; reward_bridge.bridge.RewardBridge implements it.

    seconds: {reward: seconds of scoring so far}. batch_sizes: {reward: pictures per batch, 0 for
    all}; a size is halved if the reward runs out of memory. refused: {reward: pictures that its
    model refused so far}, of the rewards that count them.
    """

    seconds: dict[str, float]
    batch_sizes: dict[str, int]
    refused: dict[str, int]

    def submit(
        self,
        images: jax.Array,
        prompts: Sequence[str],
        only: Sequence[str] | None = None,
        observe: int | None = None,
        group: int = 1,
    ) -> Pending:
        """Score uint8 [n, 3, h, w] in the background; the result is Scores.

        only: the rewards to run (default: all). observe: rewards that learn keep the batch and
        references drawn with this seed, which they score too. group: consecutive pictures of one
        prompt, which some rewards compare with each other.
        """

    def learn(self, seeds: Mapping[str, int], deadlines: Mapping[str, float]) -> Pending:
        """Update rewards that learn; the result is {reward: its metrics}."""

    def close(self) -> None:
        """Stop scoring."""


class ScoringError(RuntimeError):
    """A reward failed on a picture, or in another process. The message says which."""


@dataclass(frozen=True)
class PendingBatch:
    """A submitted batch, and the rows of it that this process scores, int [m]."""

    pending: Pending
    rows: np.ndarray


@dataclass(frozen=True)
class BatchScores:
    """The concatenated scores of several batches: {reward: float32 [batches x images]}."""

    rewards: dict[str, np.ndarray]
    references: dict[str, np.ndarray]

    def grouped(self, names: Iterable[str], size: int) -> dict[str, np.ndarray]:
        """{reward: [groups, size]} of these rewards; a group is the pictures of one prompt."""
        return {name: self.rewards[name].reshape(-1, size) for name in names}

    def means(self) -> dict[str, float]:
        """{reward: mean score}."""
        return {name: float(values.mean()) for name, values in self.rewards.items()}

    def reference_means(self) -> dict[str, float]:
        """{reward: mean score of its reference pictures}, for rewards that learn."""
        return {name: float(values.mean()) for name, values in self.references.items()}


def submit(
    scorer: Scorer,
    images: jax.Array,
    prompts: Sequence[str],
    only: Sequence[str] | None = None,
    observe: int | None = None,
    group: int = 1,
) -> PendingBatch:
    """Start scoring this process's rows of a batch.

    images: uint8 [n, 3, h, w], sharded over the mesh; prompts: one for each of the n rows. The rest
    is as for `Scorer.submit`.
    """
    rows = local_rows(images)
    own_prompts = [prompts[row] for row in rows]
    return PendingBatch(scorer.submit(images, own_prompts, only, observe, group), rows)


def scores_of_all(batches: Sequence[PendingBatch], images: int) -> BatchScores:
    """Gather the scores of all processes; each batch has `images` rows.

    If a reward failed in one process, that process raises the reward's error and all others raise
    ScoringError.
    """
    results = []
    failure = None
    try:
        for batch in batches:
            results.append(batch.pending.result())
    except Exception as error:
        failure = error

    # All processes learn of a failure before any of them waits for the others' scores.
    failures = sum_over_processes(np.int32([failure is not None]))[0]
    if failure is not None:
        raise failure
    if failures:
        raise ScoringError(
            f"a reward failed in {failures} other processes; their output says which and why"
        )

    rows = [batch.rows for batch in batches]
    return BatchScores(
        rewards=_all_rows([result.rewards for result in results], rows, images),
        references=_all_rows([result.references for result in results], rows, images),
    )


def _all_rows(
    results: Sequence[Mapping[str, np.ndarray]], rows: Sequence[np.ndarray], images: int
) -> dict[str, np.ndarray]:
    """Gather {reward: float32 [batches x images]} from the rows of each process."""
    scores = {}
    for name in results[0]:
        whole = np.zeros((len(results), images), np.float32)
        for number, result in enumerate(results):
            whole[number, rows[number]] = result[name]
        scores[name] = sum_over_processes(whole).ravel()
    return scores


def weighted_mean(scores: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """Return each picture's sum w_k r_k / sum |w_k| over the trained rewards k."""
    total = sum(weight * scores[name] for name, weight in weights.items())
    return total / weight_sum(weights)
