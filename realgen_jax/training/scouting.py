"""Scout and select: score cheap previews of an epoch's prompts, and sample the best ones in full.

A preview and the full picture of the same number start from the same noise. Source: Sol-RL
(NVlabs/Sana, `train_scripts/sol_rl`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np
from jax import Array
from scipy.stats import rankdata

from realgen_jax.advantages import advantages_of, rewards_read, trained_weights
from realgen_jax.hosts import process_count, put
from realgen_jax.selection import SELECTIONS
from realgen_jax.sharding import batch_sharding
from realgen_jax.training.preemption import Preemption
from realgen_jax.training.programs import Programs
from realgen_jax.training.run import TRAINING, Run
from realgen_jax.training.scoring import scores_of_all, submit, weighted_mean
from realgen_jax.update import TrainState


@dataclass(frozen=True)
class Scouted:
    """The previews that are sampled in full.

    key, numbers: of their noise; int32 [calls, images]. rewards: weighted mean of the rewards of
    these previews, float [groups, group]. mean: that of all previews.
    """

    key: Array
    numbers: np.ndarray
    rewards: np.ndarray
    mean: float


def scout_epoch(
    run: Run,
    programs: Programs,
    state: TrainState,
    epoch: int,
    rows: np.ndarray,
    preemption: Preemption,
) -> Scouted | None:
    """Sample and score an epoch's previews, and select the pictures to sample in full.

    rows: int [groups], the epoch's prompts. The previews are compared by the advantages that they
    would have. Every process makes the same choice. Returns None if a signal arrived in the
    meantime. Raises the errors of the rewards.
    """
    layout = run.recipe.layout
    config = run.config
    model, _ = run.rollout_of(epoch)
    policy = run.recipe.objective.rollout_policy(state)
    epoch_key = jax.random.fold_in(run.key(TRAINING), epoch)
    key = jax.random.fold_in(epoch_key, layout.calls)  # smaller numbers are those of rollout calls

    # Sample the previews in calls of the rollouts' size; each is scored while the next one runs.
    previews = np.arange(layout.groups * layout.previews, dtype=np.int32)
    names = rewards_read(config)
    batches = []
    for numbers in previews.reshape(-1, layout.images):
        own_rows = rows[numbers // layout.previews]
        prompts = [run.prompts[row] for row in own_rows]
        cond = run.cond(prompts, config.sample.guidance_scale)
        ids = put(numbers, batch_sharding(model.mesh))
        pictures = programs.preview(model, policy, cond, key, ids)
        asked = [run.scored_prompts[row] for row in own_rows]
        batches.append(submit(run.scorer, pictures, asked, names, group=layout.previews))

    # With several processes, signals are noticed at a point where all of them agree.
    if process_count() == 1:
        for batch in batches:
            batch.pending.result()
            if preemption.wanted():
                return None

    # Select within each prompt.
    scores = scores_of_all(batches, layout.images)
    groups = scores.grouped(scores.rewards, layout.previews)
    advantages = advantages_of(config, groups)
    kept = SELECTIONS[config.sample.scout.select](advantages, layout.group)

    rewards = weighted_mean(groups, trained_weights(config))
    first = np.arange(layout.groups)[:, None] * layout.previews
    return Scouted(
        key=key,
        numbers=np.int32(first + kept).reshape(layout.calls, layout.images),
        rewards=np.take_along_axis(rewards, kept, axis=1),
        mean=float(rewards.mean()),
    )


def scout_columns(scouted: Scouted, rewards: np.ndarray, previews: int) -> Mapping[str, float]:
    """Return the columns about an epoch's previews.

    rewards: of the full pictures, [groups, group]. previews: of a prompt. The rank correlation of
    both rewards, averaged over prompts, is left out if either never differs within a prompt.
    """
    columns = {
        "scout/kept_share": rewards.shape[1] / previews,
        "scout/reward": scouted.mean,
    }
    correlations = []
    for before, after in zip(scouted.rewards, rewards, strict=True):
        if np.ptp(before) > 0 and np.ptp(after) > 0:
            correlations.append(np.corrcoef(rankdata(before), rankdata(after))[0, 1])
    if correlations:
        columns["scout/rank_correlation"] = float(np.mean(correlations))
    return columns
