import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from realgen_jax.update import EmaConfig, ema_decay, ema_update, make_optimizer
from tests.helpers.goldens import golden


@pytest.mark.parametrize("name", ["decay0.9_every8", "decay0.99_every1"])
def test_ema_matches_the_golden(name):
    case = golden("09_ema/ema.npz")
    decay, every = name.removeprefix("decay").split("_every")
    config = EmaConfig(float(decay), int(every))
    params = {"a": case["param0"], "b": case["param1"]}
    ema = jax.tree.map(lambda p: jnp.asarray(p[0]), params)
    for step in range(40):
        np.testing.assert_allclose(
            ema_decay(jnp.int32(step), config.decay), case[f"{name}/decay"][step], rtol=1e-5
        )
        ema = ema_update(
            ema, jax.tree.map(lambda p, i=step: p[i + 1], params), jnp.int32(step), config
        )
        np.testing.assert_allclose(ema["a"], case[f"{name}/ema0"][step + 1], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(ema["b"], case[f"{name}/ema1"][step + 1], rtol=1e-5, atol=1e-6)


def test_gradient_clipping_is_applied():
    """D11: the configured norm is the norm that acts. AdamW hides a scale, so look before it."""
    optimizer = make_optimizer(1.0, 0.0, 0.0, 1.0, 0.0, 0.5)
    params = jnp.zeros(4)
    updates, _ = optimizer.update(jnp.full(4, 10.0), optimizer.init(params), params)
    clipped = 0.5 / 2
    np.testing.assert_allclose(optax.tree.norm(updates), 2 * clipped / (clipped + 1.0), rtol=1e-6)
