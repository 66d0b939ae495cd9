"""Layers that the transformers of all model families share.

Shapes: n images, t tokens, D channels, h heads of d channels each. A leading `stack` is (layers,)
for the parameters of a block that is scanned over (see nn/stack.py), and () elsewhere.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from realgen_jax.nn.quantize import dequantize, quantized_shapes
from realgen_jax.sharding import BATCH_AXES, constrain, for_tpu

EPS = 1e-6  # default of all norms
TIME_CHANNELS = 256  # channels of the sinusoidal embeddings of noise level and guidance
PROJECTION = "projection"  # checkpoint name for the outputs of the large matmuls
_lecun = nnx.initializers.lecun_normal()


class Fixed(nnx.Variable):
    """An array of a checkpoint that is no weight: it is never trained."""


class Linear(nnx.Module):
    """y = x W + b in `dtype`, with an optional LoRA: y += alpha/r (x A) B (arXiv 2106.09685).

    kernel [*stack, *in, *out], bias [*stack, *out]. With `quantization` (a key of FORMATS in
    quantize.py), `kernel` holds codes that only a file can fill, and kernel_scale their scales.

    A fused projection has a separate axis for its parts, for instance (3, D) for qkv. The mesh axis
    `tensor` then splits each part separately and never cuts a head. Parts that are separate modules
    in torch have their own LoRA factors; the other axes of in and out are joined:
    lora_a [*stack, in, parts, r], lora_b [*stack, parts, r, out / parts].
    """

    def __init__(
        self,
        n_in: int | tuple[int, int],
        n_out: int | tuple[int, int],
        *,
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
        stack: tuple[int, ...] = (),
        bias: bool = True,
        inputs_split: bool = False,
        quantization: str = "",
    ):
        """inputs_split: `tensor` splits the inputs, as behind heads and hidden layers."""
        self.shape_in = tuple(np.atleast_1d(n_in).tolist())
        self.shape_out = tuple(np.atleast_1d(n_out).tolist())
        self.stack = stack
        self.dtype = dtype
        self.inputs_split = inputs_split
        self.quantization = quantization

        shape_in = self.shape_in
        shape_out = self.shape_out
        if quantization:
            codes, scales = quantized_shapes(quantization, stack, shape_in, shape_out)
            self.kernel = nnx.Param(jnp.zeros(codes.shape, codes.dtype))
            self.kernel_scale = nnx.Param(jnp.zeros(scales.shape, scales.dtype))
        else:
            # The initial variance depends on the number of inputs, so draw the kernel as a matrix.
            matrix = (*stack, math.prod(shape_in), math.prod(shape_out))
            kernel = _lecun(rngs.params(), matrix, param_dtype)
            self.kernel = nnx.Param(kernel.reshape(*stack, *shape_in, *shape_out))
            self.kernel_scale = None
        self.bias = nnx.Param(jnp.zeros((*stack, *shape_out), param_dtype)) if bias else None

        # Filled in by lora.with_lora.
        self.lora_a: nnx.LoRAParam | None = nnx.data(None)
        self.lora_b: nnx.LoRAParam | None = nnx.data(None)
        self.lora_scale = 0.0

    def __call__(self, x: Array, mesh: Mesh | None = None) -> Array:
        """[..., *in] -> [..., *out]; with a stacked kernel, [n, in] -> [layers, n, out]."""
        x = x.astype(self.dtype)
        if self.inputs_split:
            x = constrain(x, mesh, BATCH_AXES, *[None] * (x.ndim - 2), "tensor")
        kernel = self.kernel[...]
        scale = None if self.kernel_scale is None else self.kernel_scale[...]
        bias = None if self.bias is None else self.bias[...].astype(self.dtype)

        product = lora_product
        if kernel.ndim > len(self.shape_in) + len(self.shape_out):
            product = jax.vmap(lora_product, (None, 0, 0))
            if scale is None:
                y = _all_layers(x, kernel.astype(self.dtype))
            else:
                y = self._layer_by_layer(x, kernel, scale)
            bias = None if bias is None else bias[:, None]
        else:
            if scale is not None:
                kernel = self._dequantized(kernel, scale)
            y = checkpoint_name(matmul(partial(self._product, mesh=mesh), x, kernel), PROJECTION)
        if bias is not None:
            y = y + bias

        if self.lora_a is not None:
            flat = x.reshape(*x.shape[: x.ndim - len(self.shape_in)], -1)
            delta = product(flat, self.lora_a[...], self.lora_b[...])
            y = y + self.lora_scale * delta.reshape(y.shape)
        return y

    def _dequantized(self, kernel: Array, scale: Array) -> Array:
        """The kernel of a layer, [*in, *out], in the compute dtype."""
        axis = len(self.shape_in) - 1
        return dequantize(kernel, scale, self.quantization, axis, self.dtype)

    def _layer_by_layer(self, x: Array, kernel: Array, scale: Array) -> Array:
        """`_all_layers` for codes, one layer at a time: only one dequantised kernel exists."""

        def product(layer: tuple[Array, Array]) -> Array:
            return x @ self._dequantized(*layer)

        return jax.lax.map(jax.checkpoint(product), (kernel, scale))

    def _product(self, x: Array, kernel: Array, mesh: Mesh | None) -> Array:
        """x W in x's dtype, [..., *in] -> [..., *out]."""
        kernel = kernel.astype(x.dtype)
        axes = len(self.shape_in)
        lead = x.shape[: x.ndim - axes]

        # Gather a kernel that is split on its input side, part by part: NCCL gathers along the
        # first axis only, so for all parts at once XLA would keep a transposed copy of all layers.
        if self.inputs_split and mesh is not None and mesh.shape["fsdp"] > 1:
            if axes == 1:
                kernel = _gather(kernel, mesh)
            else:
                kernel = jnp.stack([_gather(part, mesh) for part in kernel])

        # If `tensor` does not split the parts, flatten them into one axis: with several axes, XLA's
        # CPU backend transposes the kernel for the gradient of x, which costs a sixth of the
        # product. On a TPU the flattened kernel would be a copy.
        if not for_tpu(mesh) and (mesh is None or mesh.shape["tensor"] == 1):
            y = x.reshape(*lead, -1) @ kernel.reshape(-1, math.prod(self.shape_out))
        else:
            y = jnp.tensordot(x, kernel, axes)
        return y.reshape(*lead, *self.shape_out)


