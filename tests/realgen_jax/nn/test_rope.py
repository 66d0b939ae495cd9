import jax
import jax.numpy as jnp
import numpy as np

from realgen_jax.nn.rope import apply_rope


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def test_rotary_tables_may_differ_between_images():
    x = normal(0, 2, 5, 3, 8)
    angles = normal(1, 2, 5, 4)
    together = apply_rope(x, jnp.cos(angles), jnp.sin(angles))
    for i in range(2):
        alone = apply_rope(x[i : i + 1], jnp.cos(angles[i]), jnp.sin(angles[i]))
        np.testing.assert_allclose(together[i : i + 1], alone, atol=1e-6)
