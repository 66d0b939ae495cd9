"""The convolutional image autoencoder (diffusers' AutoencoderKL without quantisation convolutions).

Shapes: n images, h x w positions of a feature map, c channels, channels last. The widths of the
levels are `config.block_out_channels`, from the finest level to the coarsest.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from realgen_jax.nn.layers import EPS, Linear
from realgen_jax.nn.tiles import decode_tiled
from realgen_jax.nn.tokens import unpack
from realgen_jax.sharding import BATCH_AXES, batch_devices, constrain

# Limit on the largest feature map of the images that are decoded together, so that it fits into a
# CPU's cache. One large image already keeps any GPU busy; several would only take more memory.
DECODE_BYTES = 2**23


@dataclass(frozen=True)
class VaeConfig:
    """Sizes under diffusers' names (`vae/config.json`); the defaults are those of FLUX.1-dev.

    tile is in no file. Raises ValueError if it is no whole number of latents with a quarter.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 16
    norm_num_groups: int = 32
    scaling_factor: float = 0.3611
    shift_factor: float = 0.1159
    dtype: Any = jnp.float32  # compute and weight dtype
    tile: int = 0  # side of the tiles that pictures are decoded in, in pixels; 0: as a whole

    def __post_init__(self):
        if self.tile % (4 * self.factor):
            raise ValueError(
                f"config.pretrained.vae_tile is {self.tile}; expected a multiple of "
                f"{4 * self.factor} pixels, or 0"
            )

    @property
    def factor(self) -> int:
        """Pixels of a picture's side for each latent."""
        return 2 ** (len(self.block_out_channels) - 1)


class GroupNorm(nnx.GroupNorm):
    """Group normalisation with float32 statistics and a two-pass variance, as in PyTorch.

    Sums are taken over positions first, for all channels, and then over the few channels of a
    group. On a CPU this is three times as fast as flax's reduction over [h, w, channels of a
    group].
    """

    def __init__(self, channels: int, config: VaeConfig, rngs: nnx.Rngs):
        super().__init__(
            channels,
            config.norm_num_groups,
            epsilon=EPS,
            dtype=config.dtype,
            param_dtype=config.dtype,
            rngs=rngs,
        )

    def __call__(self, x: Array) -> Array:
        """[n, h, w, c] -> [n, h, w, c]."""
        positions = x.shape[1] * x.shape[2]

        x32 = x.astype(jnp.float32)
        x32 = x32 - self._group_mean(x32.sum(axis=(1, 2)), positions)
        variance = self._group_mean((x32 * x32).sum(axis=(1, 2)), positions)

        gain = jax.lax.rsqrt(variance + EPS) * self.scale[...]
        return (x32 * gain + self.bias[...]).astype(x.dtype)

    def _group_mean(self, sums: Array, positions: int) -> Array:
        """Sums over positions [n, c] -> for each channel the mean of its group, [n, 1, 1, c]."""
        n, channels = sums.shape
        groups = sums.reshape(-1, self.num_groups, self.group_size)
        means = groups.mean(axis=-1, keepdims=True) / positions
        means = jnp.broadcast_to(means, (n, self.num_groups, self.group_size))
        return means.reshape(-1, 1, 1, channels)


def _conv(
    n_in: int, n_out: int, size: int, config: VaeConfig, rngs: nnx.Rngs, **kw: Any
) -> nnx.Conv:
    """A size x size convolution. By default, stride 1 and zero padding that keeps the shape."""
    return nnx.Conv(
        n_in, n_out, (size, size), dtype=config.dtype, param_dtype=config.dtype, rngs=rngs, **kw
    )


