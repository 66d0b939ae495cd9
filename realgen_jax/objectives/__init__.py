"""Objectives: how a rollout is recorded, the gradient of a batch, and the end of an epoch.

An objective is one file here and one entry in OBJECTIVES; realgen_jax/update.py has the interface.
"""

from functools import partial
from typing import Any

from realgen_jax.objectives.awm import make_awm
from realgen_jax.objectives.contradictions import check_keys
from realgen_jax.objectives.dppo import make_dppo
from realgen_jax.objectives.grpo import grpo_loss, guard_loss, make_grpo
from realgen_jax.objectives.nft import make_nft
from realgen_jax.update import Objective

# config.train.loss -> a function (config.train, config.sample) -> Objective
OBJECTIVES = {
    "grpo": partial(make_grpo, grpo_loss),
    "guard": partial(make_grpo, guard_loss),
    "dppo": make_dppo,
    "nft": make_nft,
    "awm": make_awm,
}


def make_objective(train: Any, sample: Any) -> Objective:
    """Return the objective named by `config.train.loss`.

    Raises ValueError for an unknown name, and for keys that contradict it.
    """
    if train.loss not in OBJECTIVES:
        raise ValueError(f"loss is {train.loss!r}; choose one of {', '.join(OBJECTIVES)}")
    objective = OBJECTIVES[train.loss](train, sample)
    check_keys(objective.coupled, train, sample)
    return objective
