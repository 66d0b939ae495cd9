"""Causal attention with grouped keys (GQA, arXiv 2305.13245), for language models.

Shapes: n rows, t tokens, h query heads and k key heads of d channels each; query head i attends to
the keys of head i // (h / k).
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from realgen_jax.nn.attention import takes_cudnn
from realgen_jax.sharding import BATCH_AXES, constrain

LOWEST = jnp.finfo(jnp.float32).min  # the score of a key that is not attended to


@jax.named_scope("attention")
def causal_attention(q: Array, k: Array, v: Array, mesh: Mesh | None = None) -> Array:
    """Each token attends to itself and to those before it: q [n, t, h, d], k and v [n, t, k, d].

    Returns [n, t, h d]. cuDNN's flash kernel runs where it can (nn/attention.py), elsewhere XLA.
    """
    q, k, v = (constrain(a, mesh, BATCH_AXES, None, "tensor") for a in (q, k, v))
    if takes_cudnn(q, mesh):
        out = _cudnn(q, k, v)
    else:
        tokens = q.shape[1]
        attended = jnp.tril(jnp.ones((1, tokens, tokens), bool))
        out = _grouped(q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), attended)
    return out.reshape(*out.shape[:2], -1)


@jax.named_scope("attention")
def cached_attention(
    q: Array, keys: Array, values: Array, attended: Array, mesh: Mesh | None = None
) -> Array:
    """One new token a row attends to a cache: q [n, 1, h, d], keys and values [n, k, m, d].

    attended: which of the m places, bool [n, m]. Returns [n, 1, h d].
    """
    q = constrain(q, mesh, BATCH_AXES, None, "tensor")
    out = _grouped(q, keys, values, attended[:, None])
    return out.reshape(*out.shape[:2], -1)


def _grouped(q: Array, k: Array, v: Array, attended: Array) -> Array:
    """Attention in plain JAX: q [n, t, h, d], k and v [n, k, m, d] -> [n, t, h, d].

    attended: bool [n or 1, t, m]. Scores in float32; the denominator divides the result, as in
    nn/attention.py.
    """
    n, tokens, heads, channels = q.shape
    groups = k.shape[1]

    # The queries that share a key head: [n, k, h / k, t, d].
    scaled = (q * channels**-0.5).reshape(n, tokens, groups, heads // groups, channels)
    scaled = scaled.transpose(0, 2, 3, 1, 4)

    # Scores [n, k, h / k, t, m].
    scores = jnp.einsum("nkgtd,nkmd->nkgtm", scaled, k, preferred_element_type=jnp.float32)
    scores = jnp.where(attended[:, None, None], scores, LOWEST)

    # Softmax. The largest score is subtracted to avoid overflow.
    largest = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - largest)
    out = jnp.einsum(
        "nkgtm,nkmd->nkgtd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    out = out / weights.sum(axis=-1, keepdims=True)
    return out.astype(v.dtype).transpose(0, 3, 1, 2, 4).reshape(q.shape)


def _cudnn(q: Array, k: Array, v: Array) -> Array:
    """The same by cuDNN's flash kernel: q [n, t, h, d], k and v [n, t, k, d] -> [n, t, h, d].

    jax has no gradient of it for an odd number of tokens (see nn/attention.py), so such a sequence
    gets one more, which no token before it sees.
    """
    tokens = q.shape[1]
    q, k, v = (jnp.pad(a, ((0, 0), (0, tokens % 2), (0, 0), (0, 0))) for a in (q, k, v))
    out, _ = jax.nn.dot_product_attention(
        q, k, v, is_causal=True, implementation="cudnn", return_residual=True
    )
    return out[:, :tokens]