class ResnetBlock(nnx.Module):
    """Norm, SiLU and 3x3 convolution, twice, plus a shortcut.

    [n, h, w, n_in] -> [n, h, w, n_out].
    """

    def __init__(self, n_in: int, n_out: int, config: VaeConfig, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(n_in, config, rngs)
        self.conv1 = _conv(n_in, n_out, 3, config, rngs)
        self.norm2 = GroupNorm(n_out, config, rngs)
        self.conv2 = _conv(n_out, n_out, 3, config, rngs)
        self.conv_shortcut = _conv(n_in, n_out, 1, config, rngs) if n_in != n_out else None

    def __call__(self, x: Array) -> Array:
        h = self.conv1(nnx.silu(self.norm1(x)))
        h = self.conv2(nnx.silu(self.norm2(h)))

        # A 1x1 convolution as a matmul: as a convolution it takes a CPU four times as long.
        if self.conv_shortcut is not None:
            x = x @ self.conv_shortcut.kernel[0, 0] + self.conv_shortcut.bias[...]
        return h + x


class Attention(nnx.Module):
    """Single-head self-attention over all positions plus a shortcut. [n, h, w, c] -> the same."""

    def __init__(self, channels: int, config: VaeConfig, rngs: nnx.Rngs):
        kw = {"dtype": config.dtype, "param_dtype": config.dtype, "rngs": rngs}
        self.group_norm = GroupNorm(channels, config, rngs)
        self.to_q = Linear(channels, channels, **kw)
        self.to_k = Linear(channels, channels, **kw)
        self.to_v = Linear(channels, channels, **kw)
        self.to_out = nnx.List([Linear(channels, channels, **kw)])

    def __call__(self, x: Array) -> Array:
        n, _, _, channels = x.shape
        tokens = self.group_norm(x).reshape(n, -1, 1, channels)
        attended = jax.nn.dot_product_attention(
            self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        )
        return x + self.to_out[0](attended).reshape(x.shape)


class MidBlock(nnx.Module):
    """The coarsest resolution: residual block, attention, residual block. Keeps the shape."""

    def __init__(self, channels: int, config: VaeConfig, rngs: nnx.Rngs):
        self.resnets = nnx.List([ResnetBlock(channels, channels, config, rngs) for _ in range(2)])
        self.attentions = nnx.List([Attention(channels, config, rngs)])

    def __call__(self, x: Array) -> Array:
        x = self.resnets[0](x)
        x = self.attentions[0](x)
        return self.resnets[1](x)


class Downsample(nnx.Module):
    """3x3 convolution of stride 2: [n, h, w, c] -> [n, h/2, w/2, c].

    Pads one row and one column, at the bottom and on the right only.
    """

    def __init__(self, channels: int, config: VaeConfig, rngs: nnx.Rngs):
        self.conv = _conv(channels, channels, 3, config, rngs, strides=2, padding=((0, 1), (0, 1)))

    def __call__(self, x: Array) -> Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """2x nearest-neighbour upsampling, then a 3x3 convolution: [n, h, w, c] -> [n, 2h, 2w, c].

    Computed as one 2x2 convolution of the small image with four times the channels. After
    upsampling, two of the kernel's three rows always fall on the same pixel, so they are summed
    beforehand. Which two differs between even and odd rows of the output; the same holds for
    columns. That is 16 products per pixel instead of 36.
    """

    def __init__(self, channels: int, config: VaeConfig, rngs: nnx.Rngs):
        self.conv = _conv(channels, channels, 3, config, rngs)

    def __call__(self, x: Array) -> Array:
        kernel = self.conv.kernel[...]
        _, h, w, _ = x.shape

        # One 2x2 kernel for each parity of row and column.
        folded = []
        for row in (0, 1):
            for column in (0, 1):
                folded.append(_fold(_fold(kernel, row, axis=0), column, axis=1))

        # [n, h + 1, w + 1, 2, 2, c]: window (i, j) covers the pixels (i - 1, j - 1) to (i, j).
        y = jax.lax.conv_general_dilated(
            x.astype(kernel.dtype),
            jnp.concatenate(folded, axis=-1),
            window_strides=(1, 1),
            padding=((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        y = y.reshape(*y.shape[:3], 2, 2, -1)

        # Even outputs of pixel (i, j) come from window (i, j), odd ones from the next window.
        rows = []
        for row in (0, 1):
            columns = [y[:, row : row + h, col : col + w, row, col] for col in (0, 1)]
            rows.append(jnp.stack(columns, axis=3))
        y = jnp.stack(rows, axis=2)

        return rearrange(y, "n h dy w dx c -> n (h dy) (w dx) c") + self.conv.bias[...]


def _fold(kernel: Array, odd: int, axis: int) -> Array:
    """Three taps on the doubled image -> two on the small one, for even or odd outputs."""
    first, middle, last = jnp.split(kernel, 3, axis=axis)
    taps = [first + middle, last] if odd else [first, middle + last]
    return jnp.concatenate(taps, axis=axis)


class Level(nnx.Module):
    """The residual blocks of one resolution, then the change to the next one, if any.

    resample: "down" halves the sides, "up" doubles them, None keeps them.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        layers: int,
        resample: str | None,
        config: VaeConfig,
        rngs: nnx.Rngs,
    ):
        self.resnets = nnx.List()
        for i in range(layers):
            self.resnets.append(ResnetBlock(n_in if i == 0 else n_out, n_out, config, rngs))

        self.downsamplers = nnx.List()
        if resample == "down":
            self.downsamplers.append(Downsample(n_out, config, rngs))

        self.upsamplers = nnx.List()
        if resample == "up":
            self.upsamplers.append(Upsample(n_out, config, rngs))

    def __call__(self, x: Array) -> Array:
        """[n, h, w, n_in] -> [n, h', w', n_out]."""
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = layer(x)
        return x


class Encoder(nnx.Module):
    """Images [n, H, W, 3] -> mean and log-variance side by side, [n, h, w, 2 latent_channels]."""

    def __init__(self, config: VaeConfig, rngs: nnx.Rngs):
        widths = config.block_out_channels
        layers = config.layers_per_block
        self.conv_in = _conv(3, widths[0], 3, config, rngs)

        self.down_blocks = nnx.List()
        for i, width in enumerate(widths):
            previous = widths[max(i - 1, 0)]
            resample = "down" if i < len(widths) - 1 else None
            self.down_blocks.append(Level(previous, width, layers, resample, config, rngs))

        self.mid_block = MidBlock(widths[-1], config, rngs)
        self.conv_norm_out = GroupNorm(widths[-1], config, rngs)
        self.conv_out = _conv(widths[-1], 2 * config.latent_channels, 3, config, rngs)

    def __call__(self, x: Array) -> Array:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        x = self.mid_block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class Decoder(nnx.Module):
    """Latents [n, h, w, latent_channels] -> images [n, H, W, 3], with the levels in reverse."""

    def __init__(self, config: VaeConfig, rngs: nnx.Rngs):
        widths = config.block_out_channels[::-1]
        layers = config.layers_per_block + 1
        self.conv_in = _conv(config.latent_channels, widths[0], 3, config, rngs)
        self.mid_block = MidBlock(widths[0], config, rngs)

        self.up_blocks = nnx.List()
        for i, width in enumerate(widths):
            previous = widths[max(i - 1, 0)]
            resample = "up" if i < len(widths) - 1 else None
            self.up_blocks.append(Level(previous, width, layers, resample, config, rngs))

        self.conv_norm_out = GroupNorm(widths[-1], config, rngs)
        self.conv_out = _conv(widths[-1], 3, 3, config, rngs)

    def __call__(self, x: Array) -> Array:
        x = self.conv_in(x)
        x = self.mid_block(x)
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class Autoencoder(nnx.Module):
    """Images [n, H, W, 3] in [-1, 1] <-> latents [n, h, w, latent_channels].

    Each level but the last halves the sides: with four levels h = H/8.
    """

    def __init__(self, config: VaeConfig, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs)
        self.decoder = Decoder(config, rngs)

    def encode(self, images: Array) -> tuple[Array, Array]:
        """Mean and log-variance (clipped to [-30, 20]) of the posterior, in the encoder's scale."""
        mean, logvar = jnp.split(self.encoder(images), 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def normalise(self, latents: Array) -> Array:
        """Map latents to the transformer's scale, with about zero mean and unit variance."""
        return (latents - self.config.shift_factor) * self.config.scaling_factor

    def decode(self, latents: Array) -> Array:
        """Latents in the transformer's scale -> images, about in [-1, 1]."""
        return self.decoder(latents / self.config.scaling_factor + self.config.shift_factor)


def to_uint8(images: Array) -> Array:
    """[n, H, W, 3] in [-1, 1] -> uint8 [n, 3, H, W], the format that rewards take.

    This is the only place that quantises.
    """
    unit = jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0.0, 1.0)
    return jnp.round(255.0 * unit).astype(jnp.uint8).transpose(0, 3, 1, 2)


def decoded_at_once(config: VaeConfig, image_tokens: int, images: int) -> int:
    """Return how many of a device's `images` are decoded together.

    This is the largest divisor of `images` that keeps the largest feature map within DECODE_BYTES,
    but at least 1.
    """
    # A token is 2 x 2 latents, and each level but the last doubles the sides. The largest feature
    # map has the full size and the channels of the level before the last.
    widths = config.block_out_channels
    pixels = image_tokens * 4 ** len(widths)
    if config.tile:
        pixels = min(pixels, config.tile**2)
    channels = widths[min(1, len(widths) - 1)]
    largest = pixels * channels * jnp.dtype(config.dtype).itemsize

    at_once = 1
    for k in range(2, images + 1):
        if images % k == 0 and k * largest <= DECODE_BYTES:
            at_once = k
    return at_once


def decode_tokens(
    vae: Autoencoder, tokens: Array, height: int, width: int, mesh: Mesh | None = None
) -> Array:
    """Packed latents [n, height width, 4c] in the transformer's scale -> uint8 images [n, 3, H, W].

    H = 16 height and W = 16 width with four levels. Each device of `mesh` decodes its own images,
    a few at a time.
    """
    n = len(tokens)
    parts = 1 if mesh is None else batch_devices(mesh)
    at_once = decoded_at_once(vae.config, height * width, n // parts)

    def decode(tokens: Array) -> Array:
        latents = unpack(tokens, height, width).astype(vae.config.dtype)
        if vae.config.tile:
            return to_uint8(decode_tiled(vae.decode, latents, vae.config.tile, vae.config.factor))
        return to_uint8(vae.decode(latents))

    # Each round takes the next few images of each device.
    rounds = rearrange(
        tokens, "(parts rounds k) s c -> rounds (parts k) s c", parts=parts, k=at_once
    )
    images = jax.lax.map(decode, constrain(rounds, mesh, None, BATCH_AXES))
    return rearrange(images, "rounds (parts k) c h w -> (parts rounds k) c h w", parts=parts)
