"""Sampling: an ODE prefix shared by the branches, an SDE window that is recorded, an ODE suffix.

Functions here do not depend on a model. They take a function velocity(x, sigma, cond) -> v with
x [n, s, c], sigma float32 [n], cond a pytree whose leaves have n rows, and v float32 [n, s, c]. A
policy's velocity also takes its trained state first, velocity(trainable, x, sigma, cond).
"""

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from realgen_jax.cached_steps import Cache, make_cache, sample_cached
from realgen_jax.sde import (
    NOISE_SCHEDULES,
    STOCHASTIC_STEPS,
    Steps,
    TwoSteps,
    dpm2_steps,
    log_prob,
    ode_steps,
    shortened,
)
from realgen_jax.sharding import for_gpu, target
from realgen_jax.windows import DRAWN, Moves

LAST_JAXLIB = (0, 12)  # the newest series that was seen to know the option of YNNPACK

Velocity = Callable[..., Array]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["ode", "noisy", "start", "trained", "after"],
    meta_fields=["window", "bounds", "branches", "moves"],
)
@dataclass(frozen=True)
class Plan:
    """The plan of a rollout: T steps of each kind, and the window that uses the noisy steps.

    The window is [start, start + window). start, int32 [], is traced, so a new start does not
    trigger recompilation; it lies in [lo, hi - window] with bounds = (lo, hi). Each slot branches
    into `branches` rows at the start of the window. trained, int32 [k]: the steps of the window
    that are trained on; None: all. after: the steps behind the window, if they are not the
    schedule's.
    """

    ode: Steps
    noisy: Steps
    start: Array
    trained: Array | None
    after: "After | None"
    window: int
    bounds: tuple[int, int]
    branches: int
    moves: Moves

    @property
    def mean_steps(self) -> float:
        """Mean number of steps from noise to image, over all starts."""
        if self.after is None:
            return len(self.ode.sigma)
        low, high = self.bounds
        return float(np.mean(np.arange(low + self.window, high + 1) + self.after.count))

    def draw(self, key: Array, epoch: int = 0) -> "Plan":
        """Return the plan of one call in an epoch, counted from 0.

        With the strategy "random" the start is drawn uniformly, including both ends. Of k trained
        steps each choice is equally likely.
        """
        low, high = self.bounds
        last = high - self.window
        if self.moves.strategy == "random":
            start = jax.random.randint(key, (), low, last + 1)
        else:
            start = np.int32(low + self.moves.start(epoch, last - low))

        trained = self.trained
        if trained is not None:
            order = jax.random.permutation(jax.random.fold_in(key, 1), self.window)
            trained = jnp.sort(order[: len(trained)])
        return replace(self, start=start, trained=trained)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class After:
    """Fewer steps, of second order, behind the window (MixGRPO-Flash).

    steps: for each start of the window, float32 [starts, most steps]. count: int32 [starts], the
    number of these steps.
    """

    steps: TwoSteps
    count: Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["steps", "levels", "key", "cache"],
    meta_fields=["solver"],
)
@dataclass(frozen=True)
class NoiselessPlan:
    """The plan of a rollout without noise. solver: a key of SOLVERS, which made the steps.

    levels: float32 [c], the noise levels that the gradient draws from. key: uint32 [2], the call's
    own random key, for what its gradient draws. cache: the steps whose velocity is predicted; None:
    all are computed.
    """

    steps: Any
    levels: Array
    key: Array
    solver: str
    cache: Cache | None

    @property
    def mean_steps(self) -> float:
        """Number of steps from noise to image that compute a velocity."""
        if self.cache is None:
            return len(self.steps.sigma)
        return int(np.sum(self.cache.computed))

    def draw(self, key: Array, epoch: int = 0) -> "NoiselessPlan":
        """Return the plan of one call."""
        return replace(self, key=jax.random.key_data(key))

    def sample(self, velocity: Velocity, cond: Any, latents: Array) -> Array:
        """From noise to data: latents float32 [n, s, c] -> [n, s, c]."""
        solver = SOLVERS[self.solver]
        if self.cache is None:
            return solver.sample(velocity, cond, latents, self.steps)
        return sample_cached(velocity, cond, latents, self.steps, solver.advance, self.cache)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Trajectory:
    """The record of a window of w steps that the update needs.

    latents: float32 [w + 1, n, s, c], before the first step and after each step. mean: float32
    [w, n, s, c] and logp: float32 [w, n], under the sampling policy. steps: the coefficients, each
    float32 [w]. trained: int32 [k], the steps that the update replays; None: all.
    """

    latents: Array
    mean: Array
    logp: Array
    steps: Steps
    trained: Array | None = None


