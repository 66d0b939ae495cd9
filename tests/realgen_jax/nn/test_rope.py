import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realgen_jax.nn.rope import apply_rope, rope_by_product


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def test_rotary_tables_may_differ_between_images():
    x = normal(0, 2, 5, 3, 8)
    angles = normal(1, 2, 5, 4)
    together = apply_rope(x, jnp.cos(angles), jnp.sin(angles))
    for i in range(2):
        alone = apply_rope(x[i : i + 1], jnp.cos(angles[i]), jnp.sin(angles[i]))
        np.testing.assert_allclose(together[i : i + 1], alone, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_product_for_tpus_rotates_alike(dtype):
    """Also in the gradient, which autodiff has of the other form."""
    x = normal(0, 2, 5, 3, 8).astype(dtype)
    angles = normal(1, 5, 4)
    g = normal(2, *x.shape).astype(dtype)
    results = []
    for rotate in (apply_rope, rope_by_product):
        y, backward = jax.vjp(
            lambda x, rotate=rotate: rotate(x, jnp.cos(angles), jnp.sin(angles)), x
        )
        results.append((y, *backward(g)))
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == dtype
        np.testing.assert_allclose(
            np.float32(actual), np.float32(expected), atol=1e-6 if dtype == "float32" else 2**-7
        )
