"""The parts FLUX's blocks are made of. Shapes: n images, t tokens, D channels, h heads of d channels."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

EPS = 1e-6  # of every normalisation in FLUX
PROJECTION = "projection"  # what rematerialisation knows the large products by
_lecun = nnx.initializers.lecun_normal()


class Linear(nnx.Module):
    """y = x W + b, computed in `dtype`, with an optional LoRA: y += alpha/r (x A) B (arXiv 2106.09685).

    kernel [*stack, *in, *out], bias [*stack, *out]. `stack` is (layers,) for a block that is scanned over, else ().
    A fused projection keeps its parts apart on an axis of their own, (3, D) out of qkv: the mesh axis `tensor` then
    splits each part by itself and no head is cut. Each part has its own LoRA factors, which is what peft trains on the
    separate projections: lora_a [*stack, in, parts, r], lora_b [*stack, parts, r, out].
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
    ):
        ins, outs = np.atleast_1d(n_in).tolist(), np.atleast_1d(n_out).tolist()
        self.dtype, self.axes_in, self.axes_out = dtype, len(ins), len(outs)
        kernel = _lecun(rngs.params(), (*stack, np.prod(ins), np.prod(outs)), param_dtype)
        self.kernel = nnx.Param(kernel.reshape(*stack, *ins, *outs))
        self.bias = nnx.Param(jnp.zeros((*stack, *outs), param_dtype))
        self.lora_a: nnx.LoRAParam | None = nnx.data(None)
        self.lora_b: nnx.LoRAParam | None = nnx.data(None)
        self.lora_scale = 0.0

    def __call__(self, x: Array, mesh: Mesh | None = None) -> Array:
        """[..., *in] -> [..., *out]; with a stacked kernel, [n, in] -> [layers, n, out].

        Where `tensor` splits no parts, they are one axis in the product: XLA's CPU turns the kernel for the gradient
        of x over several axes, which costs a sixth of that product.
        """
        x, kernel, bias = (a.astype(self.dtype) for a in (x, self.kernel[...], self.bias[...]))
        if kernel.ndim > self.axes_in + self.axes_out:
            # batched over the layers: as one product XLA copies all kernels into another layout, in every call
            rows = jnp.broadcast_to(x, (len(kernel), *x.shape))
            return jax.lax.dot_general(rows, kernel, (((2,), (1,)), ((0,), (0,)))) + bias[:, None]
        lead, outs = x.shape[: x.ndim - self.axes_in], kernel.shape[self.axes_in :]
        if mesh is None or mesh.shape["tensor"] == 1:
            y = x.reshape(*lead, -1) @ kernel.reshape(-1, math.prod(outs))
        else:
            y = jnp.tensordot(x, kernel, self.axes_in)
        y = checkpoint_name(y.reshape(*lead, *outs), PROJECTION) + bias
        if self.lora_a is not None:
            delta = lora_product(x, self.lora_a[...], self.lora_b[...])
            y = y + self.lora_scale * delta.reshape(y.shape)
        return y


@jax.custom_vjp
def lora_product(x: Array, a: Array, b: Array) -> Array:
    """(x A) B part by part, x [..., in], A float32 [in, parts, r], B float32 [parts, r, out] -> x's dtype [..., parts,
    out].

    A product for each part, as XLA computes a batched one transposed; and gradients by hand, as autodiff's would turn
    the wide factor of each (x, or the gradient of the output) where turning the narrow one is enough. Those of A and B
    are summed in float32, whatever x's dtype.
    """
    return _lora_forward(x, a, b)[0]


def _lora_forward(x: Array, a: Array, b: Array) -> tuple[Array, tuple[Array, ...]]:
    low = jnp.tensordot(x, a.astype(x.dtype), 1)
    parts = [low[..., part, :] @ b[part].astype(x.dtype) for part in range(len(b))]
    return jnp.stack(parts, axis=-2), (x, low, a, b)


def _lora_backward(saved: tuple[Array, ...], g: Array) -> tuple[Array, Array, Array]:
    x, low, a, b = saved
    rows, part, last = [*range(x.ndim - 1)], [x.ndim - 1], [x.ndim]
    summed = partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    g_low = jnp.moveaxis(
        jax.lax.dot_general(g, b.astype(g.dtype), ((last, [2]), (part, [0]))), 0, -2
    )
    g_b = summed(low, g, ((rows, rows), (part, part)))
    g_a = jnp.moveaxis(summed(g_low, x, ((rows, rows), ([], []))), -1, 0)
    return jnp.tensordot(g_low, a.astype(g.dtype), axes=((-2, -1), (1, 2))), g_a, g_b


lora_product.defvjp(_lora_forward, _lora_backward)


class MLP(nnx.Module):
    """Linear, activation, Linear: the embedders (SiLU) and the feed-forwards (GELU, tanh form) of FLUX."""

    def __init__(self, n_in: int, n_hidden: int, n_out: int, activation: Any, **kw: Any):
        self.activation = activation
        self.fc1 = Linear(n_in, n_hidden, **kw)
        self.fc2 = Linear(n_hidden, n_out, **kw)

    def __call__(self, x: Array) -> Array:
        return self.fc2(self.activation(self.fc1(x)))


class QKNorm(nnx.Module):
    """Root-mean-square norm of queries and keys over a head's channels, each with a learned scale [*stack, d]."""

    def __init__(self, head_dim: int, *, param_dtype: Any, stack: tuple[int, ...] = ()):
        self.query = nnx.Param(jnp.ones((*stack, head_dim), param_dtype))
        self.key = nnx.Param(jnp.ones((*stack, head_dim), param_dtype))

    def __call__(self, q: Array, k: Array) -> tuple[Array, Array]:
        return rms_norm(q, self.query[...]), rms_norm(k, self.key[...])


def rms_norm(x: Array, scale: Array) -> Array:
    """x / rms(x) * scale over the last axis; statistics in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + EPS)
    return (x32 * scale.astype(jnp.float32)).astype(x.dtype)


def modulated_norm(x: Array, shift: Array, scale: Array) -> Array:
    """AdaLN: LayerNorm(x) (1 + scale) + shift, no learned affine. x [n, t, D], shift and scale [n, D]."""
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + EPS)
    return x32.astype(x.dtype) * (1 + scale[:, None]) + shift[:, None]


def sinusoidal_embedding(t: Array, dim: int = 256) -> Array:
    """float32 [n] -> [n, dim]: cosines, then sines, of t exp(-ln(10000) k / (dim/2)).

    The exponents are rounded to float32 as PyTorch rounds them: at t = 1000 one last bit moves an angle by 6e-5.
    """
    exponents = (
        np.float32(-np.log(10000.0)) * np.arange(dim // 2, dtype=np.float32) / np.float32(dim // 2)
    )
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = t[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate neighbouring channel pairs of x [n, t, h, d] by the angles of cos, sin [t, d/2] (arXiv 2104.09864)."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = cos[:, None], sin[:, None]
    return (
        jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
        .reshape(x.shape)
        .astype(x.dtype)
    )
