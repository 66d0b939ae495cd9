"""Flow-DPPO: instead of clipping the ratio, drop pictures whose step has moved too far.

Source: UniRL's `flowdppo` (Tencent-Hunyuan).
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array

from realgen_jax.objectives.grpo import Grpo, check_shapes, log_prob_difference, make_grpo
from realgen_jax.objectives.velocities import per_sample
from realgen_jax.sde import Steps
from realgen_jax.update import Metrics


@dataclass(frozen=True)
class DppoConfig:
    """Hyperparameters of the loss.

    threshold: largest divergence, mean over a picture's elements. per_variance: whether the
    divergence is the KL of two Gaussians, or only the squared distance of their means, halved.
    """

    threshold: float
    per_variance: bool = True


def dppo_loss(
    mean: Array, mean_old: Array, x_next: Array, step: Steps, advantages: Array, config: DppoConfig
) -> tuple[Array, Metrics]:
    """Mean of -A r over the pictures that are kept; those that are dropped count as 0.

    mean, mean_old, x_next: [n, ...]; advantages: [n], which are not clipped. With the divergence
    k = mean((mean - mean_old)^2) / (2 std^2), a picture is dropped if k reaches the threshold and
    its ratio r has moved where its advantage points to: r > 1 and A > 0, or r < 1 and A < 0.
    Raises ValueError if the shapes do not match.
    """
    check_shapes(mean, mean_old, x_next, advantages)
    log_ratio = log_prob_difference(mean, mean_old, x_next, step.std)
    ratio = jnp.exp(log_ratio)

    keep, divergence = kept(ratio, mean, mean_old, step.std, advantages, config)
    loss = jnp.mean(jnp.where(keep, -advantages * ratio, 0.0))

    metrics = {
        "approx_kl": 0.5 * jnp.mean(log_ratio**2),
        "kept_share": jnp.mean(keep),
        "divergence": jnp.mean(divergence),
        "ratio_deviation": jnp.max(jnp.abs(ratio - 1.0)),
    }
    return loss, metrics


def kept(
    ratio: Array, mean: Array, mean_old: Array, std: Array, advantages: Array, config: DppoConfig
) -> tuple[Array, Array]:
    """Return which pictures are kept, bool [n], and their divergence, float32 [n]."""
    divergence = 0.5 * per_sample((mean - mean_old) ** 2)
    if config.per_variance:
        divergence = divergence / std**2
    upwards = (ratio > 1.0) & (advantages > 0.0)
    downwards = (ratio < 1.0) & (advantages < 0.0)
    return ~((divergence >= config.threshold) & (upwards | downwards)), divergence


def make_dppo(train: Any, sample: Any) -> Grpo:
    """Build the objective of `config.train` and `config.sample`.

    Raises ValueError if an epoch has one optimizer step, in which nothing has moved yet.
    """
    calls = sample.num_batches_per_epoch // train.gradient_accumulation_steps
    if calls * train.num_inner_epochs < 2:
        raise ValueError(
            "config.train.loss is 'dppo', but an epoch has one optimizer step, which samples "
            "exactly what it trains on, so that nothing is ever dropped; expected 2 or more: lower "
            f"config.train.gradient_accumulation_steps {train.gradient_accumulation_steps}, or "
            f"raise config.train.num_inner_epochs {train.num_inner_epochs}"
        )
    config = DppoConfig(train.dppo.threshold, train.dppo.per_variance)
    return make_grpo(dppo_loss, train, sample, config)
