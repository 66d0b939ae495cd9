"""The FLUX.1 transformer, with the numerics of diffusers' FluxTransformer2DModel.

Shapes: n images, s = height * width image tokens, l text tokens, t = l + s tokens in total,
D channels, h heads of d channels each.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from realgen_jax.nn.attention import attention
from realgen_jax.nn.layers import MLP, TIME_CHANNELS, Linear, modulated_norm, sinusoidal_embedding
from realgen_jax.nn.mmdit import Heads, Modulation, Stream, gelu, modulations
from realgen_jax.nn.rope import apply_rope
from realgen_jax.nn.stack import (
    check_remat,
    modulation_of_layers,
    output_layer,
    pin_rows,
    scan_blocks,
)

Rope = tuple[np.ndarray, np.ndarray]  # cosines and sines, each float32 [t, d/2]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cond:
    """The conditioning: text and guidance scale, one row per image."""

    t5: Array  # T5 states [n, l, joint_attention_dim]
    clip: Array  # pooled CLIP state [n, pooled_projection_dim]
    guidance: Array  # guidance scale, float32 [n]


@dataclass(frozen=True)
class FluxConfig:
    """Sizes under diffusers' names (`transformer/config.json`); the defaults are FLUX.1-dev's.

    Raises ValueError if axes_dims_rope do not add up to attention_head_dim, for an unknown remat,
    and for a model that takes more than noisy latents.
    """

    in_channels: int = 64
    out_channels: int | None = None  # None: as many as come in
    num_layers: int = 19  # double blocks
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = True
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    dtype: Any = jnp.bfloat16  # compute dtype
    param_dtype: Any = jnp.bfloat16  # dtype of the stored weights
    remat: str = "full"  # a key of REMAT_POLICIES
    quantization: str = ""  # of the blocks' kernels: a key of FORMATS in nn/quantize.py, or ""

    def __post_init__(self):
        rope_channels = sum(self.axes_dims_rope)
        if rope_channels != self.attention_head_dim:
            raise ValueError(
                f"axes_dims_rope {self.axes_dims_rope} add up to {rope_channels}, but must add up "
                f"to attention_head_dim {self.attention_head_dim}"
            )
        if self.out_channels not in (None, self.in_channels):
            raise ValueError(
                f"a model with in_channels {self.in_channels} and out_channels {self.out_channels} "
                "does not make pictures from text alone: FLUX.1-Fill (384 and 64) also takes a "
                "picture and a mask, FLUX.1-Canny and FLUX.1-Depth (128 and 64) a control picture"
            )
        check_remat(self.remat, self.quantization)

    @property
    def hidden_dim(self) -> int:
        """D, the channels of a token inside the transformer."""
        return self.attention_head_dim * self.num_attention_heads


def rope_table(
    text_tokens: int, height: int, width: int, axes_dims: tuple[int, ...], theta: float = 10000.0
) -> Rope:
    """Cosines and sines [t, d/2] for the sequence [text, image].

    Positions are (0, 0, 0) for text tokens and (0, row, column) for image tokens; axis i rotates
    axes_dims[i] channels. Frequencies are computed in float64, as in diffusers. All shapes are
    static, so this runs once, on the host, during tracing.
    """
    # Positions [t, 3].
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    image = np.stack([np.zeros_like(rows), rows, columns], axis=-1).reshape(-1, 3)
    text = np.zeros((text_tokens, 3))
    positions = np.concatenate([text, image])

    # Angles [t, d/2], concatenated over the axes.
    angles = []
    for axis, dim in enumerate(axes_dims):
        frequencies = theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
        angles.append(positions[:, axis, None] * frequencies)
    table = np.concatenate(angles, axis=-1)

    return np.cos(table).astype(np.float32), np.sin(table).astype(np.float32)


class DoubleBlock(nnx.Module):
    """Separate streams for text and image with a joint attention (MM-DiT, arXiv 2403.03206)."""

    def __init__(self, config: FluxConfig, **kw: Any):
        self.img = Stream(config.hidden_dim, config.attention_head_dim, **kw)
        self.txt = Stream(config.hidden_dim, config.attention_head_dim, **kw)

    @jax.named_scope("double")
    def __call__(
        self, img: Array, txt: Array, img_mod: Array, txt_mod: Array, rope: Rope, mesh: Mesh | None
    ) -> tuple[Array, Array]:
        """img [n, s, D], txt [n, l, D] -> the same; img_mod and txt_mod [n, 6D]."""
        # Each stream has two modulations: one for the attention and one for the feed-forward.
        img_attn, img_mlp = modulations(img_mod)
        txt_attn, txt_mlp = modulations(txt_mod)

        # Normalise and modulate each stream, and project it to queries, keys and values.
        img_normed = modulated_norm(img, img_attn.shift, img_attn.scale)
        img_q, img_k, img_v = self.img.heads(img_normed, mesh)
        txt_normed = modulated_norm(txt, txt_attn.shift, txt_attn.scale)
        txt_q, txt_k, txt_v = self.txt.heads(txt_normed, mesh)

        # Join text and image into one sequence, [n, l + s, h, d].
        q = jnp.concatenate([txt_q, img_q], axis=1)
        k = jnp.concatenate([txt_k, img_k], axis=1)
        v = jnp.concatenate([txt_v, img_v], axis=1)

        # Attend, with rotary positions on queries and keys, and split the two streams again.
        q, k = apply_rope(q, *rope, mesh), apply_rope(k, *rope, mesh)
        attended = attention(q, k, v, mesh)
        txt_attended, img_attended = jnp.split(attended, [txt.shape[1]], axis=1)

        # Add the gated outputs of the attention, then of the feed-forward, to each stream.
        img = self.img(img, img_attended, img_attn.gate, img_mlp, mesh)
        txt = self.txt(txt, txt_attended, txt_attn.gate, txt_mlp, mesh)
        return img, txt


class SingleBlock(Heads):
    """Attention and feed-forward in parallel, on one sequence [text, image] (arXiv 2302.05442)."""

    def __init__(self, config: FluxConfig, **kw: Any):
        dim = config.hidden_dim
        super().__init__(dim, config.attention_head_dim, **kw)
        self.mlp = Linear(dim, (4, dim), **kw)
        self.proj = Linear((5, dim), dim, inputs_split=True, **kw)

    @jax.named_scope("single")
    def __call__(self, x: Array, mod: Array, rope: Rope, mesh: Mesh | None) -> Array:
        """x [n, t, D] -> the same; mod [n, 3D]."""
        # Normalise and modulate, once for both branches.
        mod = Modulation(*jnp.split(mod, 3, axis=-1))
        normed = modulated_norm(x, mod.shift, mod.scale)

        # Attention branch [n, t, 1, D].
        q, k, v = self.heads(normed, mesh)
        q, k = apply_rope(q, *rope, mesh), apply_rope(k, *rope, mesh)
        attended = attention(q, k, v, mesh)
        attended = attended[:, :, None]

        # Feed-forward branch [n, t, 4, D].
        hidden = gelu(self.mlp(normed, mesh))

        # One output projection for both branches, gated and added to the residual.
        both = jnp.concatenate([attended, hidden], axis=2)
        return x + mod.gate[:, None] * self.proj(both, mesh)


class FluxTransformer(nnx.Module):
    """Predicts the velocity of the flow, v = eps - x0, at noise level sigma.

    The blocks of each kind are stacked: every array below `double` and `single` has a leading layer
    axis, and the blocks run in a scan. The AdaLN projections (`*_mod`) depend on the conditioning
    alone, so they are computed for all layers at once, outside the scan.
    """

    def __init__(self, config: FluxConfig, rngs: nnx.Rngs):
        self.config = config
        dim = config.hidden_dim
        kw = {"dtype": config.dtype, "param_dtype": config.param_dtype, "rngs": rngs}
        block = {**kw, "quantization": config.quantization}
        double = {**block, "stack": (config.num_layers,)}
        single = {**block, "stack": (config.num_single_layers,)}

        def embedder(n_in: int) -> MLP:
            return MLP(n_in, dim, dim, jax.nn.silu, **kw)

        # Embed the latents, the text, and the parts of the conditioning vector.
        self.img_in = Linear(config.in_channels, dim, **kw)
        self.txt_in = Linear(config.joint_attention_dim, dim, **kw)
        self.time_in = embedder(TIME_CHANNELS)
        self.guidance_in = embedder(TIME_CHANNELS) if config.guidance_embeds else None
        self.vector_in = embedder(config.pooled_projection_dim)

        # Blocks and their modulations.
        self.double = DoubleBlock(config, **double)
        self.double_img_mod = Linear(dim, 6 * dim, **double)
        self.double_txt_mod = Linear(dim, 6 * dim, **double)
        self.single = SingleBlock(config, **single)
        self.single_mod = Linear(dim, 3 * dim, **single)

        # Output layer.
        self.final_mod = Linear(dim, 2 * dim, **kw)
        self.proj_out = Linear(dim, config.in_channels, **kw)

    def __call__(
        self, x: Array, sigma: Array, cond: Cond, height: int, width: int, mesh: Mesh | None = None
    ) -> Array:
        """Noisy latents x [n, s, in_channels] -> velocity, float32 [n, s, in_channels].

        sigma: noise level, float32 [n] in [0, 1]. height and width count tokens, 16 pixels each.
        Raises ValueError if x does not have height * width tokens.
        """
        if x.shape[1] != height * width:
            raise ValueError(
                f"x has {x.shape[1]} tokens, but height {height} times width {width} is "
                f"{height * width}"
            )
        config = self.config
        text_tokens = cond.t5.shape[1]
        x, sigma, cond = pin_rows((x, sigma, cond), mesh)
        rope = rope_table(text_tokens, height, width, config.axes_dims_rope)

        # Embed. The conditioning vector [n, D] modulates every norm below.
        vector = self._vector(sigma, cond, mesh)
        img, txt = pin_rows((self.img_in(x), self.txt_in(cond.t5)), mesh)

        # Double blocks, on separate streams.
        img_mods = modulation_of_layers(self.double_img_mod, vector, mesh)
        txt_mods = modulation_of_layers(self.double_txt_mod, vector, mesh)

        def apply_double(block: DoubleBlock, streams: Any, mods: Any) -> tuple[Array, Array]:
            return block(*streams, *mods, rope, mesh)

        img, txt = scan_blocks(
            apply_double, self.double, (img, txt), (img_mods, txt_mods), config.remat, mesh
        )

        # Single blocks, on the joint sequence.
        joint = jnp.concatenate([txt, img], axis=1)
        mods = modulation_of_layers(self.single_mod, vector, mesh)

        def apply_single(block: SingleBlock, x: Array, mod: Array) -> Array:
            return block(x, mod, rope, mesh)

        joint = scan_blocks(apply_single, self.single, joint, mods, config.remat, mesh)

        # Project the image tokens back to latent channels. In the final modulation, scale comes
        # first.
        scale, shift = jnp.split(pin_rows(self.final_mod(vector), mesh), 2, axis=-1)
        out = output_layer(self.proj_out, joint[:, text_tokens:], shift, scale)
        return pin_rows(out.astype(jnp.float32), mesh)

    def _vector(self, sigma: Array, cond: Cond, mesh: Mesh | None) -> Array:
        """The conditioning vector [n, D]: SiLU of the sum of noise level, pooled text and guidance.

        sigma and guidance stay in float32 until they are embedded: in bfloat16, two consecutive
        steps of the schedule can become equal.
        """
        vector = self.time_in(sinusoidal_embedding(1000.0 * sigma))
        vector = vector + self.vector_in(cond.clip)
        if self.guidance_in is not None:
            guidance = sinusoidal_embedding(1000.0 * cond.guidance)
            vector = vector + self.guidance_in(guidance)
        return pin_rows(jax.nn.silu(vector), mesh)
