"""Parts of transformer blocks, with one stream of tokens or several (MM-DiT, arXiv 2403.03206).

Shapes: n images, t tokens, D channels, h heads of d channels each.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh

from realgen_jax.nn.attention import fills_tiles
from realgen_jax.nn.layers import EPS, MLP, Linear, QKNorm, modulated_norm
from realgen_jax.nn.stack import pin_rows
from realgen_jax.sharding import for_tpu

gelu = partial(jax.nn.gelu, approximate=True)


class Modulation(NamedTuple):
    """AdaLN parameters of one residual branch, each [n, D]."""

    shift: Array
    scale: Array
    gate: Array


def modulations(mod: Array, branches: int = 2) -> list[Modulation]:
    """[n, branches 3D] -> the modulation of each branch; attention, feed-forward, ..."""
    parts = jnp.split(mod, 3 * branches, axis=-1)
    return [Modulation(*parts[first : first + 3]) for first in range(0, len(parts), 3)]


class Heads(nnx.Module):
    """The projections of tokens to queries, keys and values, and the norm of queries and keys."""

    def __init__(self, dim: int, head_dim: int, qk_norm: bool = True, eps: float = EPS, **kw: Any):
        self.head_dim = head_dim
        self.qkv = Linear(dim, (3, dim), **kw)
        norm = {"param_dtype": kw["param_dtype"], "stack": kw["stack"], "eps": eps}
        self.norm = QKNorm(head_dim, **norm) if qk_norm else None

    def heads(self, x: Array, mesh: Mesh | None) -> tuple[Array, Array, Array]:
        """x [n, t, D] -> q, k and v, each [n, t, h, d]."""
        parts = jnp.split(self.qkv(x, mesh), 3, axis=2)
        q, k, v = [rearrange(part, "n t 1 (h d) -> n t h d", d=self.head_dim) for part in parts]

        # On a TPU, turn the heads to the front while they have 16 bits, as attention takes them.
        # XLA would turn them in float32, around the norm.
        if for_tpu(mesh) and fills_tiles(x.shape[1], self.head_dim):
            heads_first = Layout((0, 2, 1, 3))
            q, k, v = [with_layout_constraint(array, heads_first) for array in (q, k, v)]
        if self.norm is not None:
            q, k = self.norm(q, k)
        return q, k, v


class Stream(Heads):
    """The weights of one modality, image or text, in a block with a joint attention."""

    def __init__(self, dim: int, head_dim: int, qk_norm: bool = True, **kw: Any):
        super().__init__(dim, head_dim, qk_norm, **kw)
        self.proj = Linear(dim, dim, inputs_split=True, **kw)
        self.mlp = MLP(dim, 4 * dim, dim, gelu, **kw)

    def __call__(
        self, x: Array, attended: Array, gate: Array, mlp: Modulation, mesh: Mesh | None
    ) -> Array:
        """Add the outputs of attention and feed-forward, each times its gate, to x [n, tokens, D].

        attended [n, tokens, D]: the heads' outputs for this stream's tokens. gate [n, D].
        """
        x = x + gate[:, None] * self.proj(attended, mesh)
        x = pin_rows(x, mesh)
        return x + mlp.gate[:, None] * self.mlp(modulated_norm(x, mlp.shift, mlp.scale), mesh)
