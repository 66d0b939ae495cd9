"""Group-relative policy optimisation of flow models: Flow-GRPO and GRPO-Guard.

Sources: Flow-GRPO (arXiv 2505.05470), GRPO-Guard (arXiv 2510.22319), RealGen (arXiv 2512.00473).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from realgen_jax.objectives.reference import (
    Reference,
    make_reference,
    reference_penalty,
    weighted_kl,
)
from realgen_jax.objectives.velocities import per_sample
from realgen_jax.rollout import Plan, Trajectory, Velocity, make_plan, policy_step, rollout
from realgen_jax.sde import Steps
from realgen_jax.update import Batch, Metrics, TrainState, UpdateWork, reduce_metrics
from realgen_jax.windows import DRAWN, Moves


@dataclass(frozen=True)
class LossConfig:
    """Hyperparameters of the loss.

    clip_range: c of the clip 1 +- c. adv_clip_max: largest absolute advantage. guard_bias: "sample"
    (ours), or "batch" as in RealGen's code, which averages over one rank's microbatch and so needs
    a rollout call of that size.
    """

    clip_range: float
    adv_clip_max: float
    guard_bias: str = "sample"


# -- Losses: (mean, mean_old, x_next [n, ...], step, advantages [n], config) -> loss [], metrics.


def grpo_loss(
    mean: Array, mean_old: Array, x_next: Array, step: Steps, advantages: Array, config: LossConfig
) -> tuple[Array, Metrics]:
    """Flow-GRPO: the plain likelihood ratio of the step mean -> x_next (arXiv 2505.05470, eq. 5).

    Raises ValueError if the shapes do not match.
    """
    check_shapes(mean, mean_old, x_next, advantages)
    log_ratio = log_prob_difference(mean, mean_old, x_next, step.std)
    loss, metrics = _clipped(log_ratio, advantages, config)
    return loss, {**metrics, "approx_kl": 0.5 * jnp.mean(log_ratio**2)}


def guard_loss(
    mean: Array, mean_old: Array, x_next: Array, step: Steps, advantages: Array, config: LossConfig
) -> tuple[Array, Metrics]:
    """GRPO-Guard: log r = mean(z (mean - mean_old)), z = (x_next - mean_old) / std, and L / dt.

    This is std (log-prob difference + bias) with bias = mean((mean - mean_old)^2) / (2 std^2),
    which centres log r at zero and gives every step the same scale (arXiv 2510.22319). RealGen's
    code also averages the bias over the batch (`guard_bias` "batch"). Raises as `grpo_loss` does.
    """
    check_shapes(mean, mean_old, x_next, advantages)
    shift = mean - mean_old
    log_ratio = per_sample((x_next - mean_old) / step.std * shift)
    if config.guard_bias == "batch":
        bias = per_sample(shift**2 / (2.0 * step.std))
        log_ratio = log_ratio + jnp.mean(bias) - bias

    loss, metrics = _clipped(log_ratio, advantages, config)
    difference = log_prob_difference(mean, mean_old, x_next, step.std)
    return loss / jnp.mean(step.dt), {**metrics, "approx_kl": 0.5 * jnp.mean(difference**2)}


def check_shapes(mean: Array, mean_old: Array, x_next: Array, advantages: Array) -> None:
    """Raise ValueError for shapes that would broadcast silently."""
    if not mean.shape == mean_old.shape == x_next.shape:
        raise ValueError(
            f"mean {mean.shape}, mean_old {mean_old.shape} and x_next {x_next.shape} "
            "must have the same shape"
        )
    if advantages.shape != mean.shape[:1]:
        raise ValueError(
            f"advantages have shape {advantages.shape}; expected one per sample, {mean.shape[:1]}"
        )


def log_prob_difference(mean: Array, mean_old: Array, x_next: Array, std: Array) -> Array:
    """log p_new(x_next) - log p_old(x_next), mean over elements: float32 [n].

    The two differ by far less than the rounding error of either, so the difference of squares is
    factored instead of subtracting two log-probs.
    """
    return per_sample((mean - mean_old) * (2.0 * x_next - mean - mean_old) / (2.0 * std**2))


def _clipped(log_ratio: Array, advantages: Array, config: LossConfig) -> tuple[Array, Metrics]:
    """PPO's pessimistic objective (arXiv 1707.06347): mean of max(-A r, -A clip(r, 1 +- c))."""
    ratio = jnp.exp(log_ratio)
    a = jnp.clip(advantages, -config.adv_clip_max, config.adv_clip_max)
    bounded = jnp.clip(ratio, 1.0 - config.clip_range, 1.0 + config.clip_range)
    loss = jnp.mean(jnp.maximum(-a * ratio, -a * bounded))

    above = ratio - 1.0 > config.clip_range
    below = 1.0 - ratio > config.clip_range
    metrics = {
        "clipfrac": jnp.mean(above | below),
        "clipfrac_gt_one": jnp.mean(above),
        "clipfrac_lt_one": jnp.mean(below),
        "ratio_deviation": jnp.max(jnp.abs(ratio - 1.0)),
    }
    return loss, metrics