def matmul(product: Callable[[Array, Array], Array], x: Array, kernel: Array) -> Array:
    """product(x, kernel): x [..., *in], kernel [*in, *out] -> [..., *out].

    The gradient of a float32 kernel is a float32 sum, whatever x's dtype. Autodiff would round it
    to x's dtype on each device before it is summed over devices and microbatches.
    """
    if kernel.dtype == x.dtype or kernel.dtype != jnp.float32:
        return product(x, kernel)
    return _with_float32_gradient(product, x, kernel)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_float32_gradient(
    product: Callable[[Array, Array], Array], x: Array, kernel: Array
) -> Array:
    return product(x, kernel)


def _float32_backward(
    product: Callable[[Array, Array], Array], saved: tuple[Array, Array], g: Array
) -> tuple[Array, Array]:
    x, kernel = saved
    (g_x,) = jax.vjp(lambda x: product(x, kernel), x)[1](g)

    # Sums over all axes of x and g that the kernel does not have.
    rows = list(range((x.ndim + g.ndim - kernel.ndim) // 2))
    g_kernel = jax.lax.dot_general(
        x, g, ((rows, rows), ([], [])), preferred_element_type=jnp.float32
    )
    return g_x, g_kernel


_with_float32_gradient.defvjp(
    lambda product, x, kernel: (product(x, kernel), (x, kernel)), _float32_backward
)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(kernel: Array, mesh: Mesh) -> Array:
    """Gather a kernel [in, ...] over fsdp, which splits its first axis, behind `tensor`.

    The gradient is split in the same way, so that its sum over devices is a reduce-scatter; the
    transpose of a plain constraint would sum it whole on every device.
    """
    return constrain(kernel, mesh, "tensor")


def _scatter(mesh: Mesh, _: None, g: Array) -> tuple[Array]:
    return (constrain(g, mesh, ("tensor", "fsdp")),)


_gather.defvjp(lambda kernel, mesh: (_gather(kernel, mesh), None), _scatter)


def _all_layers(x: Array, kernel: Array) -> Array:
    """x W for the kernels of all layers: [n, in], [layers, in, out] -> [layers, n, out].

    This is batched over the layers: for one large product, XLA would copy all kernels into another
    layout in every call.
    """
    rows = jnp.broadcast_to(x, (len(kernel), *x.shape))
    return jax.lax.dot_general(rows, kernel, (((2,), (1,)), ((0,), (0,))))


@jax.custom_vjp
def lora_product(x: Array, a: Array, b: Array) -> Array:
    """(x A) B for each part of a fused projection.

    x [..., in], A float32 [in, parts, r], B float32 [parts, r, out]
    -> [..., parts, out] in x's dtype.

    Each part is a separate product, because XLA computes a batched product transposed. The
    gradients are written by hand: autodiff would transpose the wide factor of each product (x, or
    the output's gradient), although transposing the narrow one is enough. The gradients of A and B
    accumulate in float32, whatever x's dtype.
    """
    return _lora_forward(x, a, b)[0]


def _lora_forward(x: Array, a: Array, b: Array) -> tuple[Array, tuple[Array, ...]]:
    low = jnp.tensordot(x, a.astype(x.dtype), 1)
    parts = [low[..., part, :] @ b[part].astype(x.dtype) for part in range(len(b))]
    return jnp.stack(parts, axis=-2), (x, low, a, b)


def _lora_backward(saved: tuple[Array, ...], g: Array) -> tuple[Array, Array, Array]:
    """g [..., parts, out]. With y = low B and low = x A: dlow = g B', dB = low' g, dA = x' dlow."""
    x, low, a, b = saved
    rows = list(range(x.ndim - 1))
    part = [x.ndim - 1]
    last = [x.ndim]
    in_float32 = partial(jax.lax.dot_general, preferred_element_type=jnp.float32)

    # [parts, ..., r] -> [..., parts, r]
    g_low = jax.lax.dot_general(g, b.astype(g.dtype), ((last, [2]), (part, [0])))
    g_low = jnp.moveaxis(g_low, 0, -2)

    # Sums over all rows; [parts, r, in] -> [in, parts, r] for A.
    g_b = in_float32(low, g, ((rows, rows), (part, part)))
    g_a = jnp.moveaxis(in_float32(g_low, x, ((rows, rows), ([], []))), -1, 0)

    g_x = jnp.tensordot(g_low, a.astype(g.dtype), axes=((-2, -1), (1, 2)))
    return g_x, g_a, g_b


lora_product.defvjp(_lora_forward, _lora_backward)


class MLP(nnx.Module):
    """Linear, activation, Linear: [..., n_in] -> [..., n_out]. Embedders and feed-forwards."""

    def __init__(
        self,
        n_in: int,
        n_hidden: int,
        n_out: int,
        activation: Callable[[Array], Array],
        **kw: Any,
    ):
        self.activation = activation
        self.fc1 = Linear(n_in, n_hidden, **kw)
        self.fc2 = Linear(n_hidden, n_out, inputs_split=True, **kw)

    def __call__(self, x: Array, mesh: Mesh | None = None) -> Array:
        return self.fc2(self.activation(self.fc1(x)), mesh)


class QKNorm(nnx.Module):
    """RMS norm of queries and keys [..., d] over a head's channels; two scales [*stack, d]."""

    def __init__(
        self, head_dim: int, *, param_dtype: Any, stack: tuple[int, ...] = (), eps: float = EPS
    ):
        self.eps = eps
        self.query = nnx.Param(jnp.ones((*stack, head_dim), param_dtype))
        self.key = nnx.Param(jnp.ones((*stack, head_dim), param_dtype))

    def __call__(self, q: Array, k: Array) -> tuple[Array, Array]:
        q = rms_norm(q, self.query[...], self.eps)
        k = rms_norm(k, self.key[...], self.eps)
        return q, k


def rms_norm(x: Array, scale: Array, eps: float = EPS) -> Array:
    """x / sqrt(mean(x^2) + eps) * scale, in float32 over the last axis. x [..., d], scale [d]."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale.astype(jnp.float32)).astype(x.dtype)


def modulated_norm(x: Array, shift: Array, scale: Array, eps: float = EPS) -> Array:
    """AdaLN (arXiv 2212.09748): LayerNorm(x) (1 + scale) + shift, without a learned affine map.

    x [n, t, D], shift and scale [n, D]. Statistics in float32.
    """
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return x32.astype(x.dtype) * (1 + scale[:, None]) + shift[:, None]


def sinusoidal_embedding(t: Array) -> Array:
    """Cosines, then sines, of t exp(-ln(10000) k / 128) for k < 128: float32 [n] -> [n, 256]."""
    angles = t[:, None] * _frequencies()
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _frequencies() -> np.ndarray:
    """The frequencies of `sinusoidal_embedding` with torch.exp's bits, float32 [128].

    At t = 1000, a difference in the last bit moves an angle by up to 6e-5: that would be most of
    the difference between our outputs and diffusers'. The exponents are rounded to float32, as
    there, and their exponentials to the nearest float32. torch.exp (of MKL, on x86) does the same,
    but rounds up at two of them, whose remainders are 0.479 and 0.482 of the last bit.
    """
    half = TIME_CHANNELS // 2
    exponents = np.float32(-np.log(10000.0)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)

    rounded_up = [12, 106]
    frequencies[rounded_up] = np.nextafter(frequencies[rounded_up], np.float32(1))
    return frequencies
