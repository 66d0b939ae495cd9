"""Rotary positions of queries and keys: n images, t tokens, h heads of d channels each."""

import jax.numpy as jnp
from jax import Array


def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate neighbouring channel pairs of x [n, t, h, d] by position (RoPE, arXiv 2104.09864).

    cos and sin are [t, d/2] if all images have the same positions, else [n, t, d/2].
    """
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even = pairs[..., 0]
    odd = pairs[..., 1]

    # All heads rotate alike.
    cos = cos[..., None, :]
    sin = sin[..., None, :]

    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)
