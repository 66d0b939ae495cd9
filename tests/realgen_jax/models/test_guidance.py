"""Classifier-free guidance: the formula, where the gradient goes, and settings without effect."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realgen_jax.models.flux.family import FLUX
from realgen_jax.models.guidance import (
    GRADIENTS,
    Guided,
    check_gradient,
    guided_velocity,
    is_guided,
)

GUIDED = replace(FLUX, negative_prompt="")
OFFSET = replace(FLUX, negative_prompt="", guidance_offset=1.0)


def network(weight, x, sigma, cond):
    """A velocity that is not linear in anything."""
    words = cond["words"][:, None]
    return jnp.tanh(x * weight + words) * (1.0 + sigma[:, None, None]) + words**2


@pytest.fixture
def arrays():
    keys = jax.random.split(jax.random.key(0), 4)
    return {
        "x": jax.random.normal(keys[0], (3, 5, 4)),
        "sigma": jnp.array([0.2, 0.5, 1.0]),
        "prompt": {"words": jax.random.normal(keys[1], (3, 4))},
        "negative": {"words": jax.random.normal(keys[2], (3, 4))},
        "scale": jnp.array([4.5, 2.0, 1.5]),
        "weight": jax.random.normal(keys[3], (4,)),
    }


def guided(arrays, gradient):
    return Guided(arrays["prompt"], arrays["negative"], arrays["scale"], gradient)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_velocity_is_the_published_combination(arrays, gradient):
    a = arrays
    free = network(a["weight"], a["x"], a["sigma"], a["negative"])
    bound = network(a["weight"], a["x"], a["sigma"], a["prompt"])
    expected = free + a["scale"][:, None, None] * (bound - free)
    v = guided_velocity(network, a["weight"], a["x"], a["sigma"], guided(a, gradient))
    np.testing.assert_allclose(v, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_gradient_goes_where_it_should(arrays, gradient):
    a = arrays

    def by_hand(weight):
        free = network(weight, a["x"], a["sigma"], a["negative"])
        if gradient == "bound":
            free = jax.lax.stop_gradient(free)
        bound = network(weight, a["x"], a["sigma"], a["prompt"])
        return jnp.sum((free + a["scale"][:, None, None] * (bound - free)) ** 3)

    def ours(weight):
        v = guided_velocity(network, weight, a["x"], a["sigma"], guided(a, gradient))
        return jnp.sum(v**3)

    expected = jax.grad(by_hand)(a["weight"])
    np.testing.assert_allclose(jax.grad(ours)(a["weight"]), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "scale", "expected"),
    [
        (FLUX, 3.5, False),
        (GUIDED, 1.0, False),
        (GUIDED, 0.0, False),
        (GUIDED, 1.01, True),
        (OFFSET, 0.0, False),
        (OFFSET, 0.5, True),
    ],
)
def test_guidance_is_off_where_it_changes_nothing(family, scale, expected):
    assert is_guided(family, scale) is expected


@pytest.mark.parametrize(
    ("family", "scale", "gradient", "message"),
    [
        (GUIDED, 4.5, "", r"cfg_gradient is '', but config\.sample\.guidance_scale 4\.5 turns on"),
        (GUIDED, 1.0, "both", r"no effect: config\.sample\.guidance_scale 1 turns .* off"),
        (FLUX, 3.5, "bound", r"no effect: FluxPipeline has no classifier-free guidance"),
    ],
)
def test_a_gradient_that_does_not_fit_is_refused(family, scale, gradient, message):
    with pytest.raises(ValueError, match=message):
        check_gradient(family, scale, gradient)
    check_gradient(family, scale, "both" if gradient == "" else "")
