"""The transformer of Stable Diffusion 3 and 3.5, as diffusers' SD3Transformer2DModel computes it.

Shapes: n images, s = height * width image tokens, l text tokens, D channels, h heads of d channels
each.
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
from realgen_jax.nn.layers import (
    MLP,
    TIME_CHANNELS,
    Fixed,
    Linear,
    modulated_norm,
    sinusoidal_embedding,
)
from realgen_jax.nn.mmdit import Heads, Stream, modulations
from realgen_jax.nn.stack import (
    check_remat,
    modulation_of_layers,
    output_layer,
    pin_rows,
    scan_blocks,
)
from realgen_jax.nn.tokens import PATCH

CHANNELS = 16  # of a latent pixel


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cond:
    """The conditioning, one row per image."""

    text: Array  # the states of both CLIPs, then T5's [n, l, joint_attention_dim]
    pooled: Array  # the pooled states of both CLIPs [n, pooled_projection_dim]


@dataclass(frozen=True)
class SD3Config:
    """Sizes under diffusers' names (`transformer/config.json`).

    The defaults are SD3-Medium's, whose file has neither dual_attention_layers nor qk_norm.
    image_size is (height, width) of the pictures in tokens; it is in no file.

    Raises ValueError for sizes that do not fit each other, for a model that takes more than noisy
    latents, and for an unknown qk_norm or remat.
    """

    sample_size: int = 128  # side of the pictures in training, in latent pixels
    in_channels: int = 16
    out_channels: int = 16
    num_layers: int = 24
    attention_head_dim: int = 64
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1536
    pooled_projection_dim: int = 2048
    pos_embed_max_size: int = 192  # side of the position table, in tokens
    dual_attention_layers: tuple[int, ...] = ()  # blocks with a second attention, the first ones
    qk_norm: str | None = None  # None, rms_norm
    image_size: tuple[int, int] = (64, 64)
    dtype: Any = jnp.bfloat16  # compute dtype
    param_dtype: Any = jnp.bfloat16  # dtype of the stored weights
    remat: str = "full"  # a key of REMAT_POLICIES
    quantization: str = ""  # of the blocks' kernels: a key of FORMATS in nn/quantize.py, or ""

    def __post_init__(self):
        if (self.in_channels, self.out_channels) != (CHANNELS, CHANNELS):
            raise ValueError(
                f"a model with in_channels {self.in_channels} and out_channels {self.out_channels} "
                f"does not make pictures from text alone; expected {CHANNELS} and {CHANNELS}. "
                "ControlNets and models for inpainting also take other pictures"
            )
        if self.caption_projection_dim != self.hidden_dim or self.hidden_dim % 4:
            raise ValueError(
                f"caption_projection_dim is {self.caption_projection_dim}; expected "
                f"num_attention_heads times attention_head_dim, {self.hidden_dim}, and a multiple "
                "of 4"
            )
        if self.dual_attention_layers != tuple(range(self.dual_layers)):
            raise ValueError(
                f"dual_attention_layers are {self.dual_attention_layers}; expected the first "
                "layers, 0, 1, 2 and so on"
            )
        if self.dual_layers >= self.num_layers:
            raise ValueError(
                f"dual_attention_layers are {self.dual_attention_layers}, but the last of the "
                f"num_layers {self.num_layers} has no second attention"
            )
        if self.qk_norm not in (None, "rms_norm"):
            raise ValueError(f"qk_norm is {self.qk_norm!r}; expected null or 'rms_norm'")
        if max(self.image_size) > self.pos_embed_max_size:
            raise ValueError(
                f"pictures of {self.image_size[0]} x {self.image_size[1]} tokens are larger than "
                f"the model's table of positions, pos_embed_max_size {self.pos_embed_max_size}"
            )
        check_remat(self.remat, self.quantization)

    @property
    def hidden_dim(self) -> int:
        """D, the channels of a token inside the transformer."""
        return self.attention_head_dim * self.num_attention_heads

    @property
    def dual_layers(self) -> int:
        """The number of blocks with a second attention."""
        return len(self.dual_attention_layers)

    @property
    def joint_layers(self) -> int:
        """The number of blocks between those with a second attention and the last one."""
        return self.num_layers - self.dual_layers - 1


def position_table(config: SD3Config, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The positions of a grid of tokens, float32 [len(rows) * len(columns), D].

    Entry (row, column) is sines and cosines of the column, then of the row, D/4 each. Rows and
    columns count from the corner of the largest picture and are scaled to the side of those in
    training, as in diffusers, with frequencies in float64.
    """
    base = config.sample_size // PATCH
    quarter = config.hidden_dim // 4
    frequencies = 1.0 / 10000.0 ** (np.arange(quarter, dtype=np.float64) / quarter)

    def waves(positions: np.ndarray) -> np.ndarray:
        scaled = positions.astype(np.float32) / np.float32(config.pos_embed_max_size / base)
        angles = np.outer(scaled.astype(np.float64), frequencies)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)

    table = np.empty((len(rows), len(columns), 2, 2 * quarter), np.float32)
    table[:, :, 0] = waves(columns)
    table[:, :, 1] = waves(rows)[:, None]
    return table.reshape(-1, 4 * quarter)


