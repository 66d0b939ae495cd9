"""Steps of a rollout whose velocity is predicted from earlier ones, without a pass of the network.

The prediction is the polynomial in sigma through the last computed velocities: the forecast of
TaylorSeer (arXiv 2503.06923), of the velocity as a whole instead of each block's features. It knows
nothing of the model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

ORDER = 2  # of the polynomial. docs/training.md has what orders 0, 1 and 2 gave


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Which of T steps compute their velocity, and how the others predict it.

    computed: bool [T]. weights: float32 [T, m], of the last m computed velocities, the newest
    first.
    """

    computed: Array
    weights: Array


def make_cache(sigmas: np.ndarray, skipped: int, order: int = ORDER) -> Cache:
    """Return the cache of a schedule, float32 [T + 1].

    The first two steps and the last one compute their velocity, and of those between every
    (skipped + 1)-th. Raises ValueError if that leaves no step to predict.
    """
    steps = len(sigmas) - 1
    number = np.arange(steps)
    computed = (number < 2) | (number == steps - 1) | ((number - 1) % (skipped + 1) == 0)
    if computed.all():
        raise ValueError(
            f"config.sample.cached_steps is {skipped}, but the first two steps and the last one "
            f"are always computed, and config.sample.num_steps is {steps}; expected 0, or 4 steps "
            "or more"
        )

    # Lagrange's weights at the step's sigma, of as many computed steps as there are by then.
    sigmas64 = sigmas.astype(np.float64)
    weights = np.zeros((steps, order + 1))
    for step in np.flatnonzero(~computed):
        known = sigmas64[np.flatnonzero(computed[:step])[::-1][: order + 1]]
        for row, own in enumerate(known):
            others = np.delete(known, row)
            weights[step, row] = np.prod((sigmas64[step] - others) / (own - others))
    return Cache(computed, np.float32(weights))


def sample_cached(
    velocity: Callable[..., Array],
    cond: Any,
    latents: Array,
    steps: Any,
    advance: Callable[..., tuple[Array, Array]],
    cache: Cache,
) -> Array:
    """Integrate the ODE from noise to data: latents float32 [n, s, c] -> [n, s, c].

    steps, advance: the coefficients and the step of a solver (rollout.py).
    """
    tables = jax.tree.map(jnp.asarray, (steps, cache))

    def body(i: Array, before: tuple) -> tuple:
        x, last, known = before
        step, own = jax.tree.map(lambda leaf: leaf[i], tables)

        def compute(known: Array) -> tuple[Array, Array]:
            v = velocity(x, jnp.broadcast_to(step.sigma, x.shape[:1]), cond)
            return v, jnp.concatenate([v[None], known[:-1]])

        def predict(known: Array) -> tuple[Array, Array]:
            return jnp.tensordot(own.weights, known, axes=1), known

        # A conditional, not a choice between two results: a predicted step runs no network.
        v, known = jax.lax.cond(own.computed, compute, predict, known)
        return (*advance(x, v, last, step), known)

    known = jnp.zeros((cache.weights.shape[1], *latents.shape), latents.dtype)
    first = (latents, jnp.zeros_like(latents), known)
    x, _, _ = jax.lax.fori_loop(0, len(cache.computed), body, first)
    return x
