"""FLUX's image autoencoder (diffusers' AutoencoderKL without quantisation convolutions), channels last."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from realgen_jax.nn.layers import EPS, Linear
from realgen_jax.nn.tokens import unpack
from realgen_jax.sharding import BATCH_AXES, batch_devices, constrain

# Of the largest feature map of the pictures that are decoded together: what a CPU's cache holds of it. A large picture
# fills any GPU by itself, and decoding several at once would only take more memory.
DECODE_BYTES = 2**23


@dataclass(frozen=True)
class VaeConfig:
    """Sizes under diffusers' names (`vae/config.json`); the defaults are FLUX.1-dev's. `dtype`: compute and weights."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 16
    norm_num_groups: int = 32
    scaling_factor: float = 0.3611
    shift_factor: float = 0.1159
    dtype: Any = jnp.float32


class GroupNorm(nnx.GroupNorm):
    """Group normalisation, statistics in float32 and the variance in two passes, as torch has it.

    Sums run over positions first, whole rows of channels at a time, and over a group's few channels last: three times
    as fast on a CPU as flax's own reduction over [h, w, channels of a group], and the same numbers.
    """

    def __init__(self, channels: int, config: VaeConfig, rngs: nnx.Rngs):
        kw = {"epsilon": EPS, "dtype": config.dtype, "param_dtype": config.dtype, "rngs": rngs}
        super().__init__(channels, config.norm_num_groups, **kw)

    def __call__(self, x: Array) -> Array:
        """[n, h, w, c] -> [n, h, w, c]."""
        _, h, w, c = x.shape

        def group_mean(sums: Array) -> Array:
            """Sums over positions [n, c] -> means over positions and the channel's group, [n, 1, 1, c]."""
            groups = sums.reshape(-1, self.num_groups, self.group_size).mean(
                axis=-1, keepdims=True
            ) / (h * w)
            return jnp.broadcast_to(groups, (*groups.shape[:2], self.group_size)).reshape(
                -1, 1, 1, c
            )

        x32 = x.astype(jnp.float32)
        x32 = x32 - group_mean(x32.sum(axis=(1, 2)))
        variance = group_mean((x32 * x32).sum(axis=(1, 2)))
        return (x32 * (jax.lax.rsqrt(variance + EPS) * self.scale[...]) + self.bias[...]).astype(
            x.dtype
        )


def _conv(
    n_in: int, n_out: int, size: int, config: VaeConfig, rngs: nnx.Rngs, **kw: Any
) -> nnx.Conv:
    return nnx.Conv(
        n_in, n_out, (size, size), dtype=config.dtype, param_dtype=config.dtype, rngs=rngs, **kw
    )


class ResnetBlock(nnx.Module):
    def __init__(self, n_in: int, n_out: int, config: VaeConfig, rngs: nnx.Rngs):
        self.norm1, self.conv1 = GroupNorm(n_in, config, rngs), _conv(n_in, n_out, 3, config, rngs)
        self.norm2, self.conv2 = (
            GroupNorm(n_out, config, rngs),
            _conv(n_out, n_out, 3, config, rngs),
        )
        self.conv_shortcut = _conv(n_in, n_out, 1, config, rngs) if n_in != n_out else None

    def __call__(self, x: Array) -> Array:
        h = self.conv1(nnx.silu(self.norm1(x)))
        h = self.conv2(nnx.silu(self.norm2(h)))
        if (
            self.conv_shortcut is not None
        ):  # as a product: a CPU takes four times as long for a convolution of size 1
            x = x @ self.conv_shortcut.kernel[0, 0] + self.conv_shortcut.bias[...]
        return h + x


