"""Codes and scales by themselves, and a layer that holds them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from realgen_jax.nn.layers import Linear
from realgen_jax.nn.quantize import FORMATS, NF4, dequantize, quantize, quantized_shapes
from realgen_jax.nn.stack import check_remat

F32 = {"dtype": jnp.float32, "param_dtype": jnp.float32}
# Half the widest gap between neighbouring codes over the largest code, and what rounds to 0.
HALF_GAPS = {"fp8": 16 / 448, "int8": 0.5 / 127, "nf4": 0.5 * (1 - 0.6961928) + 2**-8}
BITS = {"fp8": 8, "int8": 8, "nf4": 4.5}  # of a weight, without the scales of output channels


def kernel_of(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def stored(kernel, name, axes_in):
    """Codes and scales of a kernel [layers, *in, *out]."""
    shape_in = kernel.shape[1 : 1 + axes_in]
    shapes = quantized_shapes(name, kernel.shape[:1], shape_in, kernel.shape[1 + axes_in :])
    return quantize(kernel, name, *shapes)


def restored(codes, scales, name, axes_in):
    layers = zip(codes, scales, strict=True)
    return np.stack([dequantize(*layer, name, axes_in - 1, jnp.float32) for layer in layers])


@pytest.mark.parametrize(("shape", "axes_in"), [((2, 128, 3, 8), 1), ((2, 5, 128, 8), 2)])
@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_moves_by_less_than_half_a_gap_of_its_tile(name, shape, axes_in):
    kernel = kernel_of(0, *shape)
    kernel[0, ..., 0] *= 1e-3  # an output channel of its own magnitude
    codes, scales = stored(kernel, name, axes_in)
    values = restored(codes, scales, name, axes_in)

    # The largest weights that share a scale: of an output channel, or of 32 inputs in a row.
    inputs = tuple(range(1, 1 + axes_in))
    largest = np.abs(kernel).max(inputs, keepdims=True)
    if name == "nf4":
        last = axes_in
        blocks = kernel.reshape(*shape[:last], 4, 32, *shape[last + 1 :])
        largest = np.abs(blocks).max(last + 1).repeat(32, last)
    assert (np.abs(values - kernel) <= HALF_GAPS[name] * largest).all()

    plain = 4 * (scales.size if name != "nf4" else 0)
    assert 8 * (codes.nbytes + scales.nbytes - plain) == BITS[name] * kernel.size


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_restored_is_stored_without_loss(name):
    values = restored(*stored(kernel_of(1, 1, 64, 6), name, 1), name, 1)
    again = restored(*stored(values, name, 1), name, 1)
    np.testing.assert_array_equal(again, values)


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_zeros(name):
    kernel = np.zeros((1, 64, 4), np.float32)
    kernel[0, :, 0] = 1
    np.testing.assert_array_equal(restored(*stored(kernel, name, 1), name, 1), kernel)


def test_nf4_takes_the_nearest_value_and_puts_the_first_input_into_the_low_bits():
    kernel = np.array([*NF4, *NF4], np.float32).reshape(1, 32, 1)
    codes, scales = stored(kernel, "nf4", 1)
    numbers = np.tile(np.arange(16), 2)
    np.testing.assert_array_equal(codes.ravel(), numbers[::2] + 16 * numbers[1::2])
    np.testing.assert_array_equal(scales, np.ones((1, 1, 1)))

    # Whatever lies nearer to a value than to its neighbours has its code.
    ends = np.array([[-1, 1]] * 8).ravel() * 0.2
    gaps = np.diff(NF4)
    near = np.where(ends > 0, np.append(gaps, gaps[-1]), np.append(gaps[0], gaps))
    moved = (kernel + np.tile(ends * near, 2).reshape(kernel.shape)).astype(np.float32)
    np.testing.assert_array_equal(stored(moved, "nf4", 1)[0], codes)


def test_nf4_does_not_shrink_weights_and_may_turn_a_block_around():
    """Its values times the weights are the weights' squares, to the rounding of the scales."""
    kernel = kernel_of(5, 1, 320, 16)
    codes, scales = stored(kernel, "nf4", 1)
    values = restored(codes, scales, "nf4", 1)
    assert (values * kernel).sum() == pytest.approx((kernel**2).sum(), rel=1e-3)
    assert 0.3 < (scales < 0).mean() < 0.7


def test_fewer_inputs_than_a_block_share_a_scale_and_an_odd_number_is_refused():
    assert quantized_shapes("nf4", (2,), (96,), (5,))[1].shape == (2, 3, 5)
    assert quantized_shapes("nf4", (), (5, 24), (5,))[1].shape == (5, 3, 5)
    with pytest.raises(ValueError, match=r"'nf4', which needs an even number of inputs.* has 33"):
        quantized_shapes("nf4", (2,), (33,), (5,))


@pytest.mark.parametrize("name", FORMATS)
def test_a_layer_multiplies_by_the_values_of_its_codes(name):
    """A block's layer, and one that computes the modulation of all layers; with gradients."""
    kernel = kernel_of(2, 3, 64, 2, 8)
    layer = Linear(64, (2, 8), stack=(3,), bias=False, rngs=nnx.Rngs(0), quantization=name, **F32)
    plain = Linear(64, (2, 8), stack=(3,), bias=False, rngs=nnx.Rngs(0), **F32)
    layer.kernel[...], layer.kernel_scale[...] = stored(kernel, name, 1)
    plain.kernel[...] = restored(layer.kernel[...], layer.kernel_scale[...], name, 1)
    x = jnp.asarray(kernel_of(3, 4, 64))

    def first(module, x):
        graph, weights = nnx.split(module)
        return nnx.merge(graph, jax.tree.map(lambda a: a[0], weights))(x)

    for apply in (first, lambda module, x: Linear.__call__(flat(module), x)):
        np.testing.assert_allclose(apply(layer, x), apply(plain, x), atol=1e-5)
        slopes = [jax.grad(lambda x, m=m, f=apply: (f(m, x) ** 2).sum())(x) for m in (layer, plain)]
        np.testing.assert_allclose(*slopes, atol=1e-3)


def flat(module):
    """The same layer with one axis of outputs, as modulations have it."""
    other = Linear(
        64, 16, stack=(3,), bias=False, rngs=nnx.Rngs(0), quantization=module.quantization, **F32
    )
    other.kernel[...] = module.kernel[...].reshape(3, -1, 16)
    if module.kernel_scale is not None:
        other.kernel_scale[...] = module.kernel_scale[...].reshape(3, -1, 16)
    return other


def test_a_format_needs_a_name_and_a_remat_that_drops_the_kernels():
    with pytest.raises(ValueError, match=r"quantization is 'nf8'; choose one of fp8, int8, nf4"):
        check_remat("full", "nf8")
    with pytest.raises(ValueError, match=r"remat is 'none'.*with quantization 'int8' choose"):
        check_remat("none", "int8")


@pytest.mark.parametrize(("name", "error"), [("int8", 0.0085), ("fp8", 0.0265), ("nf4", 0.077)])
def test_the_error_of_normal_weights_is_the_documented_one(name, error):
    """RMS, relative to that of the weights, of 3072 inputs as FLUX.1-dev has (docs/clusters.md)."""
    kernel = kernel_of(4, 1, 3072, 64)
    values = restored(*stored(kernel, name, 1), name, 1)
    assert np.sqrt(((values - kernel) ** 2).mean() / (kernel**2).mean()) == pytest.approx(
        error, 0.03
    )
