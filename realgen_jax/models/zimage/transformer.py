"""The Z-Image transformer, with the numerics of diffusers' ZImageTransformer2DModel.

Shapes: n images, s = height * width image tokens, l caption tokens; s32 and l32 are those numbers
rounded up to a multiple of 32. D channels, h heads of d channels each, F channels in the
feed-forward, C channels of the embedded noise level.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from realgen_jax.nn.attention import attention
from realgen_jax.nn.layers import MLP, TIME_CHANNELS, Linear, rms_norm, sinusoidal_embedding
from realgen_jax.nn.mmdit import Heads
from realgen_jax.nn.rope import apply_rope
from realgen_jax.nn.stack import (
    check_remat,
    modulation_of_layers,
    output_layer,
    pin_rows,
    scan_blocks,
)
from realgen_jax.nn.tokens import PATCH

EPS = 1e-5  # of the RMS norms
MULTIPLE = 32  # image and caption are padded to a multiple of this number of tokens
THETA = 256.0  # base of the rotary frequencies
TIME_HIDDEN = 1024  # hidden channels of the embedder of the noise level
MODULATION_CHANNELS = 256  # channels of the embedded noise level, or D if that is less

Rope = tuple[Array, Array]  # cosines and sines, each float32 [tokens, d/2] or [n, tokens, d/2]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cond:
    """The conditioning: the caption's states, one row per image."""

    caption: Array  # [n, l, cap_feat_dim]; what it holds from `length` on is not read
    length: Array  # true number of tokens, int32 [n], at least 1


@dataclass(frozen=True)
class ZImageConfig:
    """Sizes under diffusers' names (`transformer/config.json`); the defaults are Z-Image's.

    Raises ValueError for sizes that do not fit each other and for an unknown remat.
    """

    in_channels: int = 16  # of a latent pixel
    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    n_kv_heads: int = 30
    cap_feat_dim: int = 2560
    axes_dims: tuple[int, ...] = (32, 48, 48)
    axes_lens: tuple[int, ...] = (1024, 512, 512)  # number of positions on each axis
    dtype: Any = jnp.bfloat16  # compute dtype
    param_dtype: Any = jnp.bfloat16  # dtype of the stored weights
    remat: str = "full"  # a key of REMAT_POLICIES
    quantization: str = ""  # of the blocks' kernels: a key of FORMATS in nn/quantize.py, or ""

    def __post_init__(self):
        if self.n_kv_heads != self.n_heads:
            raise ValueError(
                f"n_kv_heads is {self.n_kv_heads}; expected n_heads, {self.n_heads}: keys and "
                "values have as many heads as queries"
            )
        if len(self.axes_dims) != 3 or len(self.axes_lens) != 3:
            raise ValueError(
                f"axes_dims {self.axes_dims} and axes_lens {self.axes_lens} must have three "
                "numbers each: caption and image, row, column"
            )
        rope_channels = sum(self.axes_dims)
        if rope_channels * self.n_heads != self.dim:
            raise ValueError(
                f"axes_dims {self.axes_dims} add up to {rope_channels}, but must add up to the "
                f"channels of a head, dim {self.dim} / n_heads {self.n_heads}"
            )
        check_remat(self.remat, self.quantization)

    @property
    def hidden_dim(self) -> int:
        """D, the channels of a token, under the name that all families share."""
        return self.dim

    @property
    def num_attention_heads(self) -> int:
        """h, under the name that all families share."""
        return self.n_heads

    @property
    def attention_head_dim(self) -> int:
        """d, the channels of a head."""
        return self.dim // self.n_heads

    @property
    def mlp_dim(self) -> int:
        """F, the channels inside the feed-forward. Floating-point division, as in diffusers."""
        return int(self.dim / 3 * 8)

    @property
    def modulation_dim(self) -> int:
        """C, the channels of the embedded noise level, which modulates the blocks."""
        return min(self.dim, MODULATION_CHANNELS)


