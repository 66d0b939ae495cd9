"""Latents as a sequence of tokens: one token for each patch of 2 x 2 latent pixels."""

from einops import rearrange
from jax import Array


def pack(latents: Array) -> Array:
    """[n, h, w, c] VAE latents -> [n, h/2 w/2, 4c] tokens; channel order (c, dy, dx) as in diffusers."""
    return rearrange(latents, "n (h dy) (w dx) c -> n (h w) (c dy dx)", dy=2, dx=2)


def unpack(tokens: Array, height: int, width: int) -> Array:
    """[n, height width, 4c] tokens -> [n, 2 height, 2 width, c] VAE latents; inverse of `pack`."""
    return rearrange(
        tokens, "n (h w) (c dy dx) -> n (h dy) (w dx) c", h=height, w=width, dy=2, dx=2
    )
