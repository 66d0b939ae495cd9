"""Hybrid inference: the tuned weights in the first steps, the base model in the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realgen_jax.config import base
from realgen_jax.models.model import Model, tuned_steps
from realgen_jax.nn.lora import LoraConfig
from tests.helpers.models import fresh_adapters

KEY = jax.random.key(0)
STEPS = 4
VELOCITY = jax.jit(Model.velocity)
DECODE = jax.jit(Model.decode)


def tuned_part(model, kind):
    """A model and a trained state that differs from it."""
    if kind == "lora":
        model, state = fresh_adapters(model, LoraConfig(2, 4.0), KEY)
        return model, jax.tree.map(lambda leaf: leaf + 0.3, state)
    state = model.trainable.init(model, KEY)
    return model, jax.tree.map(lambda leaf: 1.2 * leaf, state)


def random_cond(model):
    """Random embeddings of two prompts, and the guidance scale."""

    def fill(leaf):
        if leaf.ndim == 1:
            return jnp.full(leaf.shape, 3.5)
        return jax.random.normal(KEY, leaf.shape)

    return jax.tree.map(fill, model.abstract_cond(2, 8, jnp.float32, 3.5))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "all weights"])
def test_the_base_model_takes_the_last_steps(tiny, kind):
    model, state = tuned_part(tiny, kind)
    cond = random_cond(model)
    ids = jnp.arange(2)

    settings = base().evaluate.sample
    settings.update(num_steps=STEPS, tuned_share=0.5)
    sample = model.sampler(settings.num_steps, settings.solver, tuned_steps(settings))
    pictures = np.asarray(sample(model, state, cond, KEY, ids), int)

    def stepped(tuned):
        """The same, step by step, with the tuned weights in this many."""
        sigmas = model.sigmas(STEPS)
        x = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(KEY, i), model.token_shape))(
            ids
        )
        for step in range(STEPS):
            weights = state if step < tuned else None
            v = VELOCITY(model, weights, x, jnp.full(2, sigmas[step]), cond)
            x = x + (sigmas[step + 1] - sigmas[step]) * v
        return np.asarray(DECODE(model, x), int)

    assert np.abs(pictures - stepped(2)).max() <= 1
    assert np.abs(pictures - stepped(STEPS)).max() > 1
    assert np.abs(pictures - stepped(0)).max() > 1