def make_plan(
    sigmas: np.ndarray,
    *,
    kind: str,
    noise_level: float,
    noise_schedule: str = "constant",
    noise_least: float = 0.0,
    window: int,
    bounds: tuple[int, int],
    branches: int,
    moves: Moves = DRAWN,
    trained: int = 0,
    after: float = 0.0,
) -> Plan:
    """Return a plan for noise levels, float32 [T + 1], with the window at the lower bound.

    kind: a key of STOCHASTIC_STEPS. noise_schedule: of NOISE_SCHEDULES. trained: number of steps of
    the window to train on; 0: all. after: the share of points of the schedule that are left behind
    the window, for steps of second order; 0: the schedule's own steps, of first order.

    Raises ValueError if the window does not fit into the bounds or the steps, if there is no such
    noise, if more steps are to be trained on than the window has, or if too few points are left.
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
    if trained > window:
        raise ValueError(
            f"config.sample.sde_window.trained_steps is {trained}; expected at most "
            f"sde_window_size {window}, or 0 for all steps of the window"
        )
    noise = NOISE_SCHEDULES[noise_schedule](sigmas, noise_level, noise_least)
    return Plan(
        ode=ode_steps(sigmas),
        noisy=STOCHASTIC_STEPS[kind](sigmas, noise),
        start=np.int32(low),  # numpy, so that making a plan does not initialise JAX
        trained=np.arange(trained, dtype=np.int32) if 0 < trained < window else None,
        after=_after(sigmas, range(low + window, high + 1), after) if after else None,
        window=window,
        bounds=bounds,
        branches=branches,
        moves=moves,
    )


def _after(sigmas: np.ndarray, ends: range, share: float) -> After:
    """The steps behind windows that end before each of these steps."""
    tables = []
    for end in ends:
        fewer = shortened(sigmas, end - 1, share)
        steps = dpm2_steps(fewer, first=end)
        tables.append(jax.tree.map(lambda leaf, end=end: leaf[end:], steps))

    counts = [len(table.sigma) for table in tables]

    def padded(*leaves: np.ndarray) -> np.ndarray:
        return np.stack([np.pad(leaf, (0, max(counts) - len(leaf))) for leaf in leaves])

    return After(jax.tree.map(padded, *tables), np.int32(counts))


def draw_latents(key: Array, slots: int, distinct: int, shape: tuple[int, int]) -> Array:
    """Draw initial latents, float32 [slots, s, c], of which `distinct` are different."""
    latents = jax.random.normal(key, (distinct, *shape))
    return jnp.repeat(latents, slots // distinct, axis=0)


def numbered_latents(key: Array, numbers: Array, shape: tuple[int, int]) -> Array:
    """Draw initial latents, float32 [n, s, c], that depend only on the key and a picture's number.

    numbers: int32 [n].
    """

    def draw(number: Array) -> Array:
        return jax.random.normal(jax.random.fold_in(key, number), shape)

    return jax.vmap(draw)(numbers)


def policy_step(velocity: Velocity, x: Array, step: Steps, cond: Any) -> tuple[Array, Array]:
    """Return (mean, v) of one step.

    Rollout and update both call this with the same batch size, so on unchanged weights the mean is
    bit-identical. The barriers keep the compiler from fusing it differently in the two programs.
    """
    v = velocity(x, jnp.broadcast_to(step.sigma, x.shape[:1]), cond)
    x, v = jax.lax.optimization_barrier((x, v))
    return jax.lax.optimization_barrier(step.mean(x, v)), v


def compiler_options(dtype: Any, mesh: Mesh, offload: bool = False) -> dict[str, str | bool]:
    """Return the `compiler_options` of jax.jit for every program that calls `policy_step`.

    On GPUs, XLA takes no kernel that adds in another order each time: otherwise cuDNN's attention
    may do so in its backward pass, and a resumed run would not repeat the last bits.

    XLA's library for CPUs, YNNPACK, computes a product together with its neighbours and then skips
    roundings to bfloat16 between them. Rollout and update have other neighbours, so their means
    would differ in the last bits of a bfloat16. With this option it computes each product alone. A
    jaxlib that may not know the option keeps its default.

    dtype: what the model computes in. offload: whether its weights are in host memory.
    """
    if for_gpu(mesh):
        return {"xla_gpu_exclude_nondeterministic_ops": True, **copy_options(mesh, offload)}

    series = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2]))
    if target(mesh).platform != "cpu" or jnp.dtype(dtype) != jnp.bfloat16 or series > LAST_JAXLIB:
        return {}
    return {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}


def copy_options(mesh: Mesh, offload: bool) -> dict[str, bool]:
    """Return the `compiler_options` of jax.jit for programs that copy weights from host memory.

    By default XLA for GPUs starts each copy where its result is needed, and waits for it.
    """
    copies = offload and for_gpu(mesh)
    return {"xla_gpu_enable_latency_hiding_scheduler": True} if copies else {}


def decoder_options(dtype: Any, mesh: Mesh) -> dict[str, str | bool | int]:
    """Return the `compiler_options` of jax.jit for programs that sample tokens (rewriter/generate).

    XLA for GPUs computes small products that have an input in common as one, and joins their
    weights for that: here all weights, for each token, which is three times the traffic.
    """
    joins = {"xla_gpu_dot_merger_threshold_mb": 0}
    return {**compiler_options(dtype, mesh), **(joins if for_gpu(mesh) else {})}


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


def sample_second_order(velocity: Velocity, cond: Any, latents: Array, steps: TwoSteps) -> Array:
    """The same with steps of second order, which also use the last step's clean estimate."""
    first = (latents, jnp.zeros_like(latents))
    return _second_order(velocity, first, cond, steps, steps.sigma.shape[0])


