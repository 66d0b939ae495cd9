"""Scores of a batch: every process scores its own pictures, and all of them get all scores."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

from realgen_jax.hosts import local_rows, sum_over_processes


class Scores(Protocol):
    """{reward: float32 [n]} of a batch, and of the references drawn for it."""

    rewards: dict[str, np.ndarray]
    references: dict[str, np.ndarray]


class Pending(Protocol):
    """What is being computed in another thread."""

    def result(self) -> Any:
        """Wait for it; raises the error of the reward that failed."""

    def raise_if_failed(self) -> None:
        """As `result`, without waiting."""


class Scorer(Protocol):
    """What a run sees of its rewards; reward_bridge.bridge.RewardBridge is one.

    seconds: {reward: seconds of scoring so far}. batch_sizes: {reward: pictures that it sees at
    once, 0 for all}, which halve where memory runs out.
    """

    seconds: dict[str, float]
    batch_sizes: dict[str, int]

    def submit(
        self,
        images: jax.Array,
        prompts: Sequence[str],
        only: Sequence[str] | None = None,
        observe: int | None = None,
    ) -> Pending:
        """Score uint8 [n, 3, h, w] in the background; the result is Scores.

        only: the rewards to run (default: all). observe: have rewards that learn keep the batch,
        beside references drawn with this seed, which they score too.
        """

    def learn(self, seeds: Mapping[str, int], deadlines: Mapping[str, float]) -> Pending:
        """Have rewards update themselves; the result is {reward: its metrics}."""

    def close(self) -> None:
        """Score nothing more."""


class ScoringError(RuntimeError):
    """A reward failed on a picture, or in another process. The message says which."""


@dataclass(frozen=True)
class PendingBatch:
    """A submitted batch, and the rows of it that this process scores, int [m]."""

    pending: Pending
    rows: np.ndarray


@dataclass(frozen=True)
class BatchScores:
    """The scores of several batches in a row: {reward: float32 [batches x images]}."""

    rewards: dict[str, np.ndarray]
    references: dict[str, np.ndarray]

    def grouped(self, names: Iterable[str], size: int) -> dict[str, np.ndarray]:
        """{reward: [groups, size]} of these rewards; a group is the pictures of one prompt."""
        return {name: self.rewards[name].reshape(-1, size) for name in names}

    def means(self) -> dict[str, float]:
        """{reward: mean score}."""
        return {name: float(values.mean()) for name, values in self.rewards.items()}

    def reference_means(self) -> dict[str, float]:
        """{reward: mean score of its reference pictures}, of those that learn."""
        return {name: float(values.mean()) for name, values in self.references.items()}


def submit(
    scorer: Scorer,
    images: jax.Array,
    prompts: Sequence[str],
    only: Sequence[str] | None = None,
    observe: int | None = None,
) -> PendingBatch:
    """Have this process's rows of a batch scored.

    images: uint8 [n, 3, h, w], spread over the mesh; prompts: one for each of the n rows.
    """
    rows = local_rows(images)
    own_prompts = [prompts[row] for row in rows]
    return PendingBatch(scorer.submit(images, own_prompts, only, observe), rows)


def scores_of_all(batches: Sequence[PendingBatch], images: int) -> BatchScores:
    """Every process's scores put together; each batch has `images` rows.

    A reward that failed in one process ends them all: its error is raised here, ScoringError in
    the other processes.
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
    """{reward: float32 [batches x images]} from the rows that each process has."""
    scores = {}
    for name in results[0]:
        whole = np.zeros((len(results), images), np.float32)
        for number, result in enumerate(results):
            whole[number, rows[number]] = result[name]
        scores[name] = sum_over_processes(whole).ravel()
    return scores


def weighted_mean(scores: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """The weighted mean of the trained rewards, picture by picture."""
    total = sum(weight * scores[name] for name, weight in weights.items())
    return total / sum(weights.values())
