"""Decoupled objectives: rollouts, what the gradient draws, and the old policy."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realgen_jax.config import base
from realgen_jax.objectives import make_objective
from realgen_jax.objectives.decoupled import DRAWS, Levels, strata
from realgen_jax.objectives.nft import nft_loss
from realgen_jax.sde import ode_steps
from realgen_jax.update import Batch, TrainState
from tests.helpers.objective_goldens import case

SIGMAS = np.linspace(1, 0, 11, dtype=np.float32)


def make(loss, beta=0.1, solver="euler", **settings):
    config = base()
    config.train.loss, config.train.beta, config.sample.solver = loss, beta, solver
    config.train[loss].update(settings)
    return make_objective(config.train, config.sample)


def velocity(trainable, x, sigma, cond):
    """A network of one matrix; the base model is the zero matrix."""
    weights = jnp.zeros((8, 8)) if trainable is None else trainable
    return x @ weights + sigma[:, None, None] + cond[:, None, None]


def state_of(seed=0, step=0):
    trainable, old = jax.random.normal(jax.random.key(seed), (2, 8, 8)) / 8
    return TrainState(trainable, trainable, None, jnp.int32(step), old)


def batch_of(objective, state, calls=2):
    """Rollouts of 4 pictures each."""
    plan = objective.make_plan(SIGMAS)
    collect = jax.jit(partial(objective.collect, velocity))
    cond = jnp.arange(4.0)
    batches = []
    for call in range(calls):
        latents = jax.random.normal(jax.random.key(call), (4, 3, 8))
        drawn = plan.draw(jax.random.key(10 + call))
        assert objective.draw_noise(jax.random.key(0), drawn, 4, (3, 8)) == ()
        policy = objective.rollout_policy(state)
        _, record = collect(policy, cond, latents, (), drawn)
        batches.append(Batch(record, cond, jnp.linspace(-2.0, 2.0, 4)))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)


# -- Noise levels


def test_strata_match_the_golden():
    recorded = case("strata")
    recorded.check("awm_discrete", strata(recorded["u6"], 12))
    recorded.check("awm_discrete_wo_init", 1 + strata(recorded["u6"], 11))
    for name, uniforms in (("flow_factory_nft_384", "u2"), ("flow_factory_awm_512", "u4")):
        schedule = recorded["flux_384_8" if uniforms == "u2" else "flux_512_10"]
        u = recorded[uniforms]
        candidates = Levels("nft", u.shape[1], "strata", 0, 1.0, 0.3).candidates(schedule)
        recorded.check(name, strata(u, len(candidates)))


def test_candidates_are_the_published_ones():
    sigmas = np.linspace(1, 0, 15, dtype=np.float32)
    np.testing.assert_array_equal(
        Levels("awm", 6, "strata", 1, 0.9, 0.0).candidates(sigmas), sigmas[1:12]
    )
    np.testing.assert_array_equal(
        Levels("nft", 9, "permuted", 0, 1.0, 0.0).candidates(SIGMAS), SIGMAS[:10]
    )


@pytest.mark.parametrize("draw", DRAWS)
def test_a_picture_never_gets_a_level_twice(draw):
    index = np.asarray(DRAWS[draw](jax.random.key(0), 5, 9, 50))
    assert index.shape == (5, 50)
    assert index.min() >= 0
    assert index.max() < 9
    assert all(len(set(column)) == 5 for column in index.T)
    same = (index == index[:, :1]).all()
    assert same == (draw == "strata")


def test_more_levels_than_steps_are_refused():
    with pytest.raises(
        ValueError, match="sigmas is 9, which is more than the 5 of 10 steps that"
    ) as error:
        make("nft", fraction=0.5).make_plan(SIGMAS)
    assert "first_step 0, fraction 0.5 and least_sigma 0" in str(error.value)


# -- Rollouts


def test_nft_samples_with_the_old_policy_and_awm_with_the_trained_one():
    state = state_of()
    assert make("nft").rollout_policy(state) is state.old
    assert make("awm").rollout_policy(state) is state.trainable
    assert make("awm", off_policy=True).rollout_policy(state) is state.old


def test_a_rollout_is_the_solution_of_the_ode():
    objective, state = make("nft"), state_of()
    record = jax.tree.map(lambda leaf: leaf[0], batch_of(objective, state).record)
    x = jax.random.normal(jax.random.key(0), (4, 3, 8))
    steps = ode_steps(SIGMAS)
    for i, sigma in enumerate(SIGMAS[:-1]):
        x = x + steps.v[i] * velocity(state.old, x, jnp.full(4, sigma), jnp.arange(4.0))
    np.testing.assert_allclose(record.x0, x, rtol=1e-4, atol=1e-5)
    second = batch_of(make("nft", solver="dpm2"), state).record.x0[0]
    assert 1e-5 < np.abs(second - record.x0).max() < 0.5


# -- Gradients


def test_a_gradient_is_the_mean_over_calls_and_levels():
    objective, state = make("nft", sigmas=2), state_of(step=5)
    batch = batch_of(objective, state)
    grads, metrics = jax.jit(partial(objective.gradient, velocity))(state, batch)

    @jax.jit
    def by_hand(trainable):
        losses = []
        for number in range(2):
            one_call = jax.tree.map(lambda leaf, number=number: leaf[number], batch)
            sigmas, keys = objective._draw(one_call.record, state.step)
            for sigma, key in zip(sigmas, keys, strict=True):
                level = sigma[:, None, None]
                x0 = one_call.record.x0
                x = (1 - level) * x0 + level * jax.random.normal(key, (4, 3, 8))
                v, v_old, v_ref = (
                    velocity(weights, x, sigma, one_call.cond)
                    for weights in (trainable, state.old, None)
                )
                value, _ = nft_loss(v, v_old, x, x0, sigma, one_call.advantages, objective.config)
                losses.append(value + 0.1 * jnp.mean((v - v_ref) ** 2))
        return jnp.mean(jnp.stack(losses))

    loss, expected = jax.value_and_grad(by_hand)(state.trainable)
    np.testing.assert_allclose(grads, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert metrics["old_distance"] > 0
    assert 0.5 < metrics["velocity_norm"] < 2


@pytest.mark.parametrize("loss", ["nft", "awm"])
def test_draws_differ_between_optimizer_steps_and_repeat_with_the_same_key(loss):
    objective = make(loss, sigmas=2)
    batch = batch_of(objective, state_of())
    gradient = jax.jit(partial(objective.gradient, velocity))
    first, again, other = (gradient(state_of(step=step), batch)[0] for step in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-4


def test_awm_on_policy_has_ratio_1_and_off_policy_refers_to_the_old_policy():
    state = state_of()
    on, off = make("awm", clip_range=1e-6), make("awm", clip_range=1e-6, off_policy=True)
    for objective, clipped in ((on, 0.0), (off, 1.0)):
        batch = batch_of(objective, state)
        _, metrics = jax.jit(partial(objective.gradient, velocity))(state, batch)
        assert metrics["clipfrac"] == clipped
        assert metrics["matching_error"] > 0


def test_awm_without_an_average_has_no_old_policy():
    assert make("awm").keeps_old
    objective = make("awm", beta_ema=0.0)
    assert not objective.keeps_old
    state = replace(state_of(), old=None)
    gradient = jax.jit(partial(objective.gradient, velocity))
    grads, metrics = gradient(state, batch_of(objective, state))
    assert np.abs(grads).max() > 0
    assert "old_distance" not in metrics
    assert objective.after_epoch(state) is state


# -- Old policies


def test_the_old_policy_moves_after_an_epoch():
    objective = make("nft", old_rate=0.01, old_most=0.5)
    for step, decay in ((0, 0.0), (10, 0.1), (400, 0.5)):
        state = state_of(step=step)
        after = objective.after_epoch(state)
        np.testing.assert_allclose(
            after.old, decay * state.old + (1 - decay) * state.trainable, rtol=1e-6, atol=1e-7
        )
        assert after.trainable is state.trainable
