"""Sampling. A rollout is an ODE prefix shared by the branches, an SDE window that is recorded, and an ODE suffix.

It is given a velocity function and knows no model: velocity(params, trainable, x, sigma, cond) -> v with
x [n, s, c], sigma float32 [n], cond a pytree whose leaves have n rows, v float32 [n, s, c].
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from realgen_jax.sde import STOCHASTIC_STEPS, Steps, log_prob, ode_steps

Velocity = Callable[[Any, Any, Array, Array, Any], Array]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["ode", "noisy", "start"],
    meta_fields=["window", "bounds", "branches"],
)
@dataclass(frozen=True)
class Plan:
    """How a rollout runs: T steps of either kind, and the window [start, start + window) that takes the noisy ones.

    start int32 [] is traced, so a new start never recompiles; it lies in [lo, hi - window] with bounds = (lo, hi).
    `branches` rows grow out of each slot at the start.
    """

    ode: Steps
    noisy: Steps
    start: Array
    window: int
    bounds: tuple[int, int]
    branches: int

    def draw(self, key: Array) -> "Plan":
        """The same plan with a start drawn uniformly, both ends included."""
        low, high = self.bounds
        return replace(self, start=jax.random.randint(key, (), low, high - self.window + 1))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Trajectory:
    """What the update needs of a window of w steps.

    latents float32 [w + 1, n, s, c]: before the first step, then after each; mean float32 [w, n, s, c] and logp
    float32 [w, n] under the policy that sampled; steps: the coefficients, each float32 [w].
    """

    latents: Array
    mean: Array
    logp: Array
    steps: Steps


def make_plan(
    sigmas: np.ndarray,
    *,
    kind: str,
    noise_level: float,
    window: int,
    bounds: tuple[int, int],
    branches: int,
) -> Plan:
    """A plan that starts at the lower bound. Raises ValueError for a window that the bounds or steps cannot hold."""
    steps = len(sigmas) - 1
    low, high = bounds
    if kind not in STOCHASTIC_STEPS:
        raise ValueError(f"sde_type is {kind!r}; choose one of {', '.join(STOCHASTIC_STEPS)}")
    last = steps - 1 if kind == "cps" else steps
    if not (window > 0 and 0 <= low <= high - window and high <= last):
        raise ValueError(
            f"a window of {window} steps does not fit sde_window_range {bounds}; expected 0 <= lo, lo + window <= hi "
            f"and hi <= {last} ({steps} steps{', the last of which has no noise' if kind == 'cps' else ''})"
        )
    if noise_level <= 0:
        raise ValueError(
            f"noise_level is {noise_level}; a window needs noise to learn from, expected a value above 0"
        )
    return Plan(
        ode_steps(sigmas),
        STOCHASTIC_STEPS[kind](sigmas, noise_level),
        jnp.int32(low),
        window,
        bounds,
        branches,
    )


def draw_noise(
    latent_key: Array,
    noise_key: Array,
    plan: Plan,
    slots: int,
    distinct: int,
    shape: tuple[int, int],
) -> tuple[Array, Array]:
    """Starting latents [slots, s, c], of which `distinct` differ, and the window's noise [w, n, s, c]."""
    latents = jnp.repeat(
        jax.random.normal(latent_key, (distinct, *shape)), slots // distinct, axis=0
    )
    return latents, jax.random.normal(noise_key, (plan.window, slots * plan.branches, *shape))


def policy_step(
    velocity: Velocity, params: Any, trainable: Any, x: Array, step: Steps, cond: Any
) -> tuple[Array, Array]:
    """(mean, v) of one step. Rollout and update both call this, at the same batch size, so that on unchanged weights
    the mean is the same to the last bit; the barriers keep the compiler from fusing it differently in the two.
    """
    v = velocity(params, trainable, x, jnp.broadcast_to(step.sigma, x.shape[:1]), cond)
    x, v = jax.lax.optimization_barrier((x, v))
    return jax.lax.optimization_barrier(step.mean(x, v)), v


def _integrate(
    velocity: Velocity,
    params: Any,
    trainable: Any,
    x: Array,
    cond: Any,
    ode: Steps,
    first: Any,
    stop: Any,
):
    """Euler steps first, ..., stop - 1; both may be traced."""

    def body(i: Array, x: Array) -> Array:
        step = jax.tree.map(lambda a: jnp.asarray(a)[i], ode)
        return policy_step(velocity, params, trainable, x, step, cond)[0]

    return jax.lax.fori_loop(first, stop, body, x)


def sample(
    velocity: Velocity, params: Any, trainable: Any, cond: Any, latents: Array, ode: Steps
) -> Array:
    """Integrate the ODE from noise to data: latents float32 [n, s, c] -> [n, s, c]."""
    return _integrate(velocity, params, trainable, latents, cond, ode, 0, ode.sigma.shape[0])


def rollout(
    velocity: Velocity,
    params: Any,
    trainable: Any,
    cond: Any,
    latents: Array,
    noise: Array,
    plan: Plan,
) -> tuple[Array, Trajectory]:
    """Sample p slots, each of which splits into k branches where the window starts: n = p k images, slot-major.

    cond: leaves [p, ...]; latents float32 [p, s, c]; noise float32 [w, n, s, c]. Returns the final latents float32
    [n, s, c] and the window's Trajectory. Source: RealGen's windowed rollout (Flow-GRPO-Fast).
    """
    with jax.named_scope("prefix"):
        x = _integrate(velocity, params, trainable, latents, cond, plan.ode, 0, plan.start)
    x, cond = jax.tree.map(lambda a: jnp.repeat(a, plan.branches, axis=0), (x, cond))
    steps = jax.tree.map(
        lambda a: jax.lax.dynamic_slice_in_dim(jnp.asarray(a), plan.start, plan.window), plan.noisy
    )

    def body(
        x: Array, step_and_noise: tuple[Steps, Array]
    ) -> tuple[Array, tuple[Array, Array, Array]]:
        step, z = step_and_noise
        mean, _ = policy_step(velocity, params, trainable, x, step, cond)
        x_next = mean + step.std * z
        return x_next, (x_next, mean, log_prob(x_next, mean, step.std))

    first = x
    with jax.named_scope("window"):
        x, (after, mean, logp) = jax.lax.scan(body, x, (steps, noise))
    trajectory = Trajectory(jnp.concatenate([first[None], after]), mean, logp, steps)
    stop = plan.ode.sigma.shape[0]
    with jax.named_scope("suffix"):
        x = _integrate(
            velocity, params, trainable, x, cond, plan.ode, plan.start + plan.window, stop
        )
    return x, trajectory
