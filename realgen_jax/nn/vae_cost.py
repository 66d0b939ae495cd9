"""The cost of the autoencoder's decoder, by formula; models/cost.py uses it."""

import jax.numpy as jnp

from realgen_jax.nn.vae import VaeConfig


def decoder_flops(vae: VaeConfig, positions: int) -> float:
    """Operations of decoding this many latents.

    A k x k convolution takes 2 k^2 in out for each position; one behind an upsampling counts as
    k = 2 with four times the outputs (see vae.Upsample).
    """
    widths = vae.block_out_channels[::-1]
    width = widths[0]

    # The coarsest level: conv_in, and two residual blocks with two convolutions each.
    total = 18.0 * positions * width * (vae.latent_channels + 4 * width)

    # Its attention over all positions, and that attention's four projections.
    total += 4.0 * positions * positions * width + 8.0 * positions * width**2

    for level, out in enumerate(widths):
        # Residual blocks, with a 1x1 convolution as shortcut where the width changes.
        for _ in range(vae.layers_per_block + 1):
            shortcut = 2.0 * positions * width * out if width != out else 0.0
            total += 18.0 * positions * (width * out + out * out) + shortcut
            width = out

        # Upsampling, on all levels but the last.
        if level < len(widths) - 1:
            positions *= 4
            total += 8.0 * positions * width * width

    # conv_out, to three colours.
    return total + 18.0 * positions * width * 3


def kernel_bytes(vae: VaeConfig) -> float:
    """Bytes of the decoder's 3 x 3 kernels, other than those of the upsamplings."""
    widths = vae.block_out_channels[::-1]
    width = widths[0]

    # conv_in, and the coarsest level's two residual blocks.
    pairs = width * (vae.latent_channels + 4 * width)

    for out in widths:
        for _ in range(vae.layers_per_block + 1):
            pairs += width * out + out * out
            width = out
    return 9.0 * pairs * jnp.dtype(vae.dtype).itemsize
