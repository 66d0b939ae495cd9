"""DiffusionNFT: move towards good pictures and away from bad ones, relative to an old policy.

Source: DiffusionNFT (arXiv 2509.16117), NVlabs/DiffusionNFT.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from realgen_jax.objectives.decoupled import (
    Decoupled,
    Sample,
    make_levels,
    make_old_decay,
)
from realgen_jax.objectives.reference import make_reference, reference_penalty, weighted_kl
from realgen_jax.objectives.velocities import per_sample, rows
from realgen_jax.update import Metrics, TrainState


@dataclass(frozen=True)
class NftConfig:
    """Hyperparameters of the loss.

    adv_clip_max: C, the largest absolute advantage. mix: b, how far the two implicit policies lie
    from the old one. advantages: a key of ADVANTAGES.
    """

    adv_clip_max: float
    mix: float
    advantages: str


# advantages -> what is made of advantages that are clipped to [-C, C]
ADVANTAGES = {
    "all": lambda a: a,
    "positive_only": lambda a: jnp.maximum(a, 0.0),
    "negative_only": lambda a: jnp.minimum(a, 0.0),
    "one_only": lambda a: jnp.where(a > 0.0, 1.0, 0.0),
    "binary": jnp.sign,
}


def optimality(advantages: Array, adv_clip_max: float, kind: str) -> Array:
    """r = A / (2 C) + 1/2, the probability that a picture is good: float32 [n]."""
    clipped = jnp.clip(advantages, -adv_clip_max, adv_clip_max)
    return ADVANTAGES[kind](clipped) / (2.0 * adv_clip_max) + 0.5


def matching_loss(v: Array, x: Array, x0: Array, sigma: Array) -> tuple[Array, Array]:
    """Mean squared error of the clean estimate x - sigma v over its mean absolute error.

    v, x, x0: [n, ...]; sigma: [n]. Returns the loss and its divisor, at least 1e-5 and without
    gradient, each [n].
    """
    error = x - rows(sigma, x) * v - x0
    weight = jnp.maximum(per_sample(jnp.abs(error)), 1e-5)
    weight = jax.lax.stop_gradient(weight)
    return per_sample(error**2) / weight, weight


def nft_loss(
    v: Array, v_old: Array, x: Array, x0: Array, sigma: Array, advantages: Array, config: NftConfig
) -> tuple[Array, Metrics]:
    """Mean of C (r L(v+) + (1 - r) L(v-)) / b over pictures, with v+- = v_old +- b (v - v_old).

    v, v_old, x, x0: [n, ...]; sigma, advantages: [n]. L is `matching_loss` and r `optimality`. At
    v = v_old its value does not depend on r, but its gradient does. Raises ValueError if the
    shapes do not match.
    """
    _check_shapes(v, v_old, x, x0, sigma, advantages)
    step = config.mix * (v - v_old)
    loss_pos, _ = matching_loss(v_old + step, x, x0, sigma)
    loss_neg, _ = matching_loss(v_old - step, x, x0, sigma)

    r = optimality(advantages, config.adv_clip_max, config.advantages)
    loss = jnp.mean(r * loss_pos + (1.0 - r) * loss_neg) * config.adv_clip_max / config.mix
    metrics = {
        "loss_pos": jnp.mean(loss_pos),
        "loss_neg": jnp.mean(loss_neg),
        "old_distance": jnp.mean((v - v_old) ** 2),
    }
    return loss, metrics


def _check_shapes(
    v: Array, v_old: Array, x: Array, x0: Array, sigma: Array, advantages: Array
) -> None:
    """Raise ValueError for shapes that would broadcast silently."""
    if not v.shape == v_old.shape == x.shape == x0.shape:
        raise ValueError(
            f"v {v.shape}, v_old {v_old.shape}, x {x.shape} and x0 {x0.shape} must have the same "
            "shape"
        )
    if not sigma.shape == advantages.shape == v.shape[:1]:
        raise ValueError(
            f"sigma {sigma.shape} and advantages {advantages.shape} must have one entry per "
            f"sample, {v.shape[:1]}"
        )


@dataclass(frozen=True)
class Nft(Decoupled):
    """Samples with the old policy, and moves it towards the trained one after each epoch."""

    keeps_old = True

    def rollout_policy(self, state: TrainState) -> Any:
        return state.old

    def loss(self, v: Array, sample: Sample) -> tuple[Array, Metrics]:
        policy_loss, metrics = nft_loss(
            v, sample.v_old, sample.x, sample.x0, sample.sigma, sample.advantages, self.config
        )

        loss = policy_loss
        if self.reference.used:
            kl = weighted_kl((v - sample.v_ref) ** 2, sample.kl_weights)
            penalty, more = reference_penalty(v, sample.v_ref, kl, self.reference)
            metrics |= more
            loss = loss + penalty
        return loss, {**metrics, "loss": loss, "policy_loss": policy_loss}


def make_nft(train: Any, sample: Any) -> Nft:
    """Build the objective of `config.train` and `config.sample`."""
    return Nft(
        config=NftConfig(train.adv_clip_max, train.nft.mix, train.nft.advantages),
        reference=make_reference(train),
        levels=make_levels("nft", train.nft),
        old_decay=make_old_decay(train.nft),
        solver=sample.solver,
        cached_steps=sample.cached_steps,
    )