def central(config: SD3Config) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the position table that a picture of image_size takes: its centre."""
    height, width = config.image_size
    top = (config.pos_embed_max_size - height) // 2
    left = (config.pos_embed_max_size - width) // 2
    return np.arange(top, top + height), np.arange(left, left + width)


class SecondAttention(Heads):
    """Self-attention of the image tokens, beside the joint attention (SD3.5-M)."""

    def __init__(self, dim: int, head_dim: int, qk_norm: bool, **kw: Any):
        super().__init__(dim, head_dim, qk_norm, **kw)
        self.proj = Linear(dim, dim, inputs_split=True, **kw)

    def __call__(self, x: Array, mesh: Mesh | None) -> Array:
        """x [n, s, D] -> the same."""
        q, k, v = self.heads(x, mesh)
        return self.proj(attention(q, k, v, mesh), mesh)


class JointBlock(nnx.Module):
    """Separate streams for image and text with a joint attention (arXiv 2403.03206).

    second: whether the image tokens also attend to themselves.
    """

    def __init__(self, config: SD3Config, second: bool, **kw: Any):
        sizes = _head_sizes(config)
        self.img = Stream(*sizes, **kw)
        self.txt = Stream(*sizes, **kw)
        self.second = SecondAttention(*sizes, **kw) if second else None

    @jax.named_scope("joint")
    def __call__(
        self, img: Array, txt: Array, img_mod: Array, txt_mod: Array, mesh: Mesh | None
    ) -> tuple[Array, Array]:
        """img [n, s, D], txt [n, l, D] -> the same; img_mod [n, 6D or 9D], txt_mod [n, 6D]."""
        # Modulations of the attention and the feed-forward, and of the second attention.
        branches = 2 if self.second is None else 3
        img_attn, img_mlp, *second = modulations(img_mod, branches)
        txt_attn, txt_mlp = modulations(txt_mod)

        # Queries, keys and values of the sequence [image, text], [n, s + l, h, d].
        img_heads = self.img.heads(modulated_norm(img, img_attn.shift, img_attn.scale), mesh)
        txt_heads = self.txt.heads(modulated_norm(txt, txt_attn.shift, txt_attn.scale), mesh)
        q, k, v = [jnp.concatenate(pair, axis=1) for pair in zip(img_heads, txt_heads, strict=True)]

        # Attend, and split the two streams again.
        attended = attention(q, k, v, mesh)
        img_attended, txt_attended = jnp.split(attended, [img.shape[1]], axis=1)

        # The second attention reads the block's input too.
        if self.second is not None:
            (mod,) = second
            normed = modulated_norm(img, mod.shift, mod.scale)
            img = img + mod.gate[:, None] * self.second(normed, mesh)

        # Add the gated outputs of the attention, then of the feed-forward, to each stream.
        img = self.img(img, img_attended, img_attn.gate, img_mlp, mesh)
        txt = self.txt(txt, txt_attended, txt_attn.gate, txt_mlp, mesh)
        return img, txt


class LastBlock(nnx.Module):
    """The last block: the text is only attended to."""

    def __init__(self, config: SD3Config, **kw: Any):
        self.img = Stream(*_head_sizes(config), **kw)
        self.txt = Heads(*_head_sizes(config), **kw)

    @jax.named_scope("last")
    def __call__(
        self, img: Array, txt: Array, img_mod: Array, txt_mod: Array, mesh: Mesh | None
    ) -> Array:
        """img [n, s, D], txt [n, l, D], img_mod [n, 6D], txt_mod [n, 2D] -> [n, s, D]."""
        attn, mlp = modulations(img_mod)
        txt_scale, txt_shift = jnp.split(txt_mod, 2, axis=-1)  # the scale comes first

        # Only the image has queries. The text's are in the files, but nothing reads them.
        q, img_k, img_v = self.img.heads(modulated_norm(img, attn.shift, attn.scale), mesh)
        _, txt_k, txt_v = self.txt.heads(modulated_norm(txt, txt_shift, txt_scale), mesh)
        k = jnp.concatenate([img_k, txt_k], axis=1)
        v = jnp.concatenate([img_v, txt_v], axis=1)
        return self.img(img, attention(q, k, v, mesh), attn.gate, mlp, mesh)


def _head_sizes(config: SD3Config) -> tuple[int, int, bool]:
    """The sizes of attention heads, as `Heads` takes them."""
    return config.hidden_dim, config.attention_head_dim, config.qk_norm is not None


class SD3Transformer(nnx.Module):
    """Predicts the velocity of the flow, v = eps - x0, at noise level sigma.

    The blocks of each kind are stacked: every array below `dual`, `joint` and `last` has a leading
    layer axis, and the blocks run in a scan. The AdaLN projections (`*_mod`) depend on the
    conditioning alone, so they are computed for all layers at once, outside the scan.
    """

    def __init__(self, config: SD3Config, rngs: nnx.Rngs):
        self.config = config
        dim = config.hidden_dim
        channels = PATCH**2 * config.in_channels
        kw = {"dtype": config.dtype, "param_dtype": config.param_dtype, "rngs": rngs}
        block = {**kw, "quantization": config.quantization}
        dual = {**block, "stack": (config.dual_layers,)}
        joint = {**block, "stack": (config.joint_layers,)}
        last = {**block, "stack": (1,)}

        def embedder(n_in: int) -> MLP:
            return MLP(n_in, dim, dim, jax.nn.silu, **kw)

        # Embed the latents, their positions, the text, and the parts of the conditioning vector.
        self.img_in = Linear(channels, dim, **kw)
        positions = position_table(config, *central(config))
        self.pos = Fixed(jnp.asarray(positions, config.param_dtype))
        self.txt_in = Linear(config.joint_attention_dim, dim, **kw)
        self.time_in = embedder(TIME_CHANNELS)
        self.vector_in = embedder(config.pooled_projection_dim)

        # Blocks and their modulations.
        if config.dual_layers:
            self.dual = JointBlock(config, second=True, **dual)
            self.dual_img_mod = Linear(dim, 9 * dim, **dual)
            self.dual_txt_mod = Linear(dim, 6 * dim, **dual)
        if config.joint_layers:
            self.joint = JointBlock(config, second=False, **joint)
            self.joint_img_mod = Linear(dim, 6 * dim, **joint)
            self.joint_txt_mod = Linear(dim, 6 * dim, **joint)
        self.last = LastBlock(config, **last)
        self.last_img_mod = Linear(dim, 6 * dim, **last)
        self.last_txt_mod = Linear(dim, 2 * dim, **last)

        # Output layer.
        self.final_mod = Linear(dim, 2 * dim, **kw)
        self.proj_out = Linear(dim, channels, **kw)

    def __call__(
        self, x: Array, sigma: Array, cond: Cond, height: int, width: int, mesh: Mesh | None = None
    ) -> Array:
        """Noisy latents x [n, s, 4 in_channels] -> velocity, float32 [n, s, 4 in_channels].

        sigma: noise level, float32 [n] in [0, 1]. height and width count tokens, 16 pixels each.
        Raises ValueError if they are not the config's image_size, or x has another number of
        tokens.
        """
        if (height, width) != self.config.image_size or x.shape[1] != height * width:
            raise ValueError(
                f"x has {x.shape[1]} tokens and the picture {height} x {width}, but the positions "
                f"are those of a picture of {self.config.image_size} tokens"
            )
        x, sigma, cond = pin_rows((x, sigma, cond), mesh)

        # Embed. The conditioning vector [n, D] modulates every norm below.
        vector = self._vector(sigma, cond, mesh)
        img = self.img_in(x)
        img = img + self.pos[...].astype(img.dtype)
        img, txt = pin_rows((img, self.txt_in(cond.text)), mesh)

        # The blocks; the last one returns the image alone.
        if self.config.dual_layers:
            mods = self.dual_img_mod, self.dual_txt_mod
            img, txt = self._run(self.dual, (img, txt), mods, vector, mesh)
        if self.config.joint_layers:
            mods = self.joint_img_mod, self.joint_txt_mod
            img, txt = self._run(self.joint, (img, txt), mods, vector, mesh)
        img = self._last(img, txt, vector, mesh)

        # Project the image tokens back to latent channels. In the final modulation, scale comes
        # first. The output's channels are in another order than the input's.
        scale, shift = jnp.split(pin_rows(self.final_mod(vector), mesh), 2, axis=-1)
        out = output_layer(self.proj_out, img, shift, scale)
        out = rearrange(out, "n s (dy dx c) -> n s (c dy dx)", dy=PATCH, dx=PATCH)
        return pin_rows(out.astype(jnp.float32), mesh)

    def _vector(self, sigma: Array, cond: Cond, mesh: Mesh | None) -> Array:
        """The conditioning vector [n, D]: SiLU of the sum of noise level and pooled text.

        sigma stays in float32 until it is embedded: in bfloat16, two consecutive steps of the
        schedule can become equal.
        """
        vector = self.time_in(sinusoidal_embedding(1000.0 * sigma))
        vector = vector + self.vector_in(cond.pooled)
        return pin_rows(jax.nn.silu(vector), mesh)

    def _run(
        self,
        blocks: JointBlock,
        streams: tuple[Array, Array],
        projections: tuple[Linear, Linear],
        vector: Array,
        mesh: Mesh | None,
    ) -> tuple[Array, Array]:
        """Run one stack of blocks on (img [n, s, D], txt [n, l, D])."""
        mods = tuple(modulation_of_layers(project, vector, mesh) for project in projections)

        def apply(block: JointBlock, streams: Any, mods: Any) -> tuple[Array, Array]:
            return block(*streams, *mods, mesh)

        return scan_blocks(apply, blocks, streams, mods, self.config.remat, mesh)

    def _last(self, img: Array, txt: Array, vector: Array, mesh: Mesh | None) -> Array:
        """Run the last block, which changes only the image: -> [n, s, D]."""
        projections = self.last_img_mod, self.last_txt_mod
        mods = tuple(modulation_of_layers(project, vector, mesh) for project in projections)

        def apply(block: LastBlock, img: Array, mods: Any) -> Array:
            return block(img, txt, *mods, mesh)

        return scan_blocks(apply, self.last, img, mods, self.config.remat, mesh)
