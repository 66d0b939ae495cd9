"""Cached steps: which are computed, and what the others predict."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realgen_jax.cached_steps import make_cache
from realgen_jax.rollout import SOLVERS, make_noiseless_plan

SIGMAS = np.float32([1.0, 0.9, 0.75, 0.65, 0.5, 0.35, 0.2, 0.1, 0.0])  # uneven steps
LATENTS = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)


def final(velocity, solver, cached_steps):
    plan = make_noiseless_plan(SIGMAS, solver, SIGMAS[:-1], cached_steps)
    return np.asarray(jax.jit(lambda plan, x: plan.sample(velocity, None, x))(plan, LATENTS))


@pytest.mark.parametrize(
    ("skipped", "computed"), [(1, [0, 1, 3, 5, 7]), (2, [0, 1, 4, 7]), (9, [0, 1, 7])]
)
def test_which_steps_are_computed(skipped, computed):
    cache = make_cache(SIGMAS, skipped)
    assert np.flatnonzero(cache.computed).tolist() == computed
    assert make_noiseless_plan(SIGMAS, "euler", SIGMAS[:-1], skipped).mean_steps == len(computed)


def test_the_weights_of_a_prediction():
    """Step 2 extends a line through 1 and 0.9 to 0.75; step 4 a parabola through the last three."""
    weights = make_cache(SIGMAS, 1).weights
    np.testing.assert_allclose(weights[2], [2.5, -1.5, 0.0], rtol=1e-5)
    # At 0.5, of 0.65, 0.9 and 1.
    np.testing.assert_allclose(weights[4], [20 / 8.75, -3.0, 15 / 8.75], rtol=1e-5)
    np.testing.assert_array_equal(weights[3], 0.0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_velocity_that_the_prediction_knows_is_exact(solver):
    """A line in sigma is predicted without error, whatever the solver; a jump is not."""

    def line(x, sigma, cond):
        return jnp.broadcast_to((3.0 - 2.0 * sigma)[:, None, None], x.shape)

    def jump(x, sigma, cond):
        return line(x, sigma, cond) * (sigma > 0.7)[:, None, None]

    np.testing.assert_allclose(final(line, solver, 1), final(line, solver, 0), rtol=0, atol=2e-6)
    assert np.abs(final(jump, solver, 1) - final(jump, solver, 0)).max() > 0.05


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_predicted_step_runs_no_network(solver):
    calls = []

    def velocity(x, sigma, cond):
        jax.debug.callback(lambda sigma: calls.append(float(sigma)), sigma[0])
        return x

    final(velocity, solver, 2)
    jax.effects_barrier()
    np.testing.assert_allclose(sorted(calls), SIGMAS[[7, 4, 1, 0]], rtol=1e-6)


def test_too_few_steps_are_refused():
    with pytest.raises(ValueError, match=r"cached_steps is 1, but the first two .* is 3"):
        make_cache(SIGMAS[-4:], 1)