class Attention(nnx.Module):
    """Single-head self-attention over all positions of the lowest resolution."""

    def __init__(self, channels: int, config: VaeConfig, rngs: nnx.Rngs):
        kw = {"dtype": config.dtype, "param_dtype": config.dtype, "rngs": rngs}
        self.group_norm = GroupNorm(channels, config, rngs)
        self.to_q, self.to_k, self.to_v = (Linear(channels, channels, **kw) for _ in range(3))
        self.to_out = nnx.List([Linear(channels, channels, **kw)])

    def __call__(self, x: Array) -> Array:
        tokens = self.group_norm(x).reshape(x.shape[0], -1, 1, x.shape[-1])
        attended = jax.nn.dot_product_attention(
            self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        )
        return x + self.to_out[0](attended).reshape(x.shape)


class MidBlock(nnx.Module):
    def __init__(self, channels: int, config: VaeConfig, rngs: nnx.Rngs):
        self.resnets = nnx.List([ResnetBlock(channels, channels, config, rngs) for _ in range(2)])
        self.attentions = nnx.List([Attention(channels, config, rngs)])

    def __call__(self, x: Array) -> Array:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nnx.Module):
    """3x3 convolution of stride 2; pads one row and column, at the bottom and the right only."""

    def __init__(self, channels: int, config: VaeConfig, rngs: nnx.Rngs):
        self.conv = _conv(channels, channels, 3, config, rngs, strides=2, padding=((0, 1), (0, 1)))

    def __call__(self, x: Array) -> Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """Nearest neighbour to twice the size, then a 3x3 convolution.

    Computed as one 2x2 convolution of the small picture with four times the channels: of the kernel's three rows two
    always meet the same pixel, so they are added beforehand, in one way for even and in another for odd rows of the
    output; columns likewise. 16 products instead of 36.
    """

    def __init__(self, channels: int, config: VaeConfig, rngs: nnx.Rngs):
        self.conv = _conv(channels, channels, 3, config, rngs)

    def __call__(self, x: Array) -> Array:
        kernel, (_, h, w, _) = self.conv.kernel[...], x.shape
        folded = [[_fold(_fold(kernel, row, 0), column, 1) for column in (0, 1)] for row in (0, 1)]
        y = jax.lax.conv_general_dilated(
            x.astype(kernel.dtype), jnp.concatenate([*folded[0], *folded[1]], axis=-1), (1, 1), ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        # window (i, j) covers pixels (i - 1, j - 1) to (i, j): what even outputs of pixel (i, j) see, odd ones one on
        y = y.reshape(*y.shape[:3], 2, 2, -1)
        y = [
            jnp.stack(
                [y[:, row : row + h, column : column + w, row, column] for column in (0, 1)], 3
            )
            for row in (0, 1)
        ]
        return (
            rearrange(jnp.stack(y, 2), "n h dy w dx c -> n (h dy) (w dx) c") + self.conv.bias[...]
        )


def _fold(kernel: Array, odd: int, axis: int) -> Array:
    """Three taps on a picture of doubled size -> the two on the small one, for outputs at even or odd positions."""
    first, middle, last = jnp.split(kernel, 3, axis=axis)
    return jnp.concatenate([first + middle, last] if odd else [first, middle + last], axis=axis)


class Level(nnx.Module):
    """The residual blocks of one resolution, then a change of resolution (none on the last level)."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        layers: int,
        resample: str | None,
        config: VaeConfig,
        rngs: nnx.Rngs,
    ):
        self.resnets = nnx.List(
            [ResnetBlock(n_in if i == 0 else n_out, n_out, config, rngs) for i in range(layers)]
        )
        self.downsamplers = nnx.List(
            [Downsample(n_out, config, rngs)] if resample == "down" else []
        )
        self.upsamplers = nnx.List([Upsample(n_out, config, rngs)] if resample == "up" else [])

    def __call__(self, x: Array) -> Array:
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = layer(x)
        return x


class Encoder(nnx.Module):
    def __init__(self, config: VaeConfig, rngs: nnx.Rngs):
        widths = config.block_out_channels
        self.conv_in = _conv(3, widths[0], 3, config, rngs)
        self.down_blocks = nnx.List()
        for i, width in enumerate(widths):
            resample = "down" if i < len(widths) - 1 else None
            self.down_blocks.append(
                Level(widths[max(i - 1, 0)], width, config.layers_per_block, resample, config, rngs)
            )
        self.mid_block = MidBlock(widths[-1], config, rngs)
        self.conv_norm_out = GroupNorm(widths[-1], config, rngs)
        self.conv_out = _conv(widths[-1], 2 * config.latent_channels, 3, config, rngs)

    def __call__(self, x: Array) -> Array:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    def __init__(self, config: VaeConfig, rngs: nnx.Rngs):
        widths = config.block_out_channels[::-1]
        self.conv_in = _conv(config.latent_channels, widths[0], 3, config, rngs)
        self.mid_block = MidBlock(widths[0], config, rngs)
        self.up_blocks = nnx.List()
        for i, width in enumerate(widths):
            resample = "up" if i < len(widths) - 1 else None
            self.up_blocks.append(
                Level(
                    widths[max(i - 1, 0)],
                    width,
                    config.layers_per_block + 1,
                    resample,
                    config,
                    rngs,
                )
            )
        self.conv_norm_out = GroupNorm(widths[-1], config, rngs)
        self.conv_out = _conv(widths[-1], 3, 3, config, rngs)

    def __call__(self, x: Array) -> Array:
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class Autoencoder(nnx.Module):
    """Images [n, H, W, 3] in [-1, 1] <-> latents [n, H/8, W/8, c] (a factor two per level but the last)."""

    def __init__(self, config: VaeConfig, rngs: nnx.Rngs):
        self.config = config
        self.encoder, self.decoder = Encoder(config, rngs), Decoder(config, rngs)

    def encode(self, images: Array) -> tuple[Array, Array]:
        """Mean and log-variance (clipped to [-30, 20]) of the posterior, in the decoder's own scale."""
        mean, logvar = jnp.split(self.encoder(images), 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def normalise(self, latents: Array) -> Array:
        """From the autoencoder's scale to the transformer's, about zero mean and unit variance."""
        return (latents - self.config.shift_factor) * self.config.scaling_factor

    def decode(self, latents: Array) -> Array:
        """Latents in the transformer's scale -> images in about [-1, 1]."""
        return self.decoder(latents / self.config.scaling_factor + self.config.shift_factor)


def to_uint8(images: Array) -> Array:
    """[n, H, W, 3] in [-1, 1] -> uint8 [n, 3, H, W], the form rewards take. Quantised here and nowhere else."""
    return (
        jnp.round(255.0 * jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0.0, 1.0))
        .astype(jnp.uint8)
        .transpose(0, 3, 1, 2)
    )


def decoded_at_once(config: VaeConfig, image_tokens: int, images: int) -> int:
    """How many of a device's `images` are decoded together: a divisor of `images`, as large as keeps the largest
    feature map within DECODE_BYTES.
    """
    widths = config.block_out_channels
    pixels = image_tokens * 4 ** len(widths)
    largest = pixels * widths[min(1, len(widths) - 1)] * jnp.dtype(config.dtype).itemsize
    return max(
        k
        for k in range(1, images + 1)
        if images % k == 0 and (k == 1 or k * largest <= DECODE_BYTES)
    )


def decode_tokens(
    vae: Autoencoder, tokens: Array, height: int, width: int, mesh: Mesh | None = None
) -> Array:
    """Packed latents [n, height width, 4c] in the transformer's scale -> uint8 [n, 3, 16 height, 16 width].

    Each device of `mesh` decodes its pictures a few at a time.
    """
    n, parts = len(tokens), 1 if mesh is None else batch_devices(mesh)
    at_once = decoded_at_once(vae.config, height * width, n // parts)

    def decode(tokens: Array) -> Array:
        return to_uint8(vae.decode(unpack(tokens, height, width).astype(vae.config.dtype)))

    rounds = rearrange(
        tokens, "(parts rounds k) s c -> rounds (parts k) s c", parts=parts, k=at_once
    )
    pictures = jax.lax.map(decode, constrain(rounds, mesh, None, BATCH_AXES))
    return rearrange(pictures, "rounds (parts k) c h w -> (parts rounds k) c h w", parts=parts)
