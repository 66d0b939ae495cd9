"""Latents as a sequence of tokens, one token for each patch of 2 x 2 latent pixels."""

from einops import rearrange
from jax import Array

PATCH = 2  # latent pixels a token's side


def pack(latents: Array) -> Array:
    """VAE latents [n, h, w, c] -> tokens [n, h/2 w/2, 4c].

    Rows of patches come one after another. Channels are in the order (c, dy, dx), as in diffusers'
    FluxPipeline; a model that works in another order permutes inside its transformer.
    """
    return rearrange(latents, "n (h dy) (w dx) c -> n (h w) (c dy dx)", dy=PATCH, dx=PATCH)


def unpack(tokens: Array, height: int, width: int) -> Array:
    """Tokens [n, height width, 4c] -> VAE latents [n, 2 height, 2 width, c]; inverts `pack`."""
    return rearrange(
        tokens, "n (h w) (c dy dx) -> n (h dy) (w dx) c", h=height, w=width, dy=PATCH, dx=PATCH
    )
