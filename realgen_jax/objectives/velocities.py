"""Measures of velocities that several objectives use."""

import jax
import jax.numpy as jnp
from jax import Array


def per_sample(x: Array) -> Array:
    """Mean over a sample's elements: [n, ...] -> [n]."""
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))


def rows(values: Array, like: Array) -> Array:
    """[n] -> [n, 1, ...], to broadcast with `like`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def norm_ratio(v: Array, v_ref: Array) -> Array:
    """Mean over samples of |v| / |v_ref|, a metric without gradient: [].

    A policy that is pushed too far often makes its velocities longer. The barrier keeps this metric
    from changing how the compiler rounds the gradient.
    """
    v, v_ref = jax.lax.optimization_barrier(jax.lax.stop_gradient((v, v_ref)))
    ratio = jnp.sqrt(per_sample(v**2) / jnp.maximum(per_sample(v_ref**2), 1e-20))
    return jnp.mean(ratio)