# -- KL to the base model: (v, v_ref, x [n, ...], step, weights of the samples [n] or None) -> [].


def velocity_kl(
    v: Array, v_ref: Array, x: Array, step: Steps, weights: Array | None = None
) -> Array:
    """mean (v - v_ref)^2: the KL up to a factor that depends on the step."""
    return weighted_kl((v - v_ref) ** 2, weights)


def mean_kl(v: Array, v_ref: Array, x: Array, step: Steps, weights: Array | None = None) -> Array:
    """KL of the two transitions: mean (mean - mean_ref)^2 / (2 std^2)."""
    squares = (step.mean(x, v) - step.mean(x, v_ref)) ** 2
    return weighted_kl(squares / (2.0 * step.std**2), weights)


def mean_kl_reference(
    v: Array, v_ref: Array, x: Array, step: Steps, weights: Array | None = None
) -> Array:
    """RealGen's flux_fast form: it divides by std^2 / dt instead of the transition's variance."""
    return mean_kl(v, v_ref, x, step, weights) * jnp.mean(step.dt)


KLS = {"velocity": velocity_kl, "mean": mean_kl, "mean_reference": mean_kl_reference}


# -- The objective.


@dataclass(frozen=True)
class Grpo:
    """Records an SDE window during sampling; the update replays it to get the policy ratio.

    loss: grpo_loss or guard_loss. config: what the loss takes. kl: one of KLS. reference: what
    holds the policy to the base model. The other fields are those of `make_plan`.
    """

    loss: Callable[..., tuple[Array, Metrics]]
    kl: Callable[..., Array]
    config: Any
    reference: Reference
    sde_type: str
    noise_level: float
    window: int
    window_range: tuple[int, int]
    branches: int
    moves: Moves = DRAWN
    trained_steps: int = 0
    after: float = 0.0
    noise_schedule: str = "constant"
    noise_least: float = 0.0

    coupled = True
    keeps_old = False
    largest_metrics = ("ratio_deviation",)

    def make_plan(self, sigmas: np.ndarray) -> Plan:
        return make_plan(
            sigmas,
            kind=self.sde_type,
            noise_level=self.noise_level,
            noise_schedule=self.noise_schedule,
            noise_least=self.noise_least,
            window=self.window,
            bounds=self.window_range,
            branches=self.branches,
            moves=self.moves,
            trained=self.trained_steps,
            after=self.after,
        )

    def rollout_policy(self, state: TrainState) -> Any:
        return state.trainable

    def draw_noise(
        self, key: Array, plan: Plan, images: int, token_shape: tuple[int, int]
    ) -> Array:
        """The window's noise, float32 [w, n, s, c]."""
        return jax.random.normal(key, (self.window, images, *token_shape))

    def collect(
        self,
        velocity: Velocity,
        trainable: Any,
        cond: Any,
        latents: Array,
        noise: Array,
        plan: Plan,
    ) -> tuple[Array, Trajectory]:
        return rollout(partial(velocity, trainable), cond, latents, noise, plan)

    def gradient(self, velocity: Velocity, state: TrainState, batch: Batch) -> tuple[Any, Metrics]:
        grads, metrics, _ = self._accumulate(velocity, state.trainable, batch)
        return grads, metrics

    def after_epoch(self, state: TrainState) -> TrainState:
        return state

    @property
    def work(self) -> UpdateWork:
        return UpdateWork(
            recorded=self.window,
            trained=self.trained_steps or self.window,
            frozen=int(self.reference.used),
        )

    @jax.named_scope("recompute")
    def recompute_means(self, velocity: Velocity, trainable: Any, batch: Batch) -> Batch:
        """Return the batch with means from the update program in place of the rollout's.

        For hardware that picks different kernels in the two programs (`train.recompute_old`). The
        gradient is computed as well: without it the compiler would build a third program, whose
        means would agree with neither.
        """
        grads, _, means = self._accumulate(velocity, trainable, batch)
        means, _ = jax.lax.optimization_barrier((means, grads))
        record = batch.record
        if record.trained is not None:
            means = jax.vmap(lambda all, rows, new: all.at[rows].set(new))(
                record.mean, record.trained, means
            )
        return replace(batch, record=replace(record, mean=means))

    def _accumulate(
        self, velocity: Velocity, trainable: Any, batch: Batch
    ) -> tuple[Any, Metrics, Array]:
        """Mean gradient over all calls and trained steps, metrics, and means [calls, k, n, s, c].

        One microbatch is one rollout call at one window step. This is the same batch as in
        sampling, so the replayed forward pass is bit-identical to the sampled one. Activation
        memory depends only on `sample.train_batch_size`.
        """

        def window_step(
            grads: Any, step: tuple[Array, Array, Array, Steps], cond: Any, one_call: Batch
        ) -> tuple[Any, tuple[Metrics, Array]]:
            loss = partial(self._loss, velocity)
            gradient = jax.grad(loss, has_aux=True)
            weights = (one_call.advantages, one_call.kl_weights)
            grad, (metrics, mean) = gradient(trainable, cond, *step, *weights)
            return jax.tree.map(jnp.add, grads, grad), (metrics, mean)

        def call(grads: Any, one_call: Batch) -> tuple[Any, tuple[Metrics, Array]]:
            record = one_call.record
            cond = jax.tree.map(lambda leaf: jnp.repeat(leaf, self.branches, axis=0), one_call.cond)
            steps = (record.latents[:-1], record.latents[1:], record.mean, record.steps)
            if record.trained is not None:
                steps = jax.tree.map(lambda leaf: leaf[record.trained], steps)
            body = partial(window_step, cond=cond, one_call=one_call)
            return jax.lax.scan(body, grads, steps)

        # Sum over calls and steps in float32.
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), trainable)
        grads, (metrics, means) = jax.lax.scan(call, zeros, batch)

        count = means.shape[0] * means.shape[1]
        grads = jax.tree.map(lambda leaf: leaf / count, grads)
        return grads, reduce_metrics(metrics, self.largest_metrics), means

    def _loss(
        self,
        velocity: Velocity,
        trainable: Any,
        cond: Any,
        x: Array,
        x_next: Array,
        mean_old: Array,
        step: Steps,
        advantages: Array,
        kl_weights: Array | None,
    ) -> tuple[Array, tuple[Metrics, Array]]:
        """Loss, metrics and the policy's mean of one call at one step."""
        with jax.named_scope("policy"):
            mean, v = policy_step(partial(velocity, trainable), x, step, cond)
        policy_loss, metrics = self.loss(mean, mean_old, x_next, step, advantages, self.config)

        loss = policy_loss
        if self.reference.used:
            with jax.named_scope("reference"):
                v_ref = velocity(None, x, jnp.broadcast_to(step.sigma, x.shape[:1]), cond)
            v_ref = jax.lax.stop_gradient(v_ref)
            kl = self.kl(v, v_ref, x, step, kl_weights)
            penalty, more = reference_penalty(v, v_ref, kl, self.reference)
            metrics |= more
            loss = loss + penalty

        metrics = {**metrics, "loss": loss, "policy_loss": policy_loss}
        return loss, (metrics, mean)


def make_grpo(
    loss: Callable[..., tuple[Array, Metrics]], train: Any, sample: Any, config: Any = None
) -> Grpo:
    """Build the objective of `config.train` and `config.sample`. config: the loss's own config."""
    loss_config = LossConfig(train.clip_range, train.adv_clip_max, train.guard_bias)
    moves = sample.sde_window.to_dict()
    trained_steps = moves.pop("trained_steps")
    after = moves.pop("after")
    return Grpo(
        loss=loss,
        kl=KLS[train.kl],
        config=config or loss_config,
        reference=make_reference(train),
        sde_type=sample.sde_type,
        noise_level=sample.noise_level,
        window=sample.sde_window_size,
        window_range=tuple(sample.sde_window_range),
        branches=sample.branches,
        moves=Moves(**moves),
        trained_steps=trained_steps,
        after=after,
        noise_schedule=sample.noise_schedule,
        noise_least=sample.noise_least,
    )
