"""What holds the policy to the base model: the KL, and a limit on the length of the velocity."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from realgen_jax.objectives.velocities import per_sample, rows
from realgen_jax.update import Metrics


@dataclass(frozen=True)
class Reference:
    """The weights of the two penalties; the base model's velocity is computed if one is not 0.

    beta: of the KL. norm_weight, norm_limit: of `norm_penalty`.
    """

    beta: float
    norm_weight: float = 0.0
    norm_limit: float = 1.0

    @property
    def used(self) -> bool:
        return self.beta > 0 or self.norm_weight > 0


def make_reference(train: Any) -> Reference:
    """Build the penalties of `config.train`."""
    return Reference(train.beta, train.norm_guard.weight, train.norm_guard.limit)


def reference_penalty(
    v: Array, v_ref: Array, kl: Array, reference: Reference
) -> tuple[Array, Metrics]:
    """Return the sum of both penalties, [], and their metrics.

    v, v_ref: [n, ...], of the policy and of the base model, the latter without gradient. kl: [].
    """
    metrics = {"kl_loss": kl, "velocity_norm": mean_norm_ratio(v, v_ref)}
    penalty = jnp.float32(0.0)
    if reference.beta > 0:
        penalty = reference.beta * kl
    if reference.norm_weight > 0:
        metrics["norm_penalty"] = norm_penalty(v, v_ref, reference.norm_limit)
        penalty = penalty + reference.norm_weight * metrics["norm_penalty"]
    return penalty, metrics


def weighted_kl(values: Array, kl_weights: Array | None) -> Array:
    """Mean of the KL's terms [n] or [n, ...], those of each picture times its weight: [].

    kl_weights: float32 [n]; None: all are 1.
    """
    if kl_weights is None:
        return jnp.mean(values)
    return jnp.mean(rows(kl_weights, values) * values)


def norm_penalty(v: Array, v_ref: Array, limit: float) -> Array:
    """Mean over samples of max(|v| / |v_ref| - limit, 0)^2: [].

    NormGuard (arXiv 2606.27771) punishes only velocities that are longer than those of the base
    model, as a limit of 1 does. The form, a relative excess that is squared, is ours: the paper's
    abstract, all that we have read, has no formula.
    """
    return jnp.mean(jnp.maximum(norm_ratios(v, v_ref) - limit, 0.0) ** 2)


def norm_ratios(v: Array, v_ref: Array) -> Array:
    """|v| / |v_ref| of each sample: [n, ...] -> [n]."""
    tiny = 1e-20  # keeps the gradient of the root finite at 0
    squares = jnp.maximum(per_sample(v**2), tiny) / jnp.maximum(per_sample(v_ref**2), tiny)
    return jnp.sqrt(squares)


def mean_norm_ratio(v: Array, v_ref: Array) -> Array:
    """Mean over samples of |v| / |v_ref|, a metric without gradient: [].

    A policy that is pushed too far often makes its velocities longer. The barrier keeps this metric
    from changing how the compiler rounds the gradient.
    """
    return jnp.mean(norm_ratios(*jax.lax.optimization_barrier(jax.lax.stop_gradient((v, v_ref)))))
