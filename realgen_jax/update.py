"""The optimizer step: gradient of an objective, clipping, AdamW and the moving average (EMA)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import Array

from realgen_jax.rollout import Velocity
from realgen_jax.sharding import is_on_host, to_device

Metrics = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that training changes.

    trainable: LoRA factors, or the weights. ema: their moving average, with the same structure.
    opt_state: the optimizer's state. step: int32 [], optimizer steps taken. old: a second set of
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

    record: the objective's record of a rollout. cond: one row per slot. advantages: [calls, n].
    kl_weights: [calls, n], of each picture's KL to the base model; None: all are 1.
    """

    record: Any
    cond: Any
    advantages: Array
    kl_weights: Array | None = None


@dataclass(frozen=True)
class UpdateWork:
    """What an objective costs, for preflight's formulas.

    recorded: steps with noise that the rollout records. trained: steps, or noise levels, of a
    picture that have a gradient. frozen: forward passes without gradient at each of these.
    """

    recorded: int
    trained: int
    frozen: int


class Objective(Protocol):
    """The objective (realgen_jax/objectives).

    `policy` is what it trains: of an image model velocity(trainable, x, sigma, cond) -> v, of a
    language model the model itself (token_grpo.py).

    coupled: whether the gradient replays the sampled steps, which requires an exact rollout.
    keeps_old: whether the state has an old policy, `state.old`, which starts as the trained one.
    largest_metrics: names of metrics that are reduced by maximum; all others are averaged.
    """

    coupled: bool
    keeps_old: bool
    largest_metrics: tuple[str, ...]
    work: UpdateWork

    def make_plan(self, sigmas: Any) -> Any:
        """Return the rollout plan for sigmas, float32 [steps + 1].

        A call of an epoch uses plan.draw(key, epoch).
        """

    def rollout_policy(self, state: TrainState) -> Any:
        """Return the trained arrays that rollouts use: `state.trainable` or `state.old`."""

    def draw_noise(self, key: Array, plan: Any, images: int, token_shape: tuple[int, int]) -> Any:
        """Draw a call's noise other than the initial latents; leaves have images on axis 1."""

    def collect(
        self, velocity: Velocity, trainable: Any, cond: Any, latents: Array, noise: Any, plan: Any
    ) -> tuple[Array, Any]:
        """Sample one call: (final latents float32 [n, s, c], the record for the gradient)."""

    def gradient(self, policy: Any, state: TrainState, batch: Any) -> tuple[Any, Metrics]:
        """The mean gradient over a batch, as float32 arrays like `state.trainable`, and metrics."""

    def after_epoch(self, state: TrainState) -> TrainState:
        """Return the state after an epoch's optimizer steps; an old policy is updated here."""


@dataclass(frozen=True)
class EmaConfig:
    """The average is updated every `interval` steps with a rate of at least 1 - `decay`."""

    decay: float
    interval: int


def ema_decay(step: Array, decay: float) -> Array:
    """Return min((1 + step) / (10 + step), decay), so that the average soon forgets its start."""
    return jnp.minimum((1.0 + step) / (10.0 + step), decay)


def ema_update(ema: Any, trainable: Any, step: Array, config: EmaConfig) -> Any:
    """Update the average; `step` is the optimizer step just taken, counted from 0."""
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
    """Global-norm clipping, then AdamW with decoupled weight decay, as in torch's AdamW."""
    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay),
    )


@jax.named_scope("update")
def update(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    ema: EmaConfig,
    policy: Any,
    state: TrainState,
    batch: Any,
) -> tuple[TrainState, Metrics]:
    """Take one optimizer step. policy, batch: what the objective takes.

    The metrics are the objective's, plus the global L2 norms of gradient, step and weights.
    """
    grads, metrics = objective.gradient(policy, state, batch)

    with jax.named_scope("optimizer"):
        grads, (opt_state, average) = _from_host(grads, (state.opt_state, state.ema))
        updates, opt_state = optimizer.update(grads, opt_state, state.trainable)
        norms = {
            "grad_norm": optax.tree.norm(grads),
            "update_norm": optax.tree.norm(updates),
            "param_norm": optax.tree.norm(state.trainable),
        }
        trainable = optax.apply_updates(state.trainable, updates)
        averaged = ema_update(average, trainable, state.step, ema)

    state = TrainState(trainable, averaged, opt_state, state.step + 1, state.old)
    return state, {**metrics, **norms}


def _from_host(grads: Any, tree: Any) -> tuple[Any, Any]:
    """Return the gradient, and a tree of which parts may be in host memory, on the devices.

    Without the barrier, XLA would copy the tree before the gradient is computed, when memory is
    short.
    """
    if not any(map(is_on_host, jax.tree.leaves(tree))):
        return grads, tree
    grads, tree = jax.lax.optimization_barrier((grads, tree))
    return grads, to_device(tree)


def reduce_metrics(metrics: Mapping[str, Array], largest: tuple[str, ...]) -> Metrics:
    """Reduce each metric to one number: its mean, or its maximum for names in `largest`."""
    reduced = {}
    for name, values in metrics.items():
        reduced[name] = jnp.max(values) if name in largest else jnp.mean(values)
    return reduced