def _second_order(
    velocity: Velocity, first: tuple[Array, Array], cond: Any, steps: TwoSteps, count: Any
) -> Array:
    """Take `count` steps, which may be traced. first: the latents and the last clean estimate."""

    def body(i: Array, before: tuple[Array, Array]) -> tuple[Array, Array]:
        x, last = before
        step = jax.tree.map(lambda coefficients: jnp.asarray(coefficients)[i], steps)
        v = velocity(x, jnp.broadcast_to(step.sigma, x.shape[:1]), cond)
        return _second_order_step(x, v, last, step)

    x, _ = jax.lax.fori_loop(0, count, body, first)
    return x


def _first_order_step(x: Array, v: Array, last: Array, step: Steps) -> tuple[Array, Array]:
    """One Euler step, which does not use the last clean estimate."""
    return step.mean(x, v), last


def _second_order_step(x: Array, v: Array, last: Array, step: TwoSteps) -> tuple[Array, Array]:
    """One step of second order, and its clean estimate."""
    clean = x - step.sigma * v
    return step.after(x, clean, last), clean


def hybrid(tuned: Velocity, base: Velocity, sigmas: np.ndarray, steps: int) -> Velocity:
    """Return the velocity of hybrid inference: `tuned` in the first steps, then `base`.

    sigmas: the schedule, float32 [T + 1]. steps: number of tuned steps, 1 to T. Source: MixGRPO's
    sample_flux.py.
    """
    if steps == len(sigmas) - 1:
        return tuned
    # Between the noise levels of the last tuned step and of the next one.
    limit = (sigmas[steps - 1] + sigmas[steps]) / 2

    def velocity(x: Array, sigma: Array, cond: Any) -> Array:
        return jax.lax.cond(sigma[0] > limit, tuned, base, x, sigma, cond)

    return velocity


@dataclass(frozen=True)
class Solver:
    """A solver of the probability-flow ODE.

    steps: (sigmas float32 [T + 1]) -> coefficients. sample: (velocity, cond, latents, coefficients)
    -> final latents. advance: one step, (x, v, the last step's clean estimate, its coefficients) ->
    (x, clean estimate).
    """

    steps: Callable[[np.ndarray], Any]
    sample: Callable[..., Array]
    advance: Callable[..., tuple[Array, Array]]


# config.sample.solver
SOLVERS = {
    "euler": Solver(ode_steps, sample, _first_order_step),
    "dpm2": Solver(dpm2_steps, sample_second_order, _second_order_step),
}


def make_noiseless_plan(
    sigmas: np.ndarray, solver: str, levels: np.ndarray, cached_steps: int = 0
) -> NoiselessPlan:
    """Return the plan of a rollout without noise for a schedule, float32 [T + 1].

    cached_steps: of config.sample. Raises ValueError if no step is left to predict.
    """
    key = np.zeros(2, np.uint32)
    cache = make_cache(sigmas, cached_steps) if cached_steps else None
    return NoiselessPlan(SOLVERS[solver].steps(sigmas), np.float32(levels), key, solver, cache)


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

    def body(
        before: tuple[Array, Array | None], step_and_noise: tuple[Steps, Array]
    ) -> tuple[tuple[Array, Array | None], tuple[Array, ...]]:
        x, clean = before
        step, z = step_and_noise
        mean, v = policy_step(velocity, x, step, cond)
        x_next = mean + step.std * z
        if clean is not None:
            clean = x - step.sigma * v
        return (x_next, clean), (x_next, mean, log_prob(x_next, mean, step.std))

    steps = jax.tree.map(in_window, plan.noisy)
    with jax.named_scope("window"):
        clean = None if plan.after is None else jnp.zeros_like(x)
        (x, clean), (after, mean, logp) = jax.lax.scan(body, (x, clean), (steps, noise))
    latents = jnp.concatenate([first[None], after])
    trajectory = Trajectory(latents, mean, logp, steps, plan.trained)

    with jax.named_scope("suffix"):
        if plan.after is None:
            stop = plan.ode.sigma.shape[0]
            x = _integrate(velocity, x, cond, plan.ode, plan.start + plan.window, stop)
        else:
            row = plan.start - plan.bounds[0]
            own = jax.tree.map(lambda leaf: jnp.asarray(leaf)[row], plan.after)
            x = _second_order(velocity, (x, clean), cond, own.steps, own.count)
    return x, trajectory
