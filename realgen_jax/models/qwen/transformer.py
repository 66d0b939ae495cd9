"""The Qwen3 language model, with the numerics of transformers' Qwen3ForCausalLM.

Shapes: n rows, t tokens, D hidden channels, h query heads and k key heads of d channels each, V
tokens in the vocabulary. Rows begin with a real token; padding, if any, is at their end, where the
causal mask hides it from all others.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from realgen_jax.nn.causal import cached_attention, causal_attention
from realgen_jax.nn.layers import Linear
from realgen_jax.nn.stack import check_remat, pin_rows, scan_blocks
from realgen_jax.sharding import BATCH_AXES, constrain

Rope = tuple[Array, Array]  # cosines and sines, each float32 [t, d/2] or [n, t, d/2]
Cache = tuple[tuple[Array, Array], ...]  # keys and values of each layer, each [n, k, m, d]


@dataclass(frozen=True)
class Qwen3Config:
    """Sizes under transformers' names (config.json); the defaults are Qwen3-4B-Instruct-2507's.

    Raises ValueError for heads that cannot be grouped or rotated, and for an unknown remat.
    """

    vocab_size: int = 151936
    hidden_size: int = 2560
    intermediate_size: int = 9728
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128  # its own number: 32 x 128 is not 2560
    rms_norm_eps: float = 1e-6
    rope_theta: float = 5e6
    max_position_embeddings: int = 262144
    tie_word_embeddings: bool = True
    dtype: Any = jnp.bfloat16  # compute dtype
    param_dtype: Any = jnp.bfloat16  # dtype of the stored weights
    remat: str = "full"  # a key of REMAT_POLICIES

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; expected an even number")
        check_remat(self.remat)


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) in float32, cast back to x's dtype, times scale: [..., d], [d]."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return x32.astype(x.dtype) * scale.astype(x.dtype)


def rope_table(positions: Array | np.ndarray, head_dim: int, theta: float) -> Rope:
    """Cosines and sines [..., d/2] of position * theta^(-2i/d), for positions int [...].

    Frequencies and angles are rounded to float32, as in transformers.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1) / np.float32(theta) ** exponents
    angles = jnp.asarray(positions, jnp.float32)[..., None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate channel i of x [n, t, h, d] with channel i + d/2 (RoPE, arXiv 2104.09864).

    cos and sin are [t, d/2], or [n, t, d/2] where rows have positions of their own.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)

    # All heads rotate alike.
    cos = cos[..., None, :]
    sin = sin[..., None, :]

    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


class Block(nnx.Module):
    """Attention, then a gated feed-forward, each behind an RMS norm and added to its input."""

    def __init__(self, config: Qwen3Config, *, stack: tuple[int, ...], **kw: Any):
        self.config = config
        hidden = config.hidden_size
        inner = config.intermediate_size
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        kw = {**kw, "stack": stack, "bias": False}

        def scale(size: int) -> nnx.Param:
            return nnx.Param(jnp.ones((*stack, size), config.param_dtype))

        # Attention.
        self.input_norm = scale(hidden)
        self.q = Linear(hidden, q_size, **kw)
        self.k = Linear(hidden, kv_size, **kw)
        self.v = Linear(hidden, kv_size, **kw)
        self.q_norm = scale(config.head_dim)
        self.k_norm = scale(config.head_dim)
        self.o = Linear(q_size, hidden, inputs_split=True, **kw)

        # Feed-forward.
        self.mlp_norm = scale(hidden)
        self.gate = Linear(hidden, inner, **kw)
        self.up = Linear(hidden, inner, **kw)
        self.down = Linear(inner, hidden, inputs_split=True, **kw)

    def heads(self, x: Array, rope: Rope, mesh: Mesh | None) -> tuple[Array, Array, Array]:
        """x [n, t, D] -> queries [n, t, h, d], keys and values [n, t, k, d].

        Queries and keys are normalised per head, then rotated.
        """
        eps = self.config.rms_norm_eps
        shape = (*x.shape[:2], -1, self.config.head_dim)
        normed = rms_norm(x, self.input_norm[...], eps)
        q = rms_norm(self.q(normed, mesh).reshape(shape), self.q_norm[...], eps)
        k = rms_norm(self.k(normed, mesh).reshape(shape), self.k_norm[...], eps)
        v = self.v(normed, mesh).reshape(shape)
        return apply_rope(q, *rope), apply_rope(k, *rope), v

    def rest(self, x: Array, attended: Array, mesh: Mesh | None) -> Array:
        """The block's output [n, t, D] from its input and what attention gives, [n, t, h d]."""
        x = x + self.o(attended, mesh)
        normed = rms_norm(x, self.mlp_norm[...], self.config.rms_norm_eps)
        gated = jax.nn.silu(self.gate(normed, mesh)) * self.up(normed, mesh)
        return x + self.down(gated, mesh)

    @jax.named_scope("block")
    def __call__(self, x: Array, rope: Rope, mesh: Mesh | None) -> tuple[Array, Array, Array]:
        """x [n, t, D] -> the same, and the keys and values [n, t, k, d]."""
        q, k, v = self.heads(x, rope, mesh)
        attended = causal_attention(q, k, v, mesh)
        return self.rest(x, attended, mesh), k, v

    @jax.named_scope("block")
    def step(
        self,
        x: Array,
        rope: Rope,
        cache: tuple[Array, Array],
        place: Array,
        attended: Array,
        mesh: Mesh | None,
    ) -> tuple[Array, tuple[Array, Array]]:
        """One new token a row: x [n, 1, D] -> the same, and the cache with its key and value.

        place: int32 [], where the cache [n, k, m, d] is written. attended: which of its places the
        token attends to, bool [n, m].
        """
        q, k, v = self.heads(x, rope, mesh)
        keys = _write(cache[0], k, place)
        values = _write(cache[1], v, place)
        out = cached_attention(q, keys, values, attended, mesh)
        return self.rest(x, out, mesh), (keys, values)


