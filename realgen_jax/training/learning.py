"""Rewards that learn during a run: when they learn, and their state in checkpoints."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

from realgen_jax.checkpoint import Checkpoints, RestoreError
from realgen_jax.hosts import process_index
from realgen_jax.training.scoring import BatchScores, Pending, Scorer


class LearningReward(Protocol):
    """The interface of a reward that learns; reward_bridge.adversary.Adversary implements it."""

    settings: Any  # the values of config.reward.adversarial.NAME

    def due(self, epoch: int, generated: float, references: float) -> bool:
        """Return whether it should learn in this epoch, by its schedule and the mean scores."""

    def forget(self) -> None:
        """Drop the pairs that were observed in this epoch."""

    def state(self) -> bytes:
        """Return the state to store in a checkpoint."""

    def restore(self, state: bytes, with_history: bool) -> None:
        """Restore a state from a checkpoint. Raises ValueError for another reward's state."""


@dataclass(frozen=True)
class Learning:
    """An epoch's learning: pending metrics, and whether the generator's update is skipped."""

    pending: Pending
    generator_rests: bool

    def result(self) -> dict[str, float]:
        """Wait for the metrics, {"learning/REWARD/METRIC": value}."""
        metrics = {}
        for name, values in self.pending.result().items():
            for key, value in values.items():
                metrics[f"learning/{name}/{key}"] = value
        return metrics


def draw_seeds(key: jax.Array, epoch: int, count: int) -> list[int]:
    """Draw `count` integers below 2^32 for an epoch, different in every process."""
    key = jax.random.fold_in(jax.random.fold_in(key, epoch), process_index())
    return np.asarray(jax.random.bits(key, (count,))).tolist()


def begin_learning(
    scorer: Scorer,
    rewards: Mapping[str, LearningReward],
    epoch: int,
    scores: BatchScores,
    seeds: Sequence[int],
) -> Learning:
    """Start the learning of rewards that are due by the epoch's scores. seeds: one per reward."""
    generated = scores.means()
    references = scores.reference_means()
    chosen = {}
    for (name, reward), seed in zip(rewards.items(), seeds, strict=True):
        if reward.due(epoch, generated[name], references[name]):
            chosen[name] = seed
        else:
            reward.forget()
    deadlines = {name: rewards[name].settings.deadline for name in chosen}
    rests = any(rewards[name].settings.skip_generator for name in chosen)
    return Learning(scorer.learn(chosen, deadlines), rests)


def files(rewards: Mapping[str, LearningReward]) -> dict[str, bytes]:
    """Return checkpoint files of the rewards that learn: one per reward and process."""
    return {_file(name, process_index()): reward.state() for name, reward in rewards.items()}


def restore(
    rewards: Mapping[str, LearningReward],
    checkpoints: Checkpoints,
    epoch: int,
    warn: Callable[[str], None],
) -> None:
    """Restore the rewards that learn from a checkpoint.

    Processes added since then start with an empty history. Raises RestoreError if the checkpoint
    lacks the state of one of these rewards.
    """
    for name, reward in rewards.items():
        own = checkpoints.read(epoch, _file(name, process_index()))
        state = own if own is not None else checkpoints.read(epoch, _file(name, 0))
        if state is None:
            raise RestoreError(
                f"checkpoint {epoch} holds no state of the reward {name!r}: "
                "it did not learn in that run"
            )
        try:
            reward.restore(state, with_history=own is not None)
        except ValueError as error:
            raise RestoreError(f"checkpoint {epoch}: {error}") from error
        if own is None:
            warn(f"{name} had fewer replicas before: this new one starts without a history")


def _file(name: str, process: int) -> str:
    return f"rewards/{name}-{process}.safetensors"
