"""Layers by themselves: what no family uses yet, or the comparisons of whole models do not show."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from realgen_jax.nn.layers import (
    Linear,
    QKNorm,
    modulated_norm,
    rms_norm,
    sinusoidal_embedding,
)

F32 = {"dtype": jnp.float32, "param_dtype": jnp.float32}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stack", [(), (3,)])
def test_a_linear_layer_with_and_without_bias(bias, stack):
    layer = Linear(4, 5, stack=stack, bias=bias, rngs=nnx.Rngs(0), **F32)
    assert (layer.bias is not None) == bias
    if bias:
        layer.bias[...] = normal(1, *stack, 5)

    x = normal(2, 2, 4)
    expected = jnp.einsum("ni,...io->...no", x, layer.kernel[...])
    if bias:
        expected = expected + layer.bias[...][..., None, :]
    np.testing.assert_allclose(layer(x), expected, atol=1e-6)

    names = {path[-1] for path, _ in nnx.to_flat_state(nnx.state(layer))}
    assert names == ({"kernel", "bias"} if bias else {"kernel"})


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_norms_add_eps_to_the_mean_square(eps):
    x = 0.1 * normal(0, 2, 3, 8)
    scale = normal(1, 8)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale
    np.testing.assert_allclose(rms_norm(x, scale, eps), expected, atol=1e-5)

    norm = QKNorm(8, param_dtype=jnp.float32, eps=eps)
    norm.query[...] = scale
    q, k = norm(x, x)
    np.testing.assert_allclose(q, expected, atol=1e-5)
    np.testing.assert_allclose(k, rms_norm(x, jnp.ones(8), eps), atol=1e-5)

    zeros = jnp.zeros((2, 8))
    centred = x - x.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    np.testing.assert_allclose(modulated_norm(x, zeros, zeros, eps), expected, atol=1e-5)


def test_sinusoidal_embeddings_have_the_frequencies_of_torch():
    """Of torch built with MKL: at t = 2^-40, the sines are the angles, exact in float32."""
    torch = pytest.importorskip("torch")
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    if not torch.backends.mkl.is_available():
        pytest.skip("this torch has no MKL")
    t = np.float32([2.0**-40, 1000.0])
    expected = embeddings.get_timestep_embedding(
        torch.tensor(t), 256, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    actual = np.asarray(sinusoidal_embedding(jnp.asarray(t)))
    np.testing.assert_array_equal(actual[0, 128:], expected[0, 128:])
    np.testing.assert_allclose(actual, expected, atol=3e-7)


@pytest.mark.parametrize(("n_in", "n_out"), [(32, 16), (32, (3, 8)), ((5, 8), 16)])
def test_the_gradient_of_a_float32_master_is_not_rounded(n_in, n_out):
    """In bfloat16: float32 values between those of bfloat16, near the float32 model's gradient."""
    x = jax.random.normal(jax.random.key(0), (4, 7, *np.atleast_1d(n_in)), jnp.bfloat16)

    def gradient(dtype):
        layer = Linear(n_in, n_out, dtype=dtype, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
        loss = lambda layer: jnp.sum(layer(x.astype(dtype)).astype(jnp.float32) ** 2)  # noqa: E731
        return np.asarray(nnx.grad(loss)(layer).kernel[...])

    ours = gradient(jnp.bfloat16)
    assert ours.dtype == np.float32
    assert (ours.view(np.uint32) & 0xFFFF).any()
    np.testing.assert_allclose(ours, gradient(jnp.float32), rtol=0, atol=0.01 * np.abs(ours).max())
