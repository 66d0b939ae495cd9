"""Shapes of velocities that several objectives use."""

import jax.numpy as jnp
from jax import Array


def per_sample(x: Array) -> Array:
    """Mean over a sample's elements: [n, ...] -> [n]."""
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))


def rows(values: Array, like: Array) -> Array:
    """[n] -> [n, 1, ...], to broadcast with `like`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
