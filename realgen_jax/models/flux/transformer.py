"""The FLUX.1 transformer. Numerics follow diffusers' FluxTransformer2DModel; layout follows the model's own figure."""

from dataclasses import dataclass
from functools import partial
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
    Linear,
    QKNorm,
    apply_rope,
    modulated_norm,
    sinusoidal_embedding,
)
from realgen_jax.nn.stack import REMAT_POLICIES, pin_rows, scan_blocks
from realgen_jax.sharding import BATCH_AXES, constrain

_gelu = partial(jax.nn.gelu, approximate=True)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cond:
    """What a picture is conditioned on: T5 states [n, l, joint_dim], pooled CLIP [n, pooled_dim], guidance f32 [n]."""

    t5: Array
    clip: Array
    guidance: Array


@dataclass(frozen=True)
class FluxConfig:
    """Sizes under diffusers' names (`transformer/config.json`); the defaults are FLUX.1-dev's.

    `dtype` is what is computed in, `param_dtype` what the weights are kept in, `remat` a key of REMAT_POLICIES.
    """

    in_channels: int = 64
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = True
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    dtype: Any = jnp.bfloat16
    param_dtype: Any = jnp.bfloat16
    remat: str = "full"

    def __post_init__(self):
        if sum(self.axes_dims_rope) != self.attention_head_dim:
            raise ValueError(
                f"axes_dims_rope {self.axes_dims_rope} add up to {sum(self.axes_dims_rope)}, but must add up to "
                f"attention_head_dim {self.attention_head_dim}"
            )
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat is {self.remat!r}; choose one of {', '.join(REMAT_POLICIES)}")

    @property
    def hidden_dim(self) -> int:
        return self.attention_head_dim * self.num_attention_heads


def rope_table(
    text_tokens: int, height: int, width: int, axes_dims: tuple[int, ...], theta: float = 10000.0
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines [t, d/2] for the sequence [text, image], t = text_tokens + height width.

    Positions are (0, 0, 0) for text and (0, row, column) for the image tokens; frequencies in float64, as diffusers
    computes them. Shapes are static, so this runs once, on the host, while tracing.
    """
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    image = np.stack([np.zeros_like(rows), rows, columns], axis=-1).reshape(-1, 3)
    positions = np.concatenate([np.zeros((text_tokens, 3)), image])
    angles = [
        positions[:, i, None] * theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
        for i, dim in enumerate(axes_dims)
    ]
    table = np.concatenate(angles, axis=-1)
    return np.cos(table).astype(np.float32), np.sin(table).astype(np.float32)


def _qkv(
    x: Array, project: Linear, norm: QKNorm, head_dim: int, mesh: Mesh | None
) -> tuple[Array, Array, Array]:
    """[n, t, D] -> normalised q, k and plain v, each [n, t, h, d]."""
    q, k, v = (
        rearrange(a, "n t 1 (h d) -> n t h d", d=head_dim)
        for a in jnp.split(project(x, mesh), 3, axis=2)
    )
    return *norm(q, k), v


class Stream(nnx.Module):
    """One modality's half of a double block: its projections around the joint attention and its feed-forward."""

    def __init__(self, config: FluxConfig, **kw: Any):
        dim = config.hidden_dim
        self.qkv = Linear(dim, (3, dim), **kw)
        self.norm = QKNorm(
            config.attention_head_dim, param_dtype=kw["param_dtype"], stack=kw["stack"]
        )
        self.proj = Linear(dim, dim, **kw)
        self.mlp = MLP(dim, 4 * dim, dim, _gelu, **kw)

    def __call__(
        self,
        x: Array,
        attended: Array,
        gate: Array,
        mlp_modulation: tuple[Array, Array, Array],
        mesh: Mesh | None,
    ) -> Array:
        """Add the attention's and the feed-forward's gated outputs to the stream x [n, t, D]."""
        x = pin_rows(x + gate[:, None] * self.proj(attended), mesh)
        shift, scale, mlp_gate = mlp_modulation
        return x + mlp_gate[:, None] * self.mlp(modulated_norm(x, shift, scale))


class DoubleBlock(nnx.Module):
    """Text and image in separate streams that meet in one attention (MM-DiT, arXiv 2403.03206)."""

    def __init__(self, config: FluxConfig, **kw: Any):
        self.head_dim = config.attention_head_dim
        self.img = Stream(config, **kw)
        self.txt = Stream(config, **kw)

    @jax.named_scope("double")
    def __call__(
        self,
        img: Array,
        txt: Array,
        img_mod: Array,
        txt_mod: Array,
        rope: tuple[Array, Array],
        mesh: Mesh | None,
    ) -> tuple[Array, Array]:
        """img [n, s, D], txt [n, l, D]; the modulations [n, 6D]: shift, scale, gate of attention, then of the MLP."""
        (i_shift, i_scale, i_gate, *i_mlp), (t_shift, t_scale, t_gate, *t_mlp) = (
            jnp.split(m, 6, axis=-1) for m in (img_mod, txt_mod)
        )
        image = _qkv(
            modulated_norm(img, i_shift, i_scale), self.img.qkv, self.img.norm, self.head_dim, mesh
        )
        text = _qkv(
            modulated_norm(txt, t_shift, t_scale), self.txt.qkv, self.txt.norm, self.head_dim, mesh
        )
        q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(text, image, strict=True))
        attended = attention(apply_rope(q, *rope), apply_rope(k, *rope), v, mesh)
        txt_attended, img_attended = jnp.split(attended, [txt.shape[1]], axis=1)
        return self.img(img, img_attended, i_gate, i_mlp, mesh), self.txt(
            txt, txt_attended, t_gate, t_mlp, mesh
        )


