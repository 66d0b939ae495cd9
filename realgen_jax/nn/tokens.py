"""Latents as a sequence of tokens, one token for each patch of 2 x 2 latent pixels."""

from einops import rearrange
from jax import Array

PATCH = 2  # side of a token in latent pixels


def pack(latents: Array) -> Array:
    """VAE latents [n, h, w, c] -> tokens [n, h/2 w/2, 4c].

    Tokens are in row-major order. Channels are in the order (c, dy, dx), as in diffusers'
    FluxPipeline; a model that uses another order permutes them inside its transformer.
    """
    return rearrange(latents, "n (h dy) (w dx) c -> n (h w) (c dy dx)", dy=PATCH, dx=PATCH)


def unpack(tokens: Array, height: int, width: int) -> Array:
    """Tokens [n, height width, 4c] -> VAE latents [n, 2 height, 2 width, c]; inverts `pack`."""
    return rearrange(
        tokens, "n (h w) (c dy dx) -> n (h dy) (w dx) c", h=height, w=width, dy=PATCH, dx=PATCH
    )
