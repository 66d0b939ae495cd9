"""Softmax attention by the fastest kernel that the platform has. n images, t tokens, h heads of d channels."""

from dataclasses import fields
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from realgen_jax.sharding import BATCH_AXES, constrain

LANES = 128  # a TPU's vector register is so wide


@jax.named_scope("attention")
def attention(q: Array, k: Array, v: Array, mesh: Mesh | None = None) -> Array:
    """Softmax attention over all tokens, no mask: [n, t, h, d] -> [n, t, h d].

    The only place that asks what the platform is. CUDA and 16 bits: cuDNN's flash kernel, chosen while tracing because
    it refuses to be traced where it is not installed. TPU and sizes that fill its tiles: Pallas' splash kernel, chosen
    while lowering, so that a TPU's program can be built on any machine. XLA in all other cases.
    """
    q, k, v = (constrain(a, mesh, BATCH_AXES, None, "tensor") for a in (q, k, v))
    if jax.default_backend() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16):
        out = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    elif q.shape[1] % LANES == 0 and q.shape[3] % LANES == 0:
        out = jax.lax.platform_dependent(
            q, k, v, tpu=partial(splash_attention, mesh=mesh), default=plain_attention
        )
    else:
        out = plain_attention(q, k, v)
    return out.reshape(*out.shape[:2], -1)


def plain_attention(q: Array, k: Array, v: Array) -> Array:
    """softmax(q k^T / sqrt(d)) v as written: [n, t, h, d] -> [n, t, h, d]. Scores in float32.

    Divided by the sum at the end, on [t, d] instead of [t, t]: its gradient takes XLA's CPU 40 % of the time of
    jax.nn.dot_product_attention's.
    """
    scaled, k, v = (jnp.swapaxes(a, 1, 2) for a in (q * q.shape[-1] ** -0.5, k, v))
    scores = jnp.einsum("nhtd,nhsd->nhts", scaled, k, preferred_element_type=jnp.float32)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    out = jnp.einsum(
        "nhts,nhsd->nhtd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return jnp.swapaxes((out / weights.sum(axis=-1, keepdims=True)).astype(v.dtype), 1, 2)


def splash_attention(
    q: Array, k: Array, v: Array, mesh: Mesh | None = None, interpret: bool = False
) -> Array:
    """Attention by Pallas' TPU kernel: [n, t, h, d] -> [n, t, h, d], t a multiple of LANES.

    The kernel is opaque to GSPMD, so each device is handed its own rows and heads. It does not scale q by d^-1/2.
    """

    def local(q: Array, k: Array, v: Array) -> Array:
        tokens, heads, channels = q.shape[1:]
        block = next(size for size in (512, 256, LANES) if tokens % size == 0)
        names = [
            field.name for field in fields(splash.BlockSizes) if field.name.startswith("block_")
        ]
        kernel = splash.make_splash_mha(
            splash.MultiHeadMask([splash.FullMask((tokens, tokens))] * heads),
            block_sizes=splash.BlockSizes(**dict.fromkeys(names, block)),
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q * channels**-0.5, k, v))
        return jnp.swapaxes(jax.vmap(kernel)(q, k, v), 1, 2)

    if mesh is None:
        return local(q, k, v)
    spec = P(BATCH_AXES, None, "tensor")
    return jax.shard_map(
        local, mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False
    )(q, k, v)