def _write(cache: Array, new: Array, place: Array) -> Array:
    """Put new [n, 1, k, d] at one place of a cache [n, k, m, d]; a loop does so in place."""
    new = jnp.swapaxes(new, 1, 2).astype(cache.dtype)
    return jax.lax.dynamic_update_slice_in_dim(cache, new, place, axis=2)


class Qwen3(nnx.Module):
    """Token ids to hidden states after the last norm; `logits` projects these to the vocabulary.

    The blocks are stacked: every array below `layers` has a leading layer axis.
    """

    def __init__(self, config: Qwen3Config, rngs: nnx.Rngs):
        self.config = config
        shape = (config.vocab_size, config.hidden_size)
        kw = {"dtype": config.dtype, "param_dtype": config.param_dtype, "rngs": rngs}

        def rows() -> nnx.Param:
            return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, config.param_dtype))

        self.embedding = rows()
        self.layers = Block(config, stack=(config.num_hidden_layers,), **kw)
        self.norm = nnx.Param(jnp.ones(config.hidden_size, config.param_dtype))
        self.head = None if config.tie_word_embeddings else rows()

    def __call__(self, ids: Array, mesh: Mesh | None = None) -> Array:
        """ids int32 [n, t] -> hidden states after the last norm, [n, t, D]."""
        config = self.config
        rope = rope_table(np.arange(ids.shape[1]), config.head_dim, config.rope_theta)

        def apply(block: Block, x: Array, _: None) -> Array:
            return block(x, rope, mesh)[0]

        x = scan_blocks(apply, self.layers, self._embed(ids, mesh), None, config.remat, mesh)
        return self._final_norm(x)

    def prefill(self, ids: Array, mesh: Mesh | None = None) -> tuple[Array, tuple[Array, Array]]:
        """The same, and all keys and values, each [layers, n, t, k, d]. Not for gradients."""
        config = self.config
        rope = rope_table(np.arange(ids.shape[1]), config.head_dim, config.rope_theta)
        graph, weights = nnx.split(self.layers)

        def body(x: Array, weights: nnx.State) -> tuple[Array, tuple[Array, Array]]:
            x, k, v = nnx.merge(graph, weights)(pin_rows(x, mesh), rope, mesh)
            return pin_rows(x, mesh), (k, v)

        x, cache = jax.lax.scan(body, self._embed(ids, mesh), weights)
        return self._final_norm(x), cache

    def blocks(self) -> list[Block]:
        """The blocks one by one, each with weights of its own.

        A scan copies a layer's weights out of the stack in every step. A loop over tokens takes
        them apart once, before it begins; they then need the stack's memory a second time.
        """
        graph, weights = nnx.split(self.layers)
        return [
            nnx.merge(graph, jax.tree.map(lambda array, i=i: array[i], weights))
            for i in range(self.config.num_hidden_layers)
        ]

    def step(
        self,
        blocks: list[Block],
        ids: Array,
        positions: Array,
        cache: Cache,
        place: Array,
        attended: Array,
        mesh: Mesh | None = None,
    ) -> tuple[Array, Cache]:
        """Hidden states [n, D] of one new token a row, and the cache with its keys and values.

        blocks: of `blocks`. ids, positions: int32 [n]; positions count from a row's first real
        token. place, attended: as for Block.step.
        """
        config = self.config
        rope = rope_table(positions[:, None], config.head_dim, config.rope_theta)
        x = self._embed(ids[:, None], mesh)
        written = []
        for block, layer in zip(blocks, cache, strict=True):
            x, layer = block.step(pin_rows(x, mesh), rope, layer, place, attended, mesh)
            written.append(layer)
        return self._final_norm(x)[:, 0], tuple(written)

    @jax.named_scope("head")
    def logits(self, hidden: Array, mesh: Mesh | None = None) -> Array:
        """Hidden states [n, ..., D] -> float32 [n, ..., V]."""
        head = self.embedding if self.head is None else self.head
        weights = constrain(head[...].astype(self.config.dtype), mesh, "tensor")
        logits = jnp.einsum("...d,vd->...v", hidden, weights, preferred_element_type=jnp.float32)
        middle = (None,) * (logits.ndim - 2)
        return constrain(logits, mesh, BATCH_AXES, *middle, "tensor")

    def _embed(self, ids: Array, mesh: Mesh | None) -> Array:
        return pin_rows(self.embedding[...][ids].astype(self.config.dtype), mesh)

    def _final_norm(self, x: Array) -> Array:
        """The last norm. It is recomputed in the backward pass, as in stack.output_layer."""

        def apply(x: Array) -> Array:
            return rms_norm(x, self.norm[...], self.config.rms_norm_eps)

        return jax.checkpoint(apply)(x)