class SingleBlock(nnx.Module):
    """One sequence [text, image]; attention and feed-forward in parallel on the same normalised input."""

    def __init__(self, config: FluxConfig, **kw: Any):
        dim = config.hidden_dim
        self.head_dim = config.attention_head_dim
        self.qkv = Linear(dim, (3, dim), **kw)
        self.norm = QKNorm(
            config.attention_head_dim, param_dtype=kw["param_dtype"], stack=kw["stack"]
        )
        self.mlp = Linear(dim, (4, dim), **kw)
        self.proj = Linear((5, dim), dim, **kw)

    @jax.named_scope("single")
    def __call__(self, x: Array, mod: Array, rope: tuple[Array, Array], mesh: Mesh | None) -> Array:
        """x [n, l + s, D], mod [n, 3D]: shift, scale, gate."""
        shift, scale, gate = jnp.split(mod, 3, axis=-1)
        normed = modulated_norm(x, shift, scale)
        q, k, v = _qkv(normed, self.qkv, self.norm, self.head_dim, mesh)
        attended = attention(apply_rope(q, *rope), apply_rope(k, *rope), v, mesh)
        hidden = jnp.concatenate([attended[:, :, None], _gelu(self.mlp(normed, mesh))], axis=2)
        return x + gate[:, None] * self.proj(hidden, mesh)


class FluxTransformer(nnx.Module):
    """Velocity of the flow, v = eps - x0, at noise level sigma.

    Blocks are stacked: every array below `double` and `single` has a leading layer axis and the blocks run in a scan,
    rematerialised. The AdaLN projections depend on the conditioning alone, so they leave the scan as one product
    for all layers.
    """

    def __init__(self, config: FluxConfig, rngs: nnx.Rngs):
        self.config = config
        dim = config.hidden_dim
        kw = {"dtype": config.dtype, "param_dtype": config.param_dtype, "rngs": rngs}
        double, single = (
            {**kw, "stack": (config.num_layers,)},
            {**kw, "stack": (config.num_single_layers,)},
        )
        self.img_in = Linear(config.in_channels, dim, **kw)
        self.txt_in = Linear(config.joint_attention_dim, dim, **kw)
        self.time_in = MLP(256, dim, dim, jax.nn.silu, **kw)
        self.guidance_in = MLP(256, dim, dim, jax.nn.silu, **kw) if config.guidance_embeds else None
        self.vector_in = MLP(config.pooled_projection_dim, dim, dim, jax.nn.silu, **kw)
        self.double = DoubleBlock(config, **double)
        self.double_img_mod = Linear(dim, 6 * dim, **double)
        self.double_txt_mod = Linear(dim, 6 * dim, **double)
        self.single = SingleBlock(config, **single)
        self.single_mod = Linear(dim, 3 * dim, **single)
        self.final_mod = Linear(dim, 2 * dim, **kw)
        self.proj_out = Linear(dim, config.in_channels, **kw)

    def __call__(
        self, x: Array, sigma: Array, cond: Cond, height: int, width: int, mesh: Mesh | None = None
    ) -> Array:
        """x [n, s, in_channels] packed latents, sigma f32 [n] in [0, 1] -> velocity float32 [n, s, in_channels].

        `height` and `width` count latent patches (16 pixels each): s = height width. sigma and guidance stay in float32
        up to their sinusoids: in bfloat16 two neighbouring steps of the schedule can fall together.
        """
        if x.shape[1] != height * width:
            raise ValueError(
                f"x has {x.shape[1]} tokens, but height {height} times width {width} is {height * width}"
            )
        config = self.config
        x, sigma, cond = pin_rows((x, sigma, cond), mesh)
        rope = rope_table(cond.t5.shape[1], height, width, config.axes_dims_rope)
        vec = self.time_in(sinusoidal_embedding(1000.0 * sigma)) + self.vector_in(cond.clip)
        if config.guidance_embeds:
            vec = vec + self.guidance_in(sinusoidal_embedding(1000.0 * cond.guidance))
        vec = pin_rows(jax.nn.silu(vec), mesh)

        img, txt = pin_rows((self.img_in(x), self.txt_in(cond.t5)), mesh)

        @jax.named_scope("modulation")
        def per_layer(mod: Linear) -> Array:
            """A quarter of the weights meets one row an image here: the rows go to the weights, and come back."""
            out = constrain(
                mod(constrain(vec, mesh, "data")), mesh, None, "data", ("fsdp", "tensor")
            )
            return constrain(out, mesh, None, BATCH_AXES)

        modulation = per_layer(self.double_img_mod), per_layer(self.double_txt_mod)
        img, txt = scan_blocks(
            lambda block, streams, mods: block(*streams, *mods, rope, mesh),
            self.double,
            (img, txt),
            modulation,
            config.remat,
            mesh,
        )
        both = jnp.concatenate([txt, img], axis=1)
        apply = lambda block, x, mod: block(x, mod, rope, mesh)  # noqa: E731
        both = scan_blocks(apply, self.single, both, per_layer(self.single_mod), config.remat, mesh)

        scale, shift = jnp.split(pin_rows(self.final_mod(vec), mesh), 2, axis=-1)
        out = self.proj_out(modulated_norm(both[:, txt.shape[1] :], shift, scale))
        return pin_rows(out.astype(jnp.float32), mesh)
