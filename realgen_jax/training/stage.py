"""What differs between the stages of a recipe; scripts/train.py has the loop that they share.

config.stage names one: `diffusion` trains the image model, `rewriter` a language model that
rewrites prompts for it. STAGES in training/stages.py has both.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax import Array

from realgen_jax.hosts import process_count
from realgen_jax.training.log import NoLog, RunLog
from realgen_jax.training.preemption import Preemption
from realgen_jax.training.run import Run
from realgen_jax.training.saving import stop_if_not_finite
from realgen_jax.training.scoring import BatchScores, PendingBatch
from realgen_jax.update import TrainState


@dataclass(frozen=True)
class Call:
    """One call of the image model in an epoch, whose pictures are being scored.

    scores: the pending scores. finite: bool [], whether all latents are finite.
    """

    scores: PendingBatch
    finite: Array


@dataclass(frozen=True)
class Sampled:
    """An epoch's pictures.

    calls: in order. own: what the stage keeps for its update.
    """

    calls: Sequence[Call]
    own: Any


@dataclass(frozen=True)
class Drawn:
    """What an evaluation draws for each of its prompts.

    texts: the text to draw. cache: has their embeddings, as a TextCache. trainable: the trained
    arrays of the image model, or None for the base model. scores: {reward: float32 [n]} of the
    texts. details: further values for metrics.jsonl. own: what the stage keeps for its records.
    """

    texts: Sequence[str]
    cache: Any
    trainable: Any
    scores: Mapping[str, np.ndarray] = field(default_factory=dict)
    details: Mapping[str, float] = field(default_factory=dict)
    own: Any = None


class Stage(Protocol):
    """The parts of a run that are the stage's own.

    prompts: of an epoch. output: the folder of the trained weights, in the run's folder. evaluate:
    the image model's sampler, as Model.sampler returns it.
    """

    prompts: int
    output: str
    evaluate: Any

    def sample(
        self,
        state: TrainState,
        epoch: int,
        rows: np.ndarray,
        seeds: Sequence[int],
        preemption: Preemption,
        seconds: dict[str, float],
    ) -> Sampled | None:
        """Sample an epoch's pictures of the prompts in these rows, int [prompts].

        seeds: one per call, for the references of rewards that learn. The time of each phase goes
        to `seconds`. Returns None if a signal arrived in the meantime.
        """

    def groups(self, sampled: Sampled, scores: BatchScores) -> dict[str, np.ndarray]:
        """Return {reward: [prompts, group]}, of which the members of a group are compared."""

    def columns(
        self,
        state: TrainState,
        epoch: int,
        sampled: Sampled,
        reward: np.ndarray,
        log: RunLog | NoLog,
        history: dict[str, Any],
        first: bool,
    ) -> dict[str, float]:
        """Return the epoch's columns that only this stage has; called before the update.

        reward: the weighted mean of the rewards, [prompts, group]. history: of the run, which
        checkpoints hold. first: whether this is the first epoch of this process.
        """

    def update(
        self,
        state: TrainState,
        sampled: Sampled,
        advantages: np.ndarray,
        kl_weights: np.ndarray | None,
        epoch: int,
    ) -> tuple[TrainState, list[dict[str, np.ndarray]]]:
        """Take the epoch's optimizer steps; return the new state and the metrics of each step.

        advantages: float32 [prompts, group]. kl_weights: of the KL, the same shape, or None. Raises
        FloatingPointError if a metric is not finite.
        """

    def draw(self, trainable: Any, prompts: Sequence[str]) -> Drawn:
        """Return what an evaluation draws for these prompts, which may repeat."""

    def after_evaluation(self, epoch: int, trainable: Any, evaluation: Any) -> dict[str, float]:
        """Record what only this stage knows of an evaluation; return further figures."""

    def export(self, folder: Path, trainable: Any) -> None:
        """Write the trained weights. All processes must call this; the first one writes."""


def epoch_rewards(reward: Any) -> list[str]:
    """The rewards that score an epoch's pictures; reward: config.reward."""
    return list(dict.fromkeys([*reward.fn, *reward.watched]))


def optimizer_steps(
    run: Run, update: Callable, model: Any, state: TrainState, batches: Sequence[Any], epoch: int
) -> tuple[TrainState, list[dict[str, np.ndarray]]]:
    """Take a step on each batch, num_inner_epochs times; return the state and each step's metrics.

    update(model, state, batch) -> (state, metrics). Raises FloatingPointError if a metric is not
    finite.
    """
    metrics = []
    for _ in range(run.config.train.num_inner_epochs):
        for batch in batches:
            state, step_metrics = update(model, state, batch)
            metrics.append(step_metrics)
    metrics = jax.device_get(metrics)
    for step_metrics in metrics:
        stop_if_not_finite(step_metrics, epoch, "update", run)
    return run.recipe.objective.after_epoch(state), metrics


def wait_for(calls: Sequence[Call], preemption: Preemption) -> bool:
    """Wait until all calls are sampled. Returns whether a signal arrived in the meantime.

    A failed reward raises its error as soon as it fails. With several processes, both are decided
    later, at a point where all of them agree.
    """
    for call in calls:
        jax.block_until_ready(call.finite)
        if process_count() == 1:
            call.scores.pending.raise_if_failed()
            if preemption.wanted():
                return True
    return False


def finite_latents(calls: Sequence[Call]) -> dict[str, float]:
    """Return {"latents": 0}, with NaN instead of 0 if any call's final latents are not finite."""
    finite = all(call.finite for call in calls)
    return {"latents": 0.0 if finite else float("nan")}
