"""Advantage-weighted matching: the flow-matching loss, weighted by advantages, as a log-likelihood.

Sources: AWM (arXiv 2509.25050, scxue/advantage_weighted_matching), Flow-Factory.
"""

from collections.abc import Callable
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
from realgen_jax.objectives.velocities import per_sample
from realgen_jax.update import Metrics, TrainState


@dataclass(frozen=True)
class AwmConfig:
    """Hyperparameters of the loss.

    beta_ema: weight of the KL to the old policy, an average of its own. kl_weight: a key of
    KL_WEIGHTS, also for the KL to the base model. clip_range: R of the clip 1 +- R. adv_clip_max:
    C. Advantages are clipped to +-C and scaled to +-advantage_max. weighting: a key of WEIGHTINGS.
    off_policy: whether the old policy samples and gives the ratio; otherwise the ratio is 1.
    """

    beta_ema: float
    kl_weight: str
    clip_range: float
    adv_clip_max: float
    advantage_max: float
    weighting: str
    off_policy: bool


TINY = 1e-10  # keeps the gradient of a root finite at 0


def _ghuber(m: Array, sigma: Array) -> Array:
    """Generalised Huber with the power 1/4: large errors weigh less."""
    return -((m + TINY) ** 0.25 - TINY**0.25) * sigma * 4.0


def _huber(m: Array, sigma: Array) -> Array:
    return -(jnp.sqrt(m + TINY) - TINY**0.5) * sigma


# weighting -> (mean squared error m [n], sigma [n]) -> log-likelihood [n], up to a constant
WEIGHTINGS: dict[str, Callable[[Array, Array], Array]] = {
    "plain": lambda m, sigma: -m,
    "ghuber": _ghuber,
    "t": lambda m, sigma: -m * sigma,
    "t2": lambda m, sigma: -m * sigma**2,
    "huber": _huber,
}

# kl_weight -> sigma [n] -> weight of (v - v_ref)^2
# elbo: of the transition's KL, 1 / (2 s^2) with flow-SDE's s at the noise level 0.7.
KL_WEIGHTS: dict[str, Callable[[Array], Array]] = {
    "uniform": jnp.ones_like,
    "elbo": lambda sigma: (1.0 - jnp.minimum(sigma, 0.99)) / (2.0 * 0.49 * sigma),
}


def log_likelihood(
    v: Array, x0: Array, noise: Array, sigma: Array, weighting: str
) -> tuple[Array, Array]:
    """Return the surrogate of log p(x0), and the error m = mean (v - (noise - x0))^2, each [n]."""
    error = per_sample((v - (noise - x0)) ** 2)
    return WEIGHTINGS[weighting](error, sigma), error


def awm_loss(
    logp: Array, logp_old: Array, advantages: Array, config: AwmConfig
) -> tuple[Array, Metrics]:
    """Mean of max(-A r, -A clip(r, 1 +- R)), with r = exp(logp - logp_old).

    logp, logp_old, advantages: [n]; logp_old has no gradient. On policy it is logp itself: then r
    is 1, and the gradient -A grad logp. Raises ValueError if the shapes do not match.
    """
    if not logp.shape == logp_old.shape == advantages.shape:
        raise ValueError(
            f"logp {logp.shape}, logp_old {logp_old.shape} and advantages {advantages.shape} must "
            "have the same shape"
        )
    ratio = jnp.exp(logp - jax.lax.stop_gradient(logp_old))
    scale = config.advantage_max / config.adv_clip_max
    a = jnp.clip(advantages, -config.adv_clip_max, config.adv_clip_max) * scale
    bounded = jnp.clip(ratio, 1.0 - config.clip_range, 1.0 + config.clip_range)
    loss = jnp.mean(jnp.maximum(-a * ratio, -a * bounded))
    return loss, {"clipfrac": jnp.mean(jnp.abs(ratio - 1.0) > config.clip_range)}


def velocity_kl(
    v: Array, v_ref: Array, sigma: Array, kl_weight: str, weights: Array | None = None
) -> Array:
    """Mean of (v - v_ref)^2, weighted by sigma and by the weights of the samples, [n]: []."""
    return weighted_kl(KL_WEIGHTS[kl_weight](sigma) * per_sample((v - v_ref) ** 2), weights)


@dataclass(frozen=True)
class Awm(Decoupled):
    """Samples with the trained policy, or off policy with the old one."""

    @property
    def keeps_old(self) -> bool:
        return self.config.off_policy or self.config.beta_ema > 0

    def rollout_policy(self, state: TrainState) -> Any:
        return state.old if self.config.off_policy else state.trainable

    def loss(self, v: Array, sample: Sample) -> tuple[Array, Metrics]:
        config = self.config
        sigma = sample.sigma

        # The ratio to the policy that sampled.
        target = (sample.x0, sample.noise, sigma, config.weighting)
        logp, error = log_likelihood(v, *target)
        logp_old = logp
        if config.off_policy:
            logp_old, _ = log_likelihood(sample.v_old, *target)
        policy_loss, metrics = awm_loss(logp, logp_old, sample.advantages, config)

        # What holds the error of pictures with a negative advantage.
        loss = policy_loss
        if self.reference.used:
            kl = velocity_kl(v, sample.v_ref, sigma, config.kl_weight, sample.kl_weights)
            penalty, more = reference_penalty(v, sample.v_ref, kl, self.reference)
            metrics |= more
            loss = loss + penalty
        if self.keeps_old:
            metrics["old_distance"] = jnp.mean((v - sample.v_old) ** 2)
            kl = velocity_kl(v, sample.v_old, sigma, config.kl_weight)
            loss = loss + config.beta_ema * kl

        metrics["matching_error"] = jnp.mean(error)
        return loss, {**metrics, "loss": loss, "policy_loss": policy_loss}


def make_awm(train: Any, sample: Any) -> Awm:
    """Build the objective of `config.train` and `config.sample`."""
    awm = train.awm
    config = AwmConfig(
        beta_ema=awm.beta_ema,
        kl_weight=awm.kl_weight,
        clip_range=awm.clip_range,
        adv_clip_max=train.adv_clip_max,
        advantage_max=awm.advantage_max,
        weighting=awm.weighting,
        off_policy=awm.off_policy,
    )
    return Awm(
        config=config,
        reference=make_reference(train),
        levels=make_levels("awm", awm),
        old_decay=make_old_decay(awm),
        solver=sample.solver,
        cached_steps=sample.cached_steps,
    )
