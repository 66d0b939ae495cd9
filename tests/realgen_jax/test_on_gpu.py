"""What only an NVIDIA GPU can show: kernels, exact replay and hand-over of memory.

`make test-gpu` runs these. Without a GPU they fail.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realgen_jax.nn.attention import attention, plain_attention
from tests.helpers.models import one_device
from tests.helpers.replays import Replay

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def on_gpu():
    assert jax.default_backend() == "gpu", "run with JAX_PLATFORMS=cuda on a machine with a GPU"


# Of FLUX, SD3.5-M with an odd number of tokens, and Z-Image with padding.
@pytest.mark.parametrize(
    ("shape", "padded"),
    [((2, 1536, 24, 128), False), ((2, 1357, 24, 64), False), ((2, 1152, 30, 128), True)],
)
def test_cudnn_attention_is_attention(shape, padded):
    """Outputs and gradients, against float32."""
    n, tokens, heads, channels = shape
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:3])
    lengths = jnp.asarray([tokens - 37, tokens - 500], jnp.int32) if padded else None
    weight = jax.random.normal(keys[3], (n, tokens, heads * channels), jnp.float32)
    if padded:  # the outputs for padding are meaningless
        weight = jnp.where((jnp.arange(tokens) < lengths[:, None])[..., None], weight, 0)

    def score(apply, q, k, v):
        out = apply(q, k, v).reshape(weight.shape).astype(jnp.float32)
        return jnp.sum(jnp.where(weight != 0, out * weight, 0)), jnp.where(weight != 0, out, 0)

    def run(apply, *inputs):
        compute = jax.jit(jax.grad(partial(score, apply), argnums=(0, 1, 2), has_aux=True))
        gradients, out = compute(*inputs)
        return (out, *gradients)

    exact = partial(plain_attention, lengths=lengths)
    with jax.default_matmul_precision("highest"):
        expected = run(exact, *(a.astype(jnp.float32) for a in (q, k, v)))
    for got, want in zip(run(partial(attention, lengths=lengths), q, k, v), expected, strict=True):
        error = jnp.linalg.norm((got - want).ravel()) / jnp.linalg.norm(want.ravel())
        assert error < 1e-2


CASES = [
    ("flux", "both", "full"),
    ("flux", "both", "attention"),
    ("flux", "both", "dots"),
    ("sd3", "both", "full"),
    ("sd3", "bound", "full"),
    ("zimage", "both", "full"),
]


@cache
def updates(name, gradient, remat):
    """Two updates from the same state: the metrics of the first, and the gradients of both."""
    run = Replay(name, "wide", jnp.bfloat16, gradient, one_device(), remat, n=4)
    step = run.updater()
    results = [step(run.state(), run.batch) for _ in range(2)]
    moments = [[np.asarray(a) for a in jax.tree.leaves(s.opt_state)] for s, _ in results]
    return results[0][1], moments


@pytest.mark.parametrize(("name", "gradient", "remat"), CASES)
def test_an_update_sees_a_ratio_of_exactly_one(name, gradient, remat):
    metrics, _ = updates(name, gradient, remat)
    assert metrics["ratio_deviation"] == 0.0
    assert metrics["grad_norm"] > 0


@pytest.mark.parametrize(("name", "gradient", "remat"), CASES)
def test_an_update_computes_the_same_bits_again(name, gradient, remat):
    _, (first, second) = updates(name, gradient, remat)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["flux", "sd3", "zimage"])
def test_weights_in_host_memory_change_no_bit_of_the_gradient(name):
    """XLA of jax 0.10 would take the layers in the wrong order (nn/stack.py)."""
    _, (expected, _) = updates(name, "both", "full")
    run = Replay(name, "wide", jnp.bfloat16, "both", one_device(), n=4, offload=True)
    state, metrics = run.update()
    assert metrics["ratio_deviation"] == 0.0
    for ours, theirs in zip(jax.tree.leaves(state.opt_state), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_pictures_reach_torch_without_a_copy():
    torch = pytest.importorskip("torch")
    from reward_bridge.dlpack import to_torch

    images = jax.block_until_ready(jnp.arange(2 * 3 * 8 * 8, dtype=jnp.uint8).reshape(2, 3, 8, 8))
    tensor = to_torch(images)
    assert tensor.is_cuda
    assert tensor.data_ptr() == images.unsafe_buffer_pointer()
    assert torch.equal(tensor.cpu(), torch.from_numpy(np.asarray(images).copy()))
