"""Frozen weights in 8 or 4 bits. They are quantised once, on the host, and every use of a kernel
dequantises it to the compute dtype.

Shapes: a kernel is [*stack, *in, *out] (nn/layers.py). Its codes have the same axes; with two codes
a byte, the last of the `in` axes is half as long. Its scales have the same axes too, and each scale
is that of a tile: all inputs of an output channel, or BLOCK inputs in a row.
"""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array

BLOCK = 32  # inputs that share a scale in nf4
THREADS = 4  # layers that are quantised at once; each takes up to five float32 copies of a layer

# The 16 values of NF4: quantiles of a normal distribution, scaled to [-1, 1] and with an exact 0
# (QLoRA, arXiv 2305.14314, appendix E).
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_VALUES = np.array(NF4, np.float32)

# First guesses at a block's scale in nf4, in multiples of its largest magnitude. The values are not
# symmetric: a negative scale turns them around.
GUESSES = (1.0, 0.9, -1.0, -0.9)


@dataclass(frozen=True)
class Format:
    """A kind of codes.

    largest: the value of the largest code. blockwise: whether BLOCK inputs share a scale that
    is fitted to them; if not, all inputs do. per_byte: codes in a byte, along the last input
    axis. encode: float32 of at most `largest` -> codes. decode: codes -> their values, float32.
    """

    dtype: Any
    scale_dtype: Any
    largest: float
    blockwise: bool
    per_byte: int
    encode: Callable[[np.ndarray, int], np.ndarray]
    decode: Callable[[Array, int], Array]


def _encode_fp8(values: np.ndarray, axis: int) -> np.ndarray:
    return values.astype(ml_dtypes.float8_e4m3fn)


def _encode_int8(values: np.ndarray, axis: int) -> np.ndarray:
    return np.rint(values).astype(np.int8)


def _nearest(values: np.ndarray) -> np.ndarray:
    """The numbers of the nearest of the 16 values."""
    numbers = np.zeros(values.shape, np.uint8)
    for below, above in pairwise(NF4):
        numbers += values > np.float32((below + above) / 2)
    return numbers


def _encode_nf4(values: np.ndarray, axis: int) -> np.ndarray:
    """The nearest of the 16 values; the first of two neighbours has the low bits."""
    first, second = np.moveaxis(_paired(_nearest(values), axis), axis + 1, 0)
    return first | (second << 4)