def padded(tokens: int) -> int:
    """Round a number of tokens up to a multiple of MULTIPLE."""
    return -(-tokens // MULTIPLE) * MULTIPLE


def _axis_table(positions: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of the positions 0, 1, ... on one axis, float32 [positions, channels/2].

    As in diffusers, the angle is the product in float64, rounded to float32.
    """
    frequencies = 1.0 / THETA ** (np.arange(0, channels, 2, dtype=np.float64) / channels)
    angles = np.outer(np.arange(positions), frequencies).astype(np.float32)
    return np.cos(angles), np.sin(angles)


def rope_tables(
    config: ZImageConfig, caption_tokens: int, height: int, width: int, length: Array
) -> tuple[Rope, Rope]:
    """Cosines and sines for image tokens, [n, s32, d/2], and for caption tokens, [l32, d/2].

    caption_tokens is l32; length: the captions' numbers of tokens with padding, int32 [n].

    Positions are (1 ... l32, 0, 0) for caption tokens, (length + 1, row, column) for image tokens,
    and (0, 0, 0) for image padding. Raises ValueError for a position beyond config.axes_lens.
    """
    sizes = (caption_tokens + 2, height, width)
    for size, largest in zip(sizes, config.axes_lens, strict=True):
        if size > largest:
            raise ValueError(
                f"a caption of {caption_tokens} tokens and a picture of {height} x {width} tokens "
                f"need {sizes} positions, but the model's axes_lens are {config.axes_lens}"
            )
    tables = [_axis_table(*axis) for axis in zip(sizes, config.axes_dims, strict=True)]

    # Rows and columns of the image tokens; -> [s32], with 0 for padding.
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    padding = (0, padded(height * width) - height * width)
    rows = np.pad(rows.ravel(), padding)
    columns = np.pad(columns.ravel(), padding)
    real = np.pad(np.ones(height * width, np.int32), padding)

    # The first axis depends on the image's own caption.
    first = (length[:, None] + 1) * real

    image = []
    caption = []
    for along_first, along_rows, along_columns in zip(*tables, strict=True):
        # Image [n, s32, d/2].
        fixed = np.concatenate([along_rows[rows], along_columns[columns]], axis=-1)
        fixed = jnp.broadcast_to(fixed, (len(length), *fixed.shape))
        image.append(jnp.concatenate([jnp.asarray(along_first)[first], fixed], axis=-1))

        # Caption [l32, d/2].
        origin = np.concatenate([along_rows[0], along_columns[0]])
        origin = np.broadcast_to(origin, (caption_tokens, len(origin)))
        caption.append(np.concatenate([along_first[1 : caption_tokens + 1], origin], axis=-1))
    return tuple(image), tuple(caption)


class GatedMLP(nnx.Module):
    """SiLU(x W1) * (x W3), then W2: [..., D] -> [..., D] (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden: int, **kw: Any):
        self.fc1 = Linear(dim, (2, hidden), bias=False, **kw)
        self.fc2 = Linear(hidden, dim, bias=False, inputs_split=True, **kw)

    def __call__(self, x: Array, mesh: Mesh | None) -> Array:
        both = self.fc1(x, mesh)
        return self.fc2(jax.nn.silu(both[..., 0, :]) * both[..., 1, :], mesh)


class Block(Heads):
    """Attention, then a gated feed-forward, each with an RMS norm before and after it."""

    def __init__(self, config: ZImageConfig, **kw: Any):
        dim = config.dim
        norms = {"param_dtype": kw["param_dtype"], "stack": kw["stack"]}
        super().__init__(dim, config.attention_head_dim, eps=EPS, bias=False, **kw)
        self.proj = Linear(dim, dim, bias=False, inputs_split=True, **kw)
        self.mlp = GatedMLP(dim, config.mlp_dim, **kw)

        # Before and after the attention, before and after the feed-forward.
        self.norm1 = _scale(dim, **norms)
        self.norm2 = _scale(dim, **norms)
        self.norm3 = _scale(dim, **norms)
        self.norm4 = _scale(dim, **norms)

    @jax.named_scope("block")
    def __call__(
        self, x: Array, mod: Array | None, rope: Rope, lengths: Array | None, mesh: Mesh | None
    ) -> Array:
        """x [n, tokens, D] -> the same; mod [n, 4D], or None for a block without modulation.

        lengths: as in nn/attention.py.
        """
        scale_attention, gate_attention, scale_mlp, gate_mlp = _modulation(mod)

        # Attention, with rotary positions on queries and keys.
        y = rms_norm(x, self.norm1[...], EPS) * scale_attention
        q, k, v = self.heads(y, mesh)
        q, k = apply_rope(q, *rope, mesh), apply_rope(k, *rope, mesh)
        attended = attention(q, k, v, mesh, lengths)
        x = x + gate_attention * rms_norm(self.proj(attended, mesh), self.norm2[...], EPS)
        x = pin_rows(x, mesh)

        # Feed-forward.
        y = rms_norm(x, self.norm3[...], EPS) * scale_mlp
        return x + gate_mlp * rms_norm(self.mlp(y, mesh), self.norm4[...], EPS)


def _scale(dim: int, param_dtype: Any, stack: tuple[int, ...] = ()) -> nnx.Param:
    """The learned scale of an RMS norm, [*stack, D]."""
    return nnx.Param(jnp.ones((*stack, dim), param_dtype))


def _modulation(mod: Array | None) -> tuple[Any, Any, Any, Any]:
    """[n, 4D] -> scale and gate of the attention, then of the feed-forward, each [n, 1, D].

    Without modulation they are 1.
    """
    if mod is None:
        return 1, 1, 1, 1
    scale_attention, gate_attention, scale_mlp, gate_mlp = jnp.split(mod[:, None], 4, axis=-1)
    return 1 + scale_attention, jnp.tanh(gate_attention), 1 + scale_mlp, jnp.tanh(gate_mlp)


class ZImageTransformer(nnx.Module):
    """Predicts the velocity of the flow, v = eps - x0, at noise level sigma.

    Image and caption have refiner blocks of their own; then all blocks see the sequence
    [image, caption]. The blocks of each kind are stacked: every array below `noise`, `context` and
    `layers` has a leading layer axis, and the blocks run in a scan. The projections of the noise
    level (`*_mod`) are computed for all layers at once, outside the scan.
    """

    def __init__(self, config: ZImageConfig, rngs: nnx.Rngs):
        self.config = config
        dim = config.dim
        level = config.modulation_dim
        channels = PATCH**2 * config.in_channels
        kw = {"dtype": config.dtype, "param_dtype": config.param_dtype, "rngs": rngs}
        block = {**kw, "quantization": config.quantization}
        refiners = {**block, "stack": (config.n_refiner_layers,)}
        layers = {**block, "stack": (config.n_layers,)}

        # Embed the latents, the caption and the noise level.
        self.img_in = Linear(channels, dim, **kw)
        self.cap_norm = _scale(config.cap_feat_dim, config.param_dtype)
        self.cap_in = Linear(config.cap_feat_dim, dim, **kw)
        self.time_in = MLP(TIME_CHANNELS, TIME_HIDDEN, level, jax.nn.silu, **kw)

        # The tokens that fill image and caption up to a multiple of 32.
        self.x_pad = nnx.Param(jnp.zeros((1, dim), config.param_dtype))
        self.cap_pad = nnx.Param(jnp.zeros((1, dim), config.param_dtype))

        # Blocks and their modulations. The caption's refiner has none.
        self.noise = Block(config, **refiners)
        self.noise_mod = Linear(level, 4 * dim, **refiners)
        self.context = Block(config, **refiners)
        self.layers = Block(config, **layers)
        self.layers_mod = Linear(level, 4 * dim, **layers)

        # Output layer.
        self.final_mod = Linear(level, dim, **kw)
        self.proj_out = Linear(dim, channels, **kw)

    def __call__(
        self, x: Array, sigma: Array, cond: Cond, height: int, width: int, mesh: Mesh | None = None
    ) -> Array:
        """Noisy latents x [n, s, 4 in_channels] -> velocity, float32 [n, s, 4 in_channels].

        sigma: noise level, float32 [n] in [0, 1]. height and width count tokens, 16 pixels each.
        Raises ValueError if x does not have height * width tokens, and for a caption or a picture
        with more tokens than the model has positions.
        """
        if x.shape[1] != height * width:
            raise ValueError(
                f"x has {x.shape[1]} tokens, but height {height} times width {width} is "
                f"{height * width}"
            )
        config = self.config
        x, sigma, cond = pin_rows((x, sigma, cond), mesh)
        image_tokens = padded(height * width)
        caption_tokens = padded(cond.caption.shape[1])

        # A caption with its own padding, which is attended to; the tokens after it are not.
        length = -(-cond.length // MULTIPLE) * MULTIPLE
        rope = rope_tables(config, caption_tokens, height, width, length)
        img_rope, cap_rope = pin_rows(rope[0], mesh), rope[1]

        # Embed. The noise level [n, C] modulates the blocks. Z-Image's time is 0 for pure noise;
        # it stays in float32 until it is embedded.
        level = pin_rows(self.time_in(sinusoidal_embedding(1000.0 * (1.0 - sigma))), mesh)
        img, cap = pin_rows((self._image(x), self._caption(cond)), mesh)

        # The refiners. The image has no tokens that are not attended to.
        img = self._run(self.noise, img, self.noise_mod, level, img_rope, None, mesh)
        cap = self._run(self.context, cap, None, None, cap_rope, length, mesh)

        # All blocks, on the joint sequence. The image comes first, so that all tokens which are
        # attended to stand before those which are not.
        joint = jnp.concatenate([img, cap], axis=1)
        joint_rope = []
        for of_image, of_caption in zip(img_rope, cap_rope, strict=True):
            of_caption = jnp.broadcast_to(of_caption, (len(x), *of_caption.shape))
            joint_rope.append(jnp.concatenate([of_image, of_caption], axis=1))
        lengths = image_tokens + length
        joint = self._run(self.layers, joint, self.layers_mod, level, joint_rope, lengths, mesh)

        # Project the image tokens back to latent channels. The network predicts -v.
        scale = pin_rows(self.final_mod(jax.nn.silu(level)), mesh)
        img = joint[:, : height * width]
        out = -output_layer(self.proj_out, img, jnp.zeros_like(scale), scale)
        out = rearrange(out, "n s (dy dx c) -> n s (c dy dx)", dy=PATCH, dx=PATCH)
        return pin_rows(out.astype(jnp.float32), mesh)

    def _image(self, x: Array) -> Array:
        """Embed the latents: [n, s, 4 in_channels] -> [n, s32, D], with learned padding."""
        x = rearrange(x, "n s (c dy dx) -> n s (dy dx c)", dy=PATCH, dx=PATCH)
        img = self.img_in(x)
        n, tokens, dim = img.shape
        pad = jnp.broadcast_to(self.x_pad[...].astype(img.dtype), (n, padded(tokens) - tokens, dim))
        return jnp.concatenate([img, pad], axis=1)

    def _caption(self, cond: Cond) -> Array:
        """Embed the caption: [n, l32, D]; learned padding takes the place of all after its end."""
        tokens = cond.caption.shape[1]
        caption = cond.caption.astype(self.config.dtype)
        caption = jnp.pad(caption, ((0, 0), (0, padded(tokens) - tokens), (0, 0)))
        cap = self.cap_in(rms_norm(caption, self.cap_norm[...], EPS))
        real = jnp.arange(cap.shape[1]) < cond.length[:, None]
        return jnp.where(real[..., None], cap, self.cap_pad[...].astype(cap.dtype))

    def _run(
        self,
        blocks: Block,
        x: Array,
        project: Linear | None,
        level: Array | None,
        rope: Any,
        lengths: Array | None,
        mesh: Mesh | None,
    ) -> Array:
        """Run one stack of blocks on x [n, tokens, D]; without `project` they are not modulated."""
        mods = None if project is None else modulation_of_layers(project, level, mesh)

        def apply(block: Block, x: Array, mod: Array | None) -> Array:
            return block(x, mod, rope, lengths, mesh)

        return scan_blocks(apply, blocks, x, mods, self.config.remat, mesh)
