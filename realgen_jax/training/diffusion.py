"""The stage that trains the image model: rollouts, and updates that replay them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from realgen_jax.hosts import put
from realgen_jax.profiling.step_traces import phase
from realgen_jax.sharding import batch_sharding
from realgen_jax.training.log import NoLog, RunLog
from realgen_jax.training.preemption import Preemption
from realgen_jax.training.programs import Programs, make_programs
from realgen_jax.training.run import TRAINING, Run
from realgen_jax.training.scoring import BatchScores, submit
from realgen_jax.training.scouting import Scouted, scout_columns, scout_epoch
from realgen_jax.training.stage import (
    Call,
    Drawn,
    Sampled,
    epoch_rewards,
    optimizer_steps,
    wait_for,
)
from realgen_jax.update import Batch, TrainState


@dataclass(frozen=True)
class Rollout(Call):
    """One rollout call of an epoch.

    record: the objective's record. cond: leaves [slots, ...]. inputs: the other inputs of
    `programs.sample`, (keys, plan, numbers).
    """

    record: Any
    cond: Any
    inputs: tuple


@dataclass(frozen=True)
class DiffusionStage:
    """config.stage diffusion, a Stage (stage.py)."""

    run: Run
    programs: Programs

    output = "lora"

    @property
    def prompts(self) -> int:
        return self.run.recipe.layout.groups

    @property
    def evaluate(self) -> Any:
        return self.programs.evaluate

    def sample(
        self,
        state: TrainState,
        epoch: int,
        rows: np.ndarray,
        seeds: Sequence[int],
        preemption: Preemption,
        seconds: dict[str, float],
    ) -> Sampled | None:
        run = self.run

        # Scout: cheap previews; those worth it are sampled in full.
        scouted = None
        if run.recipe.layout.previews:
            with phase("scout", seconds):
                scouted = scout_epoch(run, self.programs, state, epoch, rows, preemption)
            if scouted is None:
                return None

        with phase("sample", seconds):
            calls = sample_epoch(run, self.programs, state, epoch, rows, seeds, scouted)
            interrupted = wait_for(calls, preemption)
        return None if interrupted else Sampled(calls, scouted)

    def groups(self, sampled: Sampled, scores: BatchScores) -> dict[str, np.ndarray]:
        return scores.grouped(scores.rewards, self.run.recipe.layout.group)

    def columns(
        self,
        state: TrainState,
        epoch: int,
        sampled: Sampled,
        reward: np.ndarray,
        log: RunLog | NoLog,
        history: dict[str, Any],
        first: bool,
    ) -> dict[str, float]:
        columns = {}
        if sampled.own is not None:
            columns |= scout_columns(sampled.own, reward, self.run.recipe.layout.previews)

        # Once, what the cached steps cost in exactness.
        cached_steps = self.run.config.sample.cached_steps
        if first and cached_steps:
            error = cache_error(self.run, self.programs, state, epoch, sampled.calls[0])
            columns |= error
            log.say(
                f"with config.sample.cached_steps={cached_steps}, final latents differ by "
                f"{error['cache_error']:.2%} (RMS) from those of all steps"
            )
        return columns

    def update(
        self,
        state: TrainState,
        sampled: Sampled,
        advantages: np.ndarray,
        kl_weights: np.ndarray | None,
        epoch: int,
    ) -> tuple[TrainState, list[dict[str, np.ndarray]]]:
        return update_epoch(
            self.run, self.programs, state, sampled.calls, advantages, kl_weights, epoch
        )

    def draw(self, trainable: Any, prompts: Sequence[str]) -> Drawn:
        return Drawn(prompts, self.run.cache, trainable)

    def after_evaluation(self, epoch: int, trainable: Any, evaluation: Any) -> dict[str, float]:
        return {}

    def export(self, folder: Path, trainable: Any) -> None:
        model = self.run.model
        model.trainable.save(model, folder, trainable)


def make_diffusion(run: Run) -> DiffusionStage:
    """Return the stage of a run. Nothing is compiled yet."""
    return DiffusionStage(run, make_programs(run.recipe, run.model))


def sample_epoch(
    run: Run,
    programs: Programs,
    state: TrainState,
    epoch: int,
    rows: np.ndarray,
    seeds: Sequence[int],
    scouted: Scouted | None,
) -> list[Rollout]:
    """Sample every call of an epoch; each call's pictures are scored while the next call runs.

    rows: int [groups], the epoch's prompts. seeds: one per call, to draw the reference pictures
    that are scored alongside the call's pictures. scouted: the previews to sample in full, if any.
    """
    layout = run.recipe.layout
    policy = run.recipe.objective.rollout_policy(state)
    model, epoch_plan = run.rollout_of(epoch)
    epoch_key = jax.random.fold_in(run.key(TRAINING), epoch)
    calls = []
    for number in range(layout.calls):
        # One prompt per slot.
        groups = layout.groups_of_slots(number)
        own_rows = rows[groups]
        prompts = [run.prompts[row] for row in own_rows]
        cond = run.cond(prompts, run.config.sample.guidance_scale)

        # With same_latent, a group has one initial latent, even if it continues in the next call.
        call_key = jax.random.fold_in(epoch_key, number)
        start_key, noise_key, latent_key = jax.random.split(call_key, 3)
        if run.config.sample.same_latent:
            latent_key = jax.random.fold_in(epoch_key, layout.calls + int(groups[0]))

        # A preview that is sampled in full keeps its noise.
        numbers = None
        if scouted is not None:
            latent_key = scouted.key
            numbers = put(scouted.numbers[number], batch_sharding(model.mesh))

        inputs = ((latent_key, noise_key), epoch_plan.draw(start_key, epoch), numbers)
        pictures, record, finite = programs.sample(model, policy, cond, *inputs)

        # Every image has its slot's prompt.
        scored = [run.scored_prompts[row] for row in own_rows]
        image_prompts = [prompt for prompt in scored for _ in range(layout.branches)]
        names = epoch_rewards(run.config.reward)
        scores = submit(run.scorer, pictures, image_prompts, names, seeds[number], layout.group)
        calls.append(Rollout(scores, finite, record, cond, inputs))
    return calls


@jax.jit
def _relative_rms(x: Array, exact: Array) -> Array:
    return jnp.sqrt(jnp.mean((x - exact) ** 2) / jnp.mean(exact**2))


def cache_error(
    run: Run, programs: Programs, state: TrainState, epoch: int, call: Rollout
) -> dict[str, float]:
    """Return {"cache_error": RMS(x0 - x0 of all steps) / RMS(x0 of all steps)} of one call.

    x0: the final latents. The call is sampled again, with all of its velocities computed.
    """
    model, _ = run.rollout_of(epoch)
    policy = run.recipe.objective.rollout_policy(state)
    keys, plan, numbers = call.inputs
    exact_plan = replace(plan, cache=None)
    _, exact, _ = programs.sample(model, policy, call.cond, keys, exact_plan, numbers)
    return {"cache_error": float(_relative_rms(call.record.x0, exact.x0))}


@jax.jit
def _stack(*trees: Any) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def update_epoch(
    run: Run,
    programs: Programs,
    state: TrainState,
    calls: Sequence[Rollout],
    advantages: np.ndarray,
    kl_weights: np.ndarray | None,
    epoch: int,
) -> tuple[TrainState, list[dict[str, np.ndarray]]]:
    """Take the epoch's optimizer steps; return the new state and the metrics of each step.

    advantages: float32 [groups, group]. kl_weights: of the KL, the same shape, or None. Raises
    FloatingPointError if a metric is not finite.
    """
    train = run.config.train
    model, _ = run.rollout_of(epoch)
    pictures = jax.tree.map(
        lambda leaf: put(leaf.reshape(len(calls), -1), batch_sharding(model.mesh, axis=1)),
        (advantages, kl_weights),
    )

    # The calls of one optimizer step, stacked.
    batches = []
    for first in range(0, len(calls), train.gradient_accumulation_steps):
        parts = []
        for number in range(first, first + train.gradient_accumulation_steps):
            call = calls[number]
            own = jax.tree.map(lambda leaf, number=number: leaf[number], pictures)
            parts.append(Batch(call.record, call.cond, *own))
        batches.append(_stack(*parts))

    # For hardware that uses different kernels in rollout and update.
    if train.recompute_old:
        batches = [programs.recompute(model, state.trainable, batch) for batch in batches]

    return optimizer_steps(run, programs.update, model, state, batches, epoch)