def _fitted_scales(
    tiles: np.ndarray, scale: np.ndarray, axes: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Scales of nf4: what the weights of a tile are divided by, and what its codes stand for.

    A first guess gives some codes, with the values v. For those, s = sum w v / sum v^2 has the
    least squared error. The guess with the least error decides the codes. But s v is shorter than w
    in w's own direction, sum w (s v) < sum w^2, by 0.7 %, in every kernel: the pictures lose
    contrast. So the codes stand for t v with t = sum w^2 / sum w v.

    tiles: weights w, float32. scale: of the tiles' largest magnitudes; both results have its dtype.
    axes: of a tile.
    """

    def fit(above: np.ndarray, below: np.ndarray) -> np.ndarray:
        """The ratio of two sums over a tile; 1 for a tile of zeros."""
        above, below = (array.sum(axes, keepdims=True) for array in (above, below))
        ratio = np.divide(above, below, out=np.ones_like(above), where=below != 0)
        return ratio.astype(scale.dtype)

    def values(scale: np.ndarray) -> np.ndarray:
        return _VALUES[_nearest(tiles / scale.astype(np.float32))]

    best = scale
    least = np.full(scale.shape, np.inf, np.float32)
    for guess in GUESSES:
        v = values(np.float32(guess) * scale.astype(np.float32))
        fitted = fit(tiles * v, np.square(v))
        difference = tiles - fitted.astype(np.float32) * values(fitted)
        error = np.square(difference).sum(axes, keepdims=True)
        best = np.where(error < least, fitted, best)
        least = np.minimum(error, least)
    return best, fit(np.square(tiles), tiles * values(best))


def _decode_plain(codes: Array, axis: int) -> Array:
    return codes.astype(jnp.float32)


def _decode_nf4(codes: Array, axis: int) -> Array:
    """The two values of each byte.

    Without arrays of constants of a kernel's size: automatic differentiation takes those out of the
    scan over blocks, and they would be in memory all the time.
    """
    pairs = jnp.stack([codes & 15, codes >> 4], axis + 1)
    values = jnp.array(NF4, jnp.float32).at[pairs].get(mode="promise_in_bounds")
    shape = list(codes.shape)
    shape[axis] *= 2
    return values.reshape(shape)


def _paired(array: np.ndarray, axis: int) -> np.ndarray:
    """Split an axis into neighbours: [..., n, ...] -> [..., n / 2, 2, ...]."""
    return array.reshape(*array.shape[:axis], -1, 2, *array.shape[axis + 1 :])


# config.pretrained.quantization -> how kernels are stored.
FORMATS = {
    "fp8": Format(ml_dtypes.float8_e4m3fn, np.float32, 448.0, False, 1, _encode_fp8, _decode_plain),
    "int8": Format(np.int8, np.float32, 127.0, False, 1, _encode_int8, _decode_plain),
    # Scales in bfloat16 take 0.5 bits a weight. Quantising them too (QLoRA) would save half.
    "nf4": Format(np.uint8, ml_dtypes.bfloat16, 1.0, True, 2, _encode_nf4, _decode_nf4),
}


def check_format(name: str) -> None:
    """Raise ValueError for an unknown format."""
    if name and name not in FORMATS:
        raise ValueError(f"quantization is {name!r}; choose one of {', '.join(FORMATS)}, or ''")


def quantized_shapes(
    name: str, stack: tuple[int, ...], shape_in: tuple[int, ...], shape_out: tuple[int, ...]
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Return the shapes of a kernel's codes and scales.

    Raises ValueError for an odd number of inputs, where a byte holds two codes.
    """
    form = FORMATS[name]
    *outer, inputs = shape_in
    if inputs % form.per_byte:
        raise ValueError(
            f"quantization is {name!r}, which needs an even number of inputs; a kernel has {inputs}"
        )
    scales = (1,) * len(shape_in)
    if form.blockwise:
        scales = (*outer, inputs // math.gcd(inputs, BLOCK))
    codes = (*stack, *outer, inputs // form.per_byte, *shape_out)
    return (
        jax.ShapeDtypeStruct(codes, form.dtype),
        jax.ShapeDtypeStruct((*stack, *scales, *shape_out), form.scale_dtype),
    )


def quantize(
    kernel: np.ndarray, name: str, codes: jax.ShapeDtypeStruct, scales: jax.ShapeDtypeStruct
) -> tuple[np.ndarray, np.ndarray]:
    """Quantise a stacked kernel on the host, layer by layer: -> (codes, scales), of these shapes.

    A value is code times scale. The scale makes the largest magnitude of a tile the largest code;
    in blocks it fits all weights (`_fitted_scales`).
    """
    form = FORMATS[name]
    all_codes = np.empty(codes.shape, codes.dtype)
    all_scales = np.empty(scales.shape, scales.dtype)
    halved = [axis for axis in range(kernel.ndim) if kernel.shape[axis] != codes.shape[axis]]
    axis = halved[0] - 1 if halved else 0  # of a layer, where codes are packed

    def fill(layer: int) -> None:
        weights = kernel[layer].astype(np.float32)
        tiles = weights.reshape(_tiles(weights.shape, all_scales[layer].shape))

        # The scale is rounded before it is used, so that codes are the nearest to what is stored.
        axes = tuple(range(1, tiles.ndim, 2))
        largest = np.abs(tiles).max(axes, keepdims=True)
        scale = (largest / np.float32(form.largest)).astype(scales.dtype)
        scale[scale == 0] = 1
        divisor = scale
        if form.blockwise:
            divisor, scale = _fitted_scales(tiles, scale, axes)

        values = (tiles / divisor.astype(np.float32)).clip(-form.largest, form.largest)
        all_codes[layer] = form.encode(values.reshape(weights.shape), axis)
        all_scales[layer] = scale.reshape(all_scales[layer].shape)

    # numpy's loops run in parallel.
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as threads:
        list(threads.map(fill, range(len(kernel))))
    return all_codes, all_scales


def dequantize(codes: Array, scales: Array, name: str, axis: int, dtype: Any) -> Array:
    """Return the kernel in `dtype`. axis: the last of its input axes, where codes are packed."""
    values = FORMATS[name].decode(codes, axis)
    tiles = values.reshape(_tiles(values.shape, scales.shape))
    scales = scales.astype(jnp.float32).reshape(_tiles(scales.shape, scales.shape))
    kernel = (tiles * scales).reshape(values.shape).astype(dtype)

    # Otherwise XLA may leave out the rounding where a product takes the kernel, in one program and
    # not in another.
    return jax.lax.optimization_barrier(kernel)


def _tiles(shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, ...]:
    """Split each axis into (scales, values that share one)."""
    split = []
    for size, number in zip(shape, scales, strict=True):
        split += [number, size // number]
    return tuple(split)
