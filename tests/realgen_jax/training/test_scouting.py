"""Scout and select: which previews are sampled in full, and from which noise."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realgen_jax.models.model import Model
from realgen_jax.training.programs import first_state, make_programs, make_recipe, sample_call
from realgen_jax.training.scouting import Scouted, scout_columns
from tests.helpers.golden_config import get_config
from tests.helpers.models import golden_model, one_device


def config(**scout):
    c = get_config()
    c.sample.branches = 1
    c.sample.scout.update(scout)
    return c


def test_a_preview_that_is_sampled_in_full_keeps_its_noise():
    """On a made-up velocity, without a compiler, previews are the full pictures to the bit."""
    c = config(previews=8, num_steps=3)
    c.train.loss = "nft"
    c.train.nft.sigmas = 2
    c.sample.sde_window_range = (0, 8)
    c.sample.sde_window_size = 3
    recipe = make_recipe(c)
    sigmas = np.float32([1.0, 0.7, 0.3, 0.0])
    model = SimpleNamespace(
        offload=False,
        token_shape=(4, 8),
        mesh=one_device(),
        sigmas=lambda steps: sigmas,
        velocity=lambda trainable, x, sigma, cond: jnp.sin(3 * x) + sigma[:, None, None],
        decode=lambda tokens: tokens,
    )
    key, other = jax.random.split(jax.random.key(1))
    numbers = jnp.int32([9, 2, 5, 0, 3, 3, 7, 1])
    with jax.disable_jit():
        previews = Model.sampler(model, 3, "euler")(model, (), None, key, numbers)
        plan = recipe.objective.make_plan(sigmas)
        full, _, _ = sample_call(
            recipe.layout, False, recipe.objective, model, (), None, (key, other), plan, numbers
        )
        turned = Model.sampler(model, 3, "euler")(model, (), None, key, numbers[::-1])
    np.testing.assert_array_equal(previews, full)
    np.testing.assert_array_equal(previews, turned[::-1])
    assert len(np.unique(np.asarray(full).reshape(8, -1), axis=0)) == 7  # one is there twice


@pytest.mark.slow
def test_previews_of_a_network_are_the_full_pictures_up_to_rounding():
    """With as many steps as the rollout."""
    c = config(previews=8, num_steps=3)
    c.sample.num_steps = 3
    c.sample.sde_window_range = (0, 8)
    c.sample.sde_window_size = 3
    c.train.loss = "nft"
    c.train.nft.sigmas = 2
    recipe = make_recipe(c)
    model = golden_model(32, recipe.trainable)
    programs = make_programs(recipe, model)
    trainable = first_state(recipe, model, jax.random.key(0)).trainable
    rng = np.random.default_rng(0)
    cond = jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype),
        model.abstract_cond(8, 16, jnp.float32, 3.5),
    )
    key, other = jax.random.split(jax.random.key(1))
    plan = recipe.objective.make_plan(model.sigmas(3))

    numbers = np.int32([9, 2, 5, 0, 3, 3, 7, 1])
    previews = programs.preview(model, trainable, cond, key, numbers)
    full, _, _ = programs.sample(model, trainable, cond, (key, other), plan, numbers)
    levels = np.abs(np.int32(previews) - np.int32(full))
    assert levels.max() <= 1
    assert levels.mean() < 1e-3
    assert len(np.unique(np.asarray(full).reshape(8, -1), axis=0)) == 8


def test_the_columns_of_an_epochs_previews():
    """Two prompts with two pictures of three previews each; the second prompt's ranks turn."""
    scouted = Scouted(jax.random.key(0), np.int32([[0, 1], [4, 3]]), np.eye(2) + 1, mean=0.25)
    rewards = np.array([[5.0, 4.0], [0.5, 0.25]])
    columns = scout_columns(scouted, rewards, previews=3)
    assert columns == {
        "scout/kept_share": pytest.approx(2 / 3),
        "scout/reward": 0.25,
        "scout/rank_correlation": pytest.approx(0.0),
    }

    same = replace(scouted, rewards=np.ones((2, 2)))
    assert "scout/rank_correlation" not in scout_columns(same, rewards, previews=3)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("same_latent", True, "same_latent is True, but config.sample.scout.previews is 8"),
        ("scout.previews", 0, "scout.num_steps is 2, which has no effect"),
    ],
)
def test_keys_that_contradict_previews_are_refused(key, value, message):
    c = config(previews=8, num_steps=2)
    c.sample.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=message):
        make_recipe(c)
