"""Sampling: an ODE prefix shared by the branches, an SDE window that is recorded, an ODE suffix.

Functions here do not depend on a model. They take a function velocity(x, sigma, cond) -> v with
x [n, s, c], sigma float32 [n], cond a pytree whose leaves have n rows, and v float32 [n, s, c]. A
policy's velocity also takes its trained state first, velocity(trainable, x, sigma, cond).
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

Velocity = Callable[..., Array]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["ode", "noisy", "start"],
    meta_fields=["window", "bounds", "branches"],
)
@dataclass(frozen=True)
class Plan:
    """The plan of a rollout: T steps of each kind, and the window that uses the noisy steps.

    The window is [start, start + window). start, int32 [], is traced, so a new start does not
    trigger recompilation; it lies in [lo, hi - window] with bounds = (lo, hi). Each slot branches
    into `branches` rows at the start of the window.
    """

    ode: Steps
    noisy: Steps
    start: Array
    window: int
    bounds: tuple[int, int]
    branches: int

    def draw(self, key: Array) -> "Plan":
        """Return the same plan with a start drawn uniformly, including both ends."""
        low, high = self.bounds
        return replace(self, start=jax.random.randint(key, (), low, high - self.window + 1))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Trajectory:
    """The record of a window of w steps that the update needs.

    latents: float32 [w + 1, n, s, c], before the first step and after each step. mean: float32
    [w, n, s, c] and logp: float32 [w, n], under the sampling policy. steps: the coefficients, each
    float32 [w].
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
    """Return a plan for noise levels, float32 [T + 1], with the window at the lower bound.

    kind: a key of STOCHASTIC_STEPS. Raises ValueError if the window does not fit into the bounds or
    the steps, or if there is no such noise.
    """
    # The last step of cps has no noise, so nothing can be learnt from it.
    steps = len(sigmas) - 1
    last = steps - 1 if kind == "cps" else steps
    low, high = bounds
    if not (window > 0 and 0 <= low <= high - window and high <= last):
        without_noise = ", the last of which has no noise" if kind == "cps" else ""
        raise ValueError(
            f"config.sample.sde_window_size {window} does not fit sde_window_range {bounds}; "
            f"expected 0 <= lo, lo + window <= hi and hi <= {last} ({steps} steps{without_noise})"
        )
    # The noise of cps is sin(noise_level pi / 2), which falls again above 1.
    if noise_level <= 0 or (kind == "cps" and noise_level > 1):
        raise ValueError(
            f"config.sample.noise_level is {noise_level}; a window needs noise to learn from, "
            "expected a value above 0, and up to 1 with sde_type cps"
        )
    return Plan(
        ode=ode_steps(sigmas),
        noisy=STOCHASTIC_STEPS[kind](sigmas, noise_level),
        start=np.int32(low),  # numpy, so that making a plan does not initialise JAX
        window=window,
        bounds=bounds,
        branches=branches,
    )


def draw_latents(key: Array, slots: int, distinct: int, shape: tuple[int, int]) -> Array:
    """Draw initial latents, float32 [slots, s, c], of which `distinct` are different."""
    latents = jax.random.normal(key, (distinct, *shape))
    return jnp.repeat(latents, slots // distinct, axis=0)


def policy_step(velocity: Velocity, x: Array, step: Steps, cond: Any) -> tuple[Array, Array]:
    """Return (mean, v) of one step.

    Rollout and update both call this with the same batch size, so on unchanged weights the mean is
    bit-identical. The barriers keep the compiler from fusing it differently in the two programs.
    """
    v = velocity(x, jnp.broadcast_to(step.sigma, x.shape[:1]), cond)
    x, v = jax.lax.optimization_barrier((x, v))
    return jax.lax.optimization_barrier(step.mean(x, v)), v


def _integrate(velocity: Velocity, x: Array, cond: Any, ode: Steps, first: Any, stop: Any) -> Array:
    """Take Euler steps first, ..., stop - 1. Both bounds may be traced."""

    def body(i: Array, x: Array) -> Array:
        step = jax.tree.map(lambda coefficients: jnp.asarray(coefficients)[i], ode)
        mean, _ = policy_step(velocity, x, step, cond)
        return mean

    return jax.lax.fori_loop(first, stop, body, x)


def sample(velocity: Velocity, cond: Any, latents: Array, ode: Steps) -> Array:
    """Integrate the ODE from noise to data: latents float32 [n, s, c] -> [n, s, c]."""
    return _integrate(velocity, latents, cond, ode, 0, ode.sigma.shape[0])


def rollout(
    velocity: Velocity, cond: Any, latents: Array, noise: Array, plan: Plan
) -> tuple[Array, Trajectory]:
    """Sample p slots, each of which splits into k branches at the start of the window.

    cond: leaves [p, ...]; latents float32 [p, s, c]; noise float32 [w, n, s, c], n = p k images,
    slot-major. Returns the final latents float32 [n, s, c] and the window's Trajectory.
    Source: RealGen's windowed rollout (Flow-GRPO-Fast).
    """
    with jax.named_scope("prefix"):
        x = _integrate(velocity, latents, cond, plan.ode, 0, plan.start)

    # From here on every image has a row of its own.
    x, cond = jax.tree.map(lambda leaf: jnp.repeat(leaf, plan.branches, axis=0), (x, cond))
    first = x

    def in_window(coefficients: Array) -> Array:
        array = jnp.asarray(coefficients)
        return jax.lax.dynamic_slice_in_dim(array, plan.start, plan.window)

    def body(x: Array, step_and_noise: tuple[Steps, Array]) -> tuple[Array, tuple[Array, ...]]:
        step, z = step_and_noise
        mean, _ = policy_step(velocity, x, step, cond)
        x_next = mean + step.std * z
        return x_next, (x_next, mean, log_prob(x_next, mean, step.std))

    steps = jax.tree.map(in_window, plan.noisy)
    with jax.named_scope("window"):
        x, (after, mean, logp) = jax.lax.scan(body, x, (steps, noise))
    trajectory = Trajectory(jnp.concatenate([first[None], after]), mean, logp, steps)

    with jax.named_scope("suffix"):
        stop = plan.ode.sigma.shape[0]
        x = _integrate(velocity, x, cond, plan.ode, plan.start + plan.window, stop)
    return x, trajectory
