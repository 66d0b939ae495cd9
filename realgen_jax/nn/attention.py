"""Softmax attention with the fastest kernel that the platform has.

Shapes: n images, t tokens, h heads of d channels each. All functions take `lengths`, int32 [n] or
None: row i attends only to its first lengths[i] keys (at least 1), or to all keys if None. The
outputs for padding tokens are computed but meaningless.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
from absl import logging
from jax import Array
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from realgen_jax.sharding import BATCH_AXES, constrain, for_tpu, target

SPLASH = "splash"  # checkpoint name of the TPU kernel's output and softmax sums
LANES = 128  # width of a TPU's vector register
SPLASH_BLOCKS = (512, 256, LANES)  # tile sizes of the TPU kernel; the first that divides t is used


def fills_tiles(tokens: int, channels: int) -> bool:
    """Return whether a sequence and the channels of a head fill the tiles of the TPU's kernel."""
    return tokens % LANES == 0 and channels % LANES == 0


@jax.named_scope("attention")
def attention(
    q: Array, k: Array, v: Array, mesh: Mesh | None = None, lengths: Array | None = None
) -> Array:
    """softmax(q k^T / sqrt(d)) v, without a causal mask: [n, t, h, d] -> [n, t, h d].

    k and v may have another number of tokens than q.

    The kernel depends on the device that the program is for, the first of `mesh`:

    - NVIDIA GPU: cuDNN's flash kernel, if it takes the inputs (`takes_cudnn`).
    - TPU with as many keys as queries and sizes that fill its tiles: Pallas' splash kernel.
    - Otherwise: XLA.
    """
    q = constrain(q, mesh, BATCH_AXES, None, "tensor")
    k = constrain(k, mesh, BATCH_AXES, None, "tensor")
    v = constrain(v, mesh, BATCH_AXES, None, "tensor")

    if takes_cudnn(q, mesh):
        out = cudnn_attention(q, k, v, lengths)
    elif takes_splash(q, k, mesh):
        out = splash_attention(q, k, v, lengths, mesh)
    else:
        out = plain_attention(q, k, v, lengths)
    return out.reshape(*out.shape[:2], -1)


def takes_splash(q: Array, k: Array, mesh: Mesh | None) -> bool:
    """Return whether Pallas' splash kernel runs: q [n, t, h, d], k [n, s, h, d] on a TPU."""
    return for_tpu(mesh) and q.shape == k.shape and fills_tiles(q.shape[1], q.shape[3])


def takes_cudnn(q: Array, mesh: Mesh | None) -> bool:
    """Return whether cuDNN's flash kernel runs: q [n, t, h, d] on an NVIDIA GPU of `mesh`.

    It takes 16-bit inputs and heads of a multiple of 8 channels, at most 128 (256 from compute
    capability 9.0 on). A warning is logged for heads of other sizes: XLA's attention writes the
    scores to memory.
    """
    device = target(mesh)
    if device.platform != "gpu" or q.dtype not in (jnp.bfloat16, jnp.float16):
        return False

    # Such as "9.0"; an AMD GPU has a name there, such as "gfx942".
    capability = re.fullmatch(r"(\d+)\.\d+", device.compute_capability)
    if capability is None:
        return False

    largest = 256 if int(capability[1]) >= 9 else 128
    channels = q.shape[-1]
    fits = channels % 8 == 0 and channels <= largest
    if not fits:
        logging.log_first_n(
            logging.WARNING,
            "attention heads have %d channels; cuDNN takes multiples of 8 up to %d on this GPU, so "
            "XLA's attention runs, which needs more memory",
            1,
            channels,
            largest,
        )
    return fits


