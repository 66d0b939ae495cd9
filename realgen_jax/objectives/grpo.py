"""Group-relative policy optimisation for flow models: advantages, losses and the accumulated update.

Sources: Flow-GRPO (arXiv 2505.05470), GRPO-Guard (arXiv 2510.22319), RealGen (arXiv 2512.00473).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from realgen_jax.rollout import Trajectory, Velocity, policy_step
from realgen_jax.sde import Steps

Metrics = dict[str, Array]


def group_advantages(
    scores: Mapping[str, np.ndarray],
    weights: Mapping[str, float],
    *,
    global_std: bool,
    eps: float = 1e-4,
) -> np.ndarray:
    """A_k = (r_k - mean of the group) / (std + eps) for each reward k, then sum w_k A_k / sum w_k.

    scores: {reward: [groups, size]}, one group per prompt. The population std is the group's, or with `global_std` that
    of all samples. A group whose spread is only rounding (below 1e-6 of its magnitude) has advantage zero. Returns
    float32 [groups, size]; computed in float64.
    """
    total = np.zeros(next(iter(scores.values())).shape)
    for name, weight in weights.items():
        r = np.asarray(scores[name], np.float64)
        deviation = r - r.mean(axis=1, keepdims=True)
        std = r.std() if global_std else r.std(axis=1, keepdims=True)
        total += (
            weight
            * np.where(zero_spread(r)[:, None], 0.0, deviation)
            / np.maximum(std + eps, 1e-30)
        )
    return (total / sum(weights.values())).astype(np.float32)


def zero_spread(r: np.ndarray) -> np.ndarray:
    """Which groups of r [groups, size] have no spread but rounding: bool [groups]."""
    return r.std(axis=1) <= 1e-6 * np.abs(r).max(axis=1)


@dataclass(frozen=True)
class LossConfig:
    """`loss` and `kl` are keys of LOSSES and KLS; `guard_bias` is "sample" (ours) or "batch" (RealGen's code, D1).

    RealGen averages over one rank's microbatch: "batch" is its number where a rollout call is as small as that.
    """

    loss: str
    kl: str
    beta: float
    clip_range: float
    adv_clip_max: float
    guard_bias: str = "sample"

    def __post_init__(self):
        choices = {"loss": LOSSES, "kl": KLS, "guard_bias": ("sample", "batch")}
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"{field} is {getattr(self, field)!r}; choose one of {', '.join(allowed)}"
                )


def _per_sample(x: Array) -> Array:
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))


def _clipped(log_ratio: Array, advantages: Array, config: LossConfig) -> tuple[Array, Metrics]:
    """PPO's pessimistic objective, mean over the batch of max(-A r, -A clip(r, 1 +- c))."""
    ratio = jnp.exp(log_ratio)
    a = jnp.clip(advantages, -config.adv_clip_max, config.adv_clip_max)
    bounded = jnp.clip(ratio, 1.0 - config.clip_range, 1.0 + config.clip_range)
    loss = jnp.mean(jnp.maximum(-a * ratio, -a * bounded))
    above, below = ratio - 1.0 > config.clip_range, 1.0 - ratio > config.clip_range
    metrics = {
        "clipfrac": jnp.mean(above | below),
        "clipfrac_gt_one": jnp.mean(above),
        "clipfrac_lt_one": jnp.mean(below),
        "ratio_deviation": jnp.max(jnp.abs(ratio - 1.0)),
    }
    return loss, metrics


def _log_prob_difference(mean: Array, mean_old: Array, x_next: Array, std: Array) -> Array:
    """log p_new(x_next) - log p_old(x_next), mean over elements, without subtracting two log-probs: float32 [n].

    The two differ by far less than either's rounding, so the difference of squares is taken first.
    """
    return _per_sample((mean - mean_old) * (2.0 * x_next - mean - mean_old) / (2.0 * std**2))


def grpo_loss(
    mean: Array, mean_old: Array, x_next: Array, step: Steps, advantages: Array, config: LossConfig
) -> tuple[Array, Metrics]:
    """Flow-GRPO: the plain likelihood ratio. mean, mean_old, x_next [n, ...]; advantages [n]; -> scalar, metrics."""
    log_ratio = _log_prob_difference(mean, mean_old, x_next, step.std)
    loss, metrics = _clipped(log_ratio, advantages, config)
    return loss, {**metrics, "approx_kl": 0.5 * jnp.mean(log_ratio**2)}


def guard_loss(
    mean: Array, mean_old: Array, x_next: Array, step: Steps, advantages: Array, config: LossConfig
) -> tuple[Array, Metrics]:
    """GRPO-Guard's normalised ratio: log r = mean(z (mean - mean_old)), z = (x_next - mean_old) / std, and L / dt.

    Equal to std (log-prob difference + bias) with bias = mean((mean - mean_old)^2) / (2 std^2), which centres log r at
    zero and gives every step the same scale. RealGen's code averages the bias over the batch too ("batch").
    """
    shift = mean - mean_old
    log_ratio = _per_sample((x_next - mean_old) / step.std * shift)
    if config.guard_bias == "batch":
        bias = _per_sample(shift**2 / (2.0 * step.std))
        log_ratio = log_ratio + jnp.mean(bias) - bias
    loss, metrics = _clipped(log_ratio, advantages, config)
    difference = _log_prob_difference(mean, mean_old, x_next, step.std)
    return loss / jnp.mean(step.dt), {**metrics, "approx_kl": 0.5 * jnp.mean(difference**2)}


def velocity_kl(v: Array, v_ref: Array, x: Array, step: Steps) -> Array:
    """mean (v - v_ref)^2: the KL up to a factor per step."""
    return jnp.mean((v - v_ref) ** 2)


def mean_kl(v: Array, v_ref: Array, x: Array, step: Steps) -> Array:
    """KL of the two transitions: mean (mean - mean_ref)^2 / (2 std^2)."""
    return jnp.mean((step.mean(x, v) - step.mean(x, v_ref)) ** 2 / (2.0 * step.std**2))


def mean_kl_reference(v: Array, v_ref: Array, x: Array, step: Steps) -> Array:
    """RealGen's flux_fast form, which divides by std^2 / dt instead of the transition's variance (D12)."""
    return mean_kl(v, v_ref, x, step) * jnp.mean(step.dt)


LOSSES = {"grpo": grpo_loss, "guard": guard_loss}
KLS = {"velocity": velocity_kl, "mean": mean_kl, "mean_reference": mean_kl_reference}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything the optimizer moves. trainable: LoRA factors, or the weights; ema of the same shape; step int32 []."""

    trainable: Any
    ema: Any
    opt_state: Any
    step: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """The rollout calls of one optimizer step: leaves [calls, ...]; cond has a row per slot, advantages [calls, n]."""

    trajectory: Trajectory
    cond: Any
    advantages: Array


@dataclass(frozen=True)
class EmaConfig:
    decay: float
    interval: int


def ema_decay(step: Array, decay: float) -> Array:
    """min((1 + n) / (10 + n), decay): a young average forgets its start."""
    return jnp.minimum((1.0 + step) / (10.0 + step), decay)


def ema_update(ema: Any, trainable: Any, step: Array, config: EmaConfig) -> Any:
    """Move the average at every `interval`-th optimizer step; step counts from 0 and is the one just taken."""
    rate = jnp.where((step + 1) % config.interval == 0, 1.0 - ema_decay(step, config.decay), 0.0)
    return jax.tree.map(lambda e, p: e + rate * (p - e), ema, trainable)


def accumulate(
    velocity: Velocity, params: Any, trainable: Any, batch: Batch, config: LossConfig
) -> tuple[Any, Metrics, Array]:
    """Mean loss gradient over every call and window step, its metrics, and the policy's means [calls, w, n, s, c].

    One microbatch is one rollout call at one window step: the batch that was sampled, so that the replayed forward is
    the sampled one bit for bit (activation memory is set by `sample.train_batch_size`, nothing else).
    """

    def loss_fn(trainable, cond, x, x_next, mean_old, step, advantages):
        with jax.named_scope("policy"):
            mean, v = policy_step(velocity, params, trainable, x, step, cond)
        policy_loss, metrics = LOSSES[config.loss](mean, mean_old, x_next, step, advantages, config)
        loss = policy_loss
        if config.beta > 0:
            with jax.named_scope("reference"):
                v_ref = velocity(params, None, x, jnp.broadcast_to(step.sigma, x.shape[:1]), cond)
            v_ref = jax.lax.stop_gradient(v_ref)
            metrics["kl_loss"] = KLS[config.kl](v, v_ref, x, step)
            loss = loss + config.beta * metrics["kl_loss"]
        return loss, ({**metrics, "loss": loss, "policy_loss": policy_loss}, mean)

    def window_step(grads, microbatch, cond, advantages):
        x, x_next, mean_old, step = microbatch
        grad, (metrics, mean) = jax.grad(loss_fn, has_aux=True)(
            trainable, cond, x, x_next, mean_old, step, advantages
        )
        return jax.tree.map(jnp.add, grads, grad), (metrics, mean)

    def call(grads, one: Batch):
        t = one.trajectory
        branches = t.mean.shape[1] // jax.tree.leaves(one.cond)[0].shape[0]
        cond = jax.tree.map(lambda a: jnp.repeat(a, branches, axis=0), one.cond)
        xs = (t.latents[:-1], t.latents[1:], t.mean, t.steps)
        return jax.lax.scan(partial(window_step, cond=cond, advantages=one.advantages), grads, xs)

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trainable)
    grads, (metrics, means) = jax.lax.scan(call, zeros, batch)
    count = means.shape[0] * means.shape[1]
    reduce = {name: jnp.max if name == "ratio_deviation" else jnp.mean for name in metrics}
    return (
        jax.tree.map(lambda g: g / count, grads),
        {k: reduce[k](v) for k, v in metrics.items()},
        means,
    )


@jax.named_scope("update")
def update(
    velocity: Velocity,
    optimizer: optax.GradientTransformation,
    config: LossConfig,
    ema: EmaConfig,
    params: Any,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, Metrics]:
    """One optimizer step. Metrics: means over the microbatches, the largest |ratio - 1|, and the norms (L2, of all
    trained weights together) of gradient, step and weights.
    """
    grads, metrics, _ = accumulate(velocity, params, state.trainable, batch, config)
    with jax.named_scope("optimizer"):
        metrics["grad_norm"] = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        metrics |= {
            "update_norm": optax.tree.norm(updates),
            "param_norm": optax.tree.norm(state.trainable),
        }
        trainable = optax.apply_updates(state.trainable, updates)
        averaged = ema_update(state.ema, trainable, state.step, ema)
    return TrainState(trainable, averaged, opt_state, state.step + 1), metrics


@jax.named_scope("recompute")
def recompute_means(
    velocity: Velocity, config: LossConfig, params: Any, trainable: Any, batch: Batch
) -> Batch:
    """The batch with the means of the update's own program in place of the rollout's (`train.recompute_old`).

    For hardware that picks other kernels in the two programs. The gradient is computed as well: without it the
    compiler would build a third program, and its means would agree with neither.
    """
    grads, _, means = accumulate(velocity, params, trainable, batch, config)
    means, _ = jax.lax.optimization_barrier((means, grads))
    trajectory = Trajectory(
        batch.trajectory.latents, means, batch.trajectory.logp, batch.trajectory.steps
    )
    return Batch(trajectory, batch.cond, batch.advantages)


def make_optimizer(
    learning_rate: float,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    max_grad_norm: float,
):
    """Global-norm clipping, then AdamW with decoupled decay, as torch's AdamW."""
    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay),
    )
