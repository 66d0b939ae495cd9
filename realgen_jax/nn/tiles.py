"""Decoding a picture in overlapping tiles, as diffusers' AutoencoderKL.tiled_decode does.

Every tile has its own statistics of norms and its own attention, so the picture differs from one
that is decoded as a whole. Memory is that of a tile.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array


def tile_starts(tile: int, side: int) -> range:
    """Return where tiles begin on a side, both in latents. They overlap by a quarter."""
    return range(0, side, tile * 3 // 4)


def decode_tiled(decode: Callable[[Array], Array], latents: Array, side: int, factor: int) -> Array:
    """Decode latents [n, h, w, c] in tiles -> images [n, H, W, 3].

    side: of a tile, in pixels. factor: pixels of a side for each latent. A tile's first quarter
    fades from the tiles above and on the left into the tile; its last quarter is left to the next.
    """
    tile = side // factor
    _, height, width, _ = latents.shape

    # Tiles of one shape are decoded by one program, one after the other.
    corners: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for top in tile_starts(tile, height):
        for left in tile_starts(tile, width):
            shape = latents[:, top : top + tile, left : left + tile].shape
            corners.setdefault(shape, []).append((top, left))
    decoded = {}
    for places in corners.values():
        parts = [latents[:, top : top + tile, left : left + tile] for top, left in places]
        images = jax.lax.map(decode, jnp.stack(parts))
        decoded |= dict(zip(places, images, strict=True))

    # Blend each tile with its neighbours, which have been blended themselves.
    step = tile * 3 // 4
    kept = side * 3 // 4
    rows = []
    for top in tile_starts(tile, height):
        row = []
        for left in tile_starts(tile, width):
            image = decoded[top, left]
            if top:
                image = _fade(decoded[top - step, left], image, side // 4, axis=1)
            if left:
                image = _fade(decoded[top, left - step], image, side // 4, axis=2)
            decoded[top, left] = image
            row.append(image[:, :kept, :kept])
        rows.append(jnp.concatenate(row, axis=2))
    return jnp.concatenate(rows, axis=1)


def _fade(before: Array, image: Array, extent: int, axis: int) -> Array:
    """Fade linearly from the end of one image into the start of the next, along an axis."""
    extent = min(extent, before.shape[axis], image.shape[axis])
    shape = [1] * image.ndim
    shape[axis] = extent
    weight = (jnp.arange(extent, dtype=image.dtype) / extent).reshape(shape)

    end = jax.lax.slice_in_dim(before, before.shape[axis] - extent, None, axis=axis)
    start = jax.lax.slice_in_dim(image, 0, extent, axis=axis)
    rest = jax.lax.slice_in_dim(image, extent, None, axis=axis)
    return jnp.concatenate([end * (1 - weight) + start * weight, rest], axis=axis)