def plain_attention(q: Array, k: Array, v: Array, lengths: Array | None = None) -> Array:
    """softmax(q k^T / sqrt(d)) v in plain JAX: [n, t, h, d] -> [n, t, h, d]. Scores in float32.

    The softmax's denominator divides the result [t, d] instead of the weights [t, t]. On a CPU, the
    gradient then takes 40 % of the time that jax.nn.dot_product_attention needs.
    """
    scaled = jnp.swapaxes(q * q.shape[-1] ** -0.5, 1, 2)
    k = jnp.swapaxes(k, 1, 2)
    v = jnp.swapaxes(v, 1, 2)

    # Scores of all queries and keys [n, h, t, t]; padding keys get weight 0.
    scores = jnp.einsum("nhtd,nhsd->nhts", scaled, k, preferred_element_type=jnp.float32)
    if lengths is not None:
        valid = jnp.arange(k.shape[2]) < lengths[:, None]
        scores = jnp.where(valid[:, None, None], scores, -jnp.inf)

    # Softmax, with the division at the end. The largest score is subtracted to avoid overflow.
    largest = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - largest)
    out = jnp.einsum(
        "nhts,nhsd->nhtd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    out = out / weights.sum(axis=-1, keepdims=True)
    return jnp.swapaxes(out.astype(v.dtype), 1, 2)


def cudnn_attention(q: Array, k: Array, v: Array, lengths: Array | None = None) -> Array:
    """Attention by cuDNN's flash kernel: [n, t, h, d] -> [n, t, h, d], in bfloat16 or float16.

    jax has no gradient of it for an odd number of tokens (it takes a missing bias for one), so such
    a sequence gets one more token, to which no query attends.
    """
    tokens, keys = q.shape[1], k.shape[1]
    if keys % 2 and lengths is None:
        lengths = jnp.full(len(k), keys, jnp.int32)
    q, k, v = (jnp.pad(a, ((0, 0), (0, a.shape[1] % 2), (0, 0), (0, 0))) for a in (q, k, v))

    # The kernels with and without softmax statistics may differ in the last bit. The update needs
    # the statistics, so the rollout asks for them too.
    out, _ = jax.nn.dot_product_attention(
        q, k, v, key_value_seq_lengths=lengths, implementation="cudnn", return_residual=True
    )
    return out[:, :tokens]


def splash_attention(
    q: Array,
    k: Array,
    v: Array,
    lengths: Array | None = None,
    mesh: Mesh | None = None,
    interpret: bool = False,
) -> Array:
    """Attention by Pallas' TPU kernel: [n, t, h, d] -> [n, t, h, d], t a multiple of LANES.

    The kernel is opaque to GSPMD, so shard_map hands each device its own rows and heads.
    interpret: run the kernel without a TPU, slowly.
    """
    local = partial(_splash_on_one_device, interpret=interpret)
    if mesh is None:
        return local(q, k, v, lengths)

    rows = P(BATCH_AXES)
    heads = P(BATCH_AXES, None, "tensor")
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(heads, heads, heads, rows),
        out_specs=heads,
        check_vma=False,
    )(q, k, v, lengths)


def _splash_on_one_device(
    q: Array, k: Array, v: Array, lengths: Array | None, interpret: bool
) -> Array:
    """The kernel on this device's rows and heads: [n, t, h, d] -> [n, t, h, d]."""
    tokens, heads, channels = q.shape[1:]

    # All tiles get the same size. One backward kernel computes dq, dk and dv: five products instead
    # of the seven that two kernels take.
    block = next(size for size in SPLASH_BLOCKS if tokens % size == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,
    )
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([splash.FullMask((tokens, tokens))] * heads),
        block_sizes=sizes,
        residual_checkpoint_name=SPLASH,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    # Queries attend to keys in the same segment: all queries are in segment 0, padding keys in 1.
    segments = None
    if lengths is not None:
        padding = jnp.arange(tokens) >= lengths[:, None]
        padding = padding.astype(jnp.int32)
        segments = splash.SegmentIds(q=jnp.zeros_like(padding), kv=padding)

    # The kernel does not scale q by d^-1/2, and takes heads first: [h, t, d].
    scaled = jnp.swapaxes(q * channels**-0.5, 1, 2)
    k = jnp.swapaxes(k, 1, 2)
    v = jnp.swapaxes(v, 1, 2)
    out = jax.vmap(kernel)(scaled, k, v, segments)
    return jnp.swapaxes(out, 1, 2)
