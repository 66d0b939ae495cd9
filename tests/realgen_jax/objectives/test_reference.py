"""What holds the policy to the base model, in every objective."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realgen_jax.config import base
from realgen_jax.objectives import OBJECTIVES, make_objective
from realgen_jax.objectives.decoupled import Sample
from realgen_jax.objectives.reference import norm_penalty, weighted_kl
from realgen_jax.sde import Steps


def test_only_velocities_above_the_limit_are_penalised():
    """|v| / |v_ref| is 2 and 0.5: with the limit 1.5, the mean of 0.5^2 and 0."""
    v = jnp.array([[3.0, 4.0], [0.0, 1.0]])
    v_ref = jnp.array([[0.0, 2.5], [2.0, 0.0]])
    value, gradient = jax.value_and_grad(norm_penalty)(v, v_ref, 1.5)
    np.testing.assert_allclose(value, 0.125, rtol=1e-6)
    # 2 (2 - 1.5) / 2 samples, times v / (|v| |v_ref|)
    np.testing.assert_allclose(gradient, [[0.5 * 3 / 12.5, 0.5 * 4 / 12.5], [0, 0]], rtol=1e-6)
    assert norm_penalty(v, v_ref, 2.1) == 0


def test_the_gradient_is_finite_where_the_velocity_is_0():
    zero = jnp.zeros((2, 3))
    assert jnp.isfinite(jax.grad(norm_penalty)(zero, jnp.ones((2, 3)), 1.0)).all()
    assert jnp.isfinite(jax.grad(norm_penalty)(jnp.ones((2, 3)), zero, 1.0)).all()


def test_a_kl_is_weighted_by_picture():
    values = jnp.array([[1.0, 3.0], [5.0, 7.0]])
    assert weighted_kl(values, None) == 4
    assert weighted_kl(values, jnp.array([1.0, 0.0])) == 1
    assert weighted_kl(values.mean(axis=1), jnp.array([0.0, 2.0])) == 6


# -- In every objective: a network of one matrix; the base model is the zero matrix.


def velocity(trainable, x, sigma, cond):
    weights = jnp.zeros((8, 8)) if trainable is None else trainable
    return x @ weights + sigma[:, None, None] + cond[:, None, None]


def make(loss, **keys):
    config = base()
    config.train.loss = loss
    config.update_from_flattened_dict({key.replace("__", "."): new for key, new in keys.items()})
    return make_objective(config.train, config.sample)


def gradient_of(objective):
    """(the KL's weights of 4 pictures) -> gradient and metrics at one step, or one noise level."""
    weights, old = jax.random.normal(jax.random.key(0), (2, 8, 8)) / 4
    x, x_next, x0 = jax.random.normal(jax.random.key(1), (3, 4, 3, 8))
    cond, sigma, advantages = jnp.arange(4.0), jnp.full(4, 0.5), jnp.linspace(-2.0, 2.0, 4)
    step = Steps(x=0.9, v=-0.1, std=0.3, sigma=jnp.float32(0.5), dt=0.1)

    def loss(weights, kl_weights):
        if objective.coupled:
            mean = step.mean(x, velocity(old, x, sigma, cond))
            value, (metrics, _) = objective._loss(
                velocity, weights, cond, x, x_next, mean, step, advantages, kl_weights
            )
            return value, metrics
        v_old, v_ref = (velocity(known, x, sigma, cond) for known in (old, None))
        sample = Sample(x, x0, x_next, sigma, advantages, kl_weights, v_old, v_ref)
        return objective.loss(velocity(weights, x, sigma, cond), sample)

    return partial(jax.jit(jax.grad(loss, has_aux=True)), weights)


@pytest.mark.parametrize("loss", OBJECTIVES)
def test_every_objective_takes_a_limit_on_the_norm(loss):
    plain, guarded = make(loss), make(loss, train__norm_guard__weight=0.5)
    assert guarded.work.frozen == plain.work.frozen + 1
    without, metrics = gradient_of(plain)(None)
    assert not {"velocity_norm", "kl_loss"} & set(metrics)

    gradient, more = gradient_of(guarded)(None)
    assert more["velocity_norm"] > 1
    assert more["kl_loss"] > 0
    assert more["norm_penalty"] > 0
    np.testing.assert_allclose(
        more["loss"], metrics["loss"] + 0.5 * more["norm_penalty"], rtol=1e-4
    )
    assert np.abs(gradient - without).max() > 1e-3


@pytest.mark.parametrize("loss", ["guard", "nft", "awm"])
def test_the_kl_of_a_picture_has_its_weight(loss):
    gradient = gradient_of(make(loss, train__beta=1.0))
    first, second, both, none = (
        gradient(jnp.float32(weights))[0]
        for weights in ([1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0])
    )
    np.testing.assert_allclose(none, gradient_of(make(loss))(None)[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(first + second - none, both, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(gradient(None)[0], both, rtol=1e-4, atol=1e-5)
    assert np.abs(first - second).max() > 1e-3
