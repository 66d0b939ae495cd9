"""The two halves of an epoch that run on the devices: sampling and updates."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from realgen_jax.hosts import process_count, put
from realgen_jax.sharding import batch_sharding
from realgen_jax.training.log import NoLog, RunLog
from realgen_jax.training.monitor import ratio_limit
from realgen_jax.training.preemption import Preemption
from realgen_jax.training.programs import Programs
from realgen_jax.training.run import TRAINING, Run
from realgen_jax.training.saving import stop_if_not_finite
from realgen_jax.training.scoring import PendingBatch, submit
from realgen_jax.training.scouting import Scouted
from realgen_jax.update import Batch, TrainState


@dataclass(frozen=True)
class Call:
    """One rollout call of an epoch.

    record: the objective's record. cond: leaves [slots, ...]. inputs: the other inputs of
    `programs.sample`, (keys, plan, numbers). scores: the pending scores. finite: bool [], whether
    all latents are finite.
    """

    record: Any
    cond: Any
    inputs: tuple
    scores: PendingBatch
    finite: Array


def sample_epoch(
    run: Run,
    programs: Programs,
    state: TrainState,
    epoch: int,
    rows: np.ndarray,
    seeds: Sequence[int],
    scouted: Scouted | None,
) -> list[Call]:
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
        prompts = [run.prompts[rows[group]] for group in groups]
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
        image_prompts = [prompt for prompt in prompts for _ in range(layout.branches)]
        reward = run.config.reward
        names = list(dict.fromkeys([*reward.fn, *reward.watched]))
        scores = submit(run.scorer, pictures, image_prompts, names, seeds[number], layout.group)
        calls.append(Call(record, cond, inputs, scores, finite))
    return calls


def wait_for(calls: Sequence[Call], preemption: Preemption) -> bool:
    """Wait until all calls are sampled. Returns whether a signal arrived in the meantime.

    A failed reward raises its error as soon as it fails. With several processes, both are decided
    later, at a point where all of them agree.
    """
    for call in calls:
        call.finite.block_until_ready()
        if process_count() == 1:
            call.scores.pending.raise_if_failed()
            if preemption.wanted():
                return True
    return False


def latents_of(calls: Sequence[Call]) -> dict[str, float]:
    """Return {"latents": 0}, with NaN instead of 0 if any call's final latents are not finite."""
    finite = all(call.finite for call in calls)
    return {"latents": 0.0 if finite else float("nan")}


@jax.jit
def _relative_rms(x: Array, exact: Array) -> Array:
    return jnp.sqrt(jnp.mean((x - exact) ** 2) / jnp.mean(exact**2))


def cache_error(
    run: Run, programs: Programs, state: TrainState, epoch: int, call: Call
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
    calls: Sequence[Call],
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

    metrics = []
    for _ in range(train.num_inner_epochs):
        for batch in batches:
            state, step_metrics = programs.update(model, state, batch)
            metrics.append(step_metrics)
    metrics = jax.device_get(metrics)
    for step_metrics in metrics:
        stop_if_not_finite(step_metrics, epoch, "update", run)
    return run.recipe.objective.after_epoch(state), metrics


def warn_of_deviation(log: RunLog | NoLog, steps: Sequence[dict[str, Any]], train: Any) -> None:
    """Warn if replay on unchanged weights is inexact because the hardware picks other kernels.

    steps: the metrics of the first optimizer steps. train: config.train.
    """
    if not steps or "ratio_deviation" not in steps[0]:
        return
    deviation = float(steps[0]["ratio_deviation"])
    limit, key = ratio_limit(train)
    if deviation > limit:
        log.warn(
            f"on unchanged weights a ratio is {deviation:.1e} away from 1, but config.train.{key} "
            f"allows for {limit:.1e}: set --config.train.recompute_old=True"
        )
