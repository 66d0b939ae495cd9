"""Rotary positions of queries and keys: n images, t tokens, h heads of d channels each."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from realgen_jax.sharding import for_tpu


def apply_rope(x: Array, cos: Array, sin: Array, mesh: Mesh | None = None) -> Array:
    """Rotate neighbouring channel pairs of x [n, t, h, d] by position (RoPE, arXiv 2104.09864).

    cos and sin are [t, d/2] if all images have the same positions, else [n, t, d/2].
    """
    if for_tpu(mesh):
        return rope_by_product(x, cos, sin)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even = pairs[..., 0]
    odd = pairs[..., 1]

    # All heads rotate alike.
    cos = cos[..., None, :]
    sin = sin[..., None, :]

    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


@jax.custom_vjp
def rope_by_product(x: Array, cos: Array, sin: Array) -> Array:
    """`apply_rope` for TPUs: x times the cosines, plus each channel's neighbour times the sines.

    An axis of pairs would fill 2 of the 128 lanes of a TPU's registers, so XLA would turn the
    queries and keys of all tokens several times. A product with a permutation exchanges the
    neighbours exactly.
    """
    neighbours = np.eye(x.shape[-1], dtype=np.float32)[np.arange(x.shape[-1]) ^ 1]
    other = jnp.einsum("nthd,de->nthe", x, neighbours.astype(x.dtype), precision="highest")

    # One cosine and one sine a channel, for all heads.
    cos = jnp.repeat(cos, 2, axis=-1)[..., None, :]
    sin = jnp.stack([-sin, sin], axis=-1).reshape(*sin.shape[:-1], -1)[..., None, :]
    return (x.astype(jnp.float32) * cos + other.astype(jnp.float32) * sin).astype(x.dtype)


def _rope_forward(x: Array, cos: Array, sin: Array) -> tuple[Array, tuple[Array, Array]]:
    return rope_by_product(x, cos, sin), (cos, sin)


def _rope_backward(angles: tuple[Array, Array], g: Array) -> tuple[Array, Array, Array]:
    """The transpose of a rotation is the rotation back. Positions are not trained."""
    cos, sin = angles
    return rope_by_product(g, cos, -sin), jnp.zeros_like(cos), jnp.zeros_like(sin)


rope_by_product.defvjp(_rope_forward, _rope_backward)
