"""What the decoupled objectives share: rollouts without noise, then fresh noise for the gradient.

They keep only the clean latents x0 of a rollout. The gradient noises them again to some levels
sigma of the rollout's schedule, x = (1 - sigma) x0 + sigma eps, so any solver may have made them.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from realgen_jax.objectives.reference import Reference
from realgen_jax.objectives.velocities import rows
from realgen_jax.rollout import NoiselessPlan, Velocity, make_noiseless_plan
from realgen_jax.update import Batch, Metrics, TrainState, UpdateWork, reduce_metrics


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampled:
    """The record of a rollout.

    x0: float32 [n, s, c], the final latents. levels: float32 [c], the candidates for the noise
    levels of the gradient. key: uint32 [2], the root of its random numbers.
    """

    x0: Array
    levels: Array
    key: Array


# -- Noise levels


@dataclass(frozen=True)
class Levels:
    """Which noise levels of a rollout's schedule are trained on.

    section: of config.train, whose keys these are. count: number of levels for each picture. draw:
    a key of DRAWS. Candidates are the steps from `first_step` to the share `fraction` of all steps,
    and, with a `least_sigma` above 0, before the last step whose sigma reaches it.
    """

    section: str
    count: int
    draw: str
    first_step: int
    fraction: float
    least_sigma: float

    def candidates(self, sigmas: np.ndarray) -> np.ndarray:
        """Return the levels to draw from, of a schedule, float32 [T + 1].

        Raises ValueError if there are fewer than `count`.
        """
        steps = len(sigmas) - 1
        end = int(self.fraction * steps)
        if self.least_sigma > 0:
            end = min(end, int(np.sum(sigmas[:-1] >= self.least_sigma)) - 1)
        candidates = sigmas[self.first_step : max(end, self.first_step)]
        if len(candidates) < self.count:
            raise ValueError(
                f"config.train.{self.section}.sigmas is {self.count}, which is more than the "
                f"{len(candidates)} of {steps} steps that first_step {self.first_step}, fraction "
                f"{self.fraction:g} and least_sigma {self.least_sigma:g} leave to draw them from"
            )
        return candidates


def draw_permuted(key: Array, count: int, candidates: int, images: int) -> Array:
    """The first k of a permutation of the candidates, another one for each picture."""
    keys = jax.random.split(key, images)
    order = jax.vmap(lambda key: jax.random.permutation(key, candidates))(keys)
    return order[:, :count].T


def draw_strata(key: Array, count: int, candidates: int, images: int) -> Array:
    """One of each of k parts of the candidates, the same for all pictures."""
    index = strata(jax.random.uniform(key, (count,)), candidates)
    return jnp.repeat(index[:, None], images, axis=1)


def strata(u: Array, candidates: int) -> Array:
    """Return an index in each of k parts of [0, candidates), int32 [..., k], from uniforms u."""
    ends = np.linspace(0, candidates, u.shape[-1] + 1).astype(np.int32)
    return ends[:-1] + jnp.floor(u * np.diff(ends)).astype(jnp.int32)


# draw -> (key, k, number of candidates, n) -> indices of candidates, int32 [k, n]
DRAWS = {"permuted": draw_permuted, "strata": draw_strata}


def make_levels(section: str, block: Any) -> Levels:
    """Build the levels of a section of config.train."""
    return Levels(
        section=section,
        count=block.sigmas,
        draw=block.draw,
        first_step=block.first_step,
        fraction=block.fraction,
        least_sigma=block.least_sigma,
    )


# -- Old policies


@dataclass(frozen=True)
class OldDecay:
    """After an epoch old <- d old + (1 - d) trained, d = min(rate (n - delay), most), or 0.

    n: optimizer steps so far. Until n exceeds `delay`, d is 0 and the old policy is the trained
    one. DiffusionNFT's type 0: rate 0; type 1: 0.001, most 0.5; type 2: delay 75, 0.0075, 0.999.
    """

    delay: int
    rate: float
    most: float

    def __call__(self, n: Array) -> Array:
        """The decay after n optimizer steps."""
        return jnp.clip(self.rate * (n - self.delay), 0.0, self.most)


def make_old_decay(block: Any) -> OldDecay:
    """Build the decay of a section of config.train."""
    return OldDecay(block.old_delay, block.old_rate, block.old_most)


@partial(jax.jit, static_argnums=0)
def _move(decay: OldDecay, old: Any, trained: Any, steps: Array) -> Any:
    """The old policy after an epoch."""
    d = decay(steps)
    return jax.tree.map(lambda before, now: d * before + (1.0 - d) * now, old, trained)


# -- The objective


@dataclass(frozen=True)
class Sample:
    """One call's pictures at one noise level, and what the frozen networks say about them.

    x, x0, noise: [n, s, c]; sigma, advantages: [n]. v_old: the old policy's velocity. v_ref: the
    base model's. Either is None if the objective does not use it.
    """

    x: Array
    x0: Array
    noise: Array
    sigma: Array
    advantages: Array
    kl_weights: Array | None
    v_old: Array | None
    v_ref: Array | None


@dataclass(frozen=True)
class Decoupled:
    """The base of the decoupled objectives; they add `loss`.

    config: what the loss takes. reference: what holds the policy to the base model. solver,
    cached_steps: of config.sample.
    """

    config: Any
    reference: Reference
    levels: Levels
    old_decay: OldDecay
    solver: str
    cached_steps: int

    coupled = False
    largest_metrics = ()

    @property
    def keeps_old(self) -> bool:
        """Whether the loss or the rollout uses an old policy, which is then in the state."""
        raise NotImplementedError

    @property
    def work(self) -> UpdateWork:
        frozen = int(self.keeps_old) + int(self.reference.used)
        return UpdateWork(recorded=0, trained=self.levels.count, frozen=frozen)

    def loss(self, v: Array, sample: Sample) -> tuple[Array, Metrics]:
        """Loss and metrics of the policy's velocity v, [n, s, c]."""
        raise NotImplementedError

    def make_plan(self, sigmas: np.ndarray) -> NoiselessPlan:
        levels = self.levels.candidates(sigmas)
        return make_noiseless_plan(sigmas, self.solver, levels, self.cached_steps)

    def draw_noise(self, key: Array, plan: Any, images: int, token_shape: tuple[int, int]) -> Any:
        return ()

    def rollout_policy(self, state: TrainState) -> Any:
        return state.trainable

    def collect(
        self,
        velocity: Velocity,
        trainable: Any,
        cond: Any,
        latents: Array,
        noise: Any,
        plan: NoiselessPlan,
    ) -> tuple[Array, Sampled]:
        x0 = plan.sample(partial(velocity, trainable), cond, latents)
        return x0, Sampled(x0, plan.levels, plan.key)

    def after_epoch(self, state: TrainState) -> TrainState:
        if not self.keeps_old:
            return state
        return replace(state, old=_move(self.old_decay, state.old, state.trainable, state.step))

    def gradient(self, velocity: Velocity, state: TrainState, batch: Batch) -> tuple[Any, Metrics]:
        """Mean gradient over all calls and noise levels. One microbatch is one call at one level.

        A second pass over the same pictures draws other levels and other noise, because the
        number of optimizer steps is part of the key.
        """

        def level(grads: Any, drawn: tuple[Array, Array], one_call: Batch) -> tuple[Any, Metrics]:
            sigma, key = drawn
            sample = self._noised(velocity, state, one_call, sigma, key)

            def loss(trainable: Any) -> tuple[Array, Metrics]:
                with jax.named_scope("policy"):
                    v = velocity(trainable, sample.x, sigma, one_call.cond)
                return self.loss(v, sample)

            grad, metrics = jax.grad(loss, has_aux=True)(state.trainable)
            return jax.tree.map(jnp.add, grads, grad), metrics

        def call(grads: Any, one_call: Batch) -> tuple[Any, Metrics]:
            sigma, keys = self._draw(one_call.record, state.step)
            return jax.lax.scan(partial(level, one_call=one_call), grads, (sigma, keys))

        # Sum over calls and levels in float32.
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), state.trainable)
        grads, metrics = jax.lax.scan(call, zeros, batch)

        count = batch.advantages.shape[0] * self.levels.count
        grads = jax.tree.map(lambda leaf: leaf / count, grads)
        return grads, reduce_metrics(metrics, self.largest_metrics)

    def _draw(self, record: Sampled, step: Array) -> tuple[Array, Array]:
        """Draw a call's noise levels, float32 [k, n], and the keys of their noise, [k]."""
        key = jax.random.fold_in(jax.random.wrap_key_data(record.key), step)
        level_key, noise_key = jax.random.split(key)

        count = self.levels.count
        draw = DRAWS[self.levels.draw]
        index = draw(level_key, count, len(record.levels), len(record.x0))
        return record.levels[index], jax.random.split(noise_key, count)

    def _noised(
        self, velocity: Velocity, state: TrainState, one_call: Batch, sigma: Array, key: Array
    ) -> Sample:
        """Noise a call's pictures to sigma, float32 [n], and run the frozen networks on them."""
        x0 = one_call.record.x0
        noise = jax.random.normal(key, x0.shape)
        level = rows(sigma, x0)
        x = (1.0 - level) * x0 + level * noise

        v_old = None
        if self.keeps_old:
            with jax.named_scope("old_policy"):
                v_old = velocity(state.old, x, sigma, one_call.cond)
        v_ref = None
        if self.reference.used:
            with jax.named_scope("reference"):
                v_ref = velocity(None, x, sigma, one_call.cond)
        weights = (one_call.advantages, one_call.kl_weights)
        return Sample(x, x0, noise, sigma, *weights, v_old, v_ref)
