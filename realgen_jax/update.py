"""The optimizer step: gradient of an objective, clipping, AdamW and the moving average (EMA)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import Array

from realgen_jax.rollout import Velocity

Metrics = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that training moves.

    trainable: LoRA factors, or the weights. ema: their moving average, of the same shape.
    opt_state: the optimizer's. step: int32 [], optimizer steps taken. old: a second set of
    trainable arrays for objectives with an old policy, else None.
    """

    trainable: Any
    ema: Any
    opt_state: Any
    step: Array
    old: Any = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """The rollout calls of one optimizer step; every leaf is [calls, ...].

    record: what the objective keeps of a rollout. cond: a row a slot. advantages: [calls, n].
    """

    record: Any
    cond: Any
    advantages: Array


class Objective(Protocol):
    """What is optimised (realgen_jax/objectives). `velocity` is (trainable, x, sigma, cond) -> v.

    coupled: whether the gradient replays what was sampled, which only an exact rollout allows.
    largest_metrics: names of metrics whose largest value counts, where others are averaged.
    """

    coupled: bool
    largest_metrics: tuple[str, ...]

    def make_plan(self, sigmas: Any) -> Any:
        """How a rollout runs on a schedule, float32 [steps + 1]; with draw(key) for each call."""

    def draw_noise(self, key: Array, plan: Any, images: int, token_shape: tuple[int, int]) -> Any:
        """The noise of one call beside its first latents; leaves have the images on axis 1."""

    def collect(
        self, velocity: Velocity, trainable: Any, cond: Any, latents: Array, noise: Any, plan: Any
    ) -> tuple[Array, Any]:
        """Sample one call: (final latents float32 [n, s, c], what the gradient needs of it)."""

    def gradient(self, velocity: Velocity, state: TrainState, batch: Batch) -> tuple[Any, Metrics]:
        """The mean gradient over a batch, as float32 arrays like `state.trainable`, and metrics."""

    def after_epoch(self, state: TrainState) -> TrainState:
        """The state after an epoch's optimizer steps: an old policy moves here."""


@dataclass(frozen=True)
class EmaConfig:
    """The average moves at every `interval`-th step with a rate of at least 1 - `decay`."""

    decay: float
    interval: int


def ema_decay(step: Array, decay: float) -> Array:
    """min((1 + n) / (10 + n), decay): a young average forgets its start."""
    return jnp.minimum((1.0 + step) / (10.0 + step), decay)


def ema_update(ema: Any, trainable: Any, step: Array, config: EmaConfig) -> Any:
    """Move the average; `step` counts from 0 and is the optimizer step just taken."""
    moves = (step + 1) % config.interval == 0
    rate = jnp.where(moves, 1.0 - ema_decay(step, config.decay), 0.0)
    return jax.tree.map(lambda average, new: average + rate * (new - average), ema, trainable)


def make_optimizer(
    learning_rate: float,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    max_grad_norm: float,
) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW with decoupled decay, as torch's AdamW."""
    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay),
    )


@jax.named_scope("update")
def update(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    ema: EmaConfig,
    velocity: Velocity,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, Metrics]:
    """One optimizer step.

    The metrics are the objective's and the norms (L2, of all trained arrays together) of gradient,
    step and weights.
    """
    grads, metrics = objective.gradient(velocity, state, batch)

    with jax.named_scope("optimizer"):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        norms = {
            "grad_norm": optax.tree.norm(grads),
            "update_norm": optax.tree.norm(updates),
            "param_norm": optax.tree.norm(state.trainable),
        }
        trainable = optax.apply_updates(state.trainable, updates)
        averaged = ema_update(state.ema, trainable, state.step, ema)

    state = TrainState(trainable, averaged, opt_state, state.step + 1, state.old)
    return state, {**metrics, **norms}


def reduce_metrics(metrics: Mapping[str, Array], largest: tuple[str, ...]) -> Metrics:
    """One number a metric: its mean, or for names in `largest` its largest value."""
    reduced = {}
    for name, values in metrics.items():
        reduced[name] = jnp.max(values) if name in largest else jnp.mean(values)
    return reduced
