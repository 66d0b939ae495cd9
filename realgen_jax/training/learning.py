"""Rewards that learn, within a run: made from the config, told when to learn, kept in its checkpoints."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from ml_collections import ConfigDict

from realgen_jax.checkpoint import RestoreError
from realgen_jax.hosts import broadcast_text, coordinator_host, process_count, process_index
from realgen_jax.training.log import RunLog
from reward_bridge.adversary import Adversary, Settings, join
from reward_bridge.bridge import PendingScores
from reward_bridge.learners import make_learner
from reward_bridge.references import References

if TYPE_CHECKING:
    from realgen_jax.training.run import Run

ADVERSARIES = (
    3  # a stream of the run's root key, beside evaluation.EVAL, train.TRAIN and set_up.INIT
)


def make_adversaries(
    config: ConfigDict, devices: Mapping[str, str], prompts: Sequence[str]
) -> dict[str, Adversary]:
    """The rewards that `config.reward.adversarial` names. Several processes meet, to average gradients."""
    reward, made = config.reward, {}
    if not reward.adversarial:
        return made
    settings = {
        name: Settings.read(name, given) for name, given in reward.adversarial.to_dict().items()
    }
    references = References(reward.references.path, reward.references.root, prompts)
    groups = {}
    if process_count() > 1:
        groups = join(
            broadcast_text, coordinator_host(), process_index(), process_count(), list(settings)
        )
    for name, one in settings.items():
        options = reward.options.to_dict().get(name, {}) | dict(one.options)
        learner = make_learner(name, devices[name], options)
        made[name] = Adversary(name, learner, one, references, devices[name], groups.get(name))
    return made


def draw_seeds(run: "Run", epoch: int, count: int) -> list[int]:
    """`count` whole numbers below 2^32 for an epoch, this process's own: of reference pictures, then of updates."""
    key = jax.random.fold_in(jax.random.fold_in(run.key(ADVERSARIES), epoch), process_index())
    return np.asarray(jax.random.bits(key, (count,))).tolist()


def begin_learning(
    run: "Run", epoch: int, means: Mapping[str, float], seeds: Sequence[int]
) -> tuple[PendingScores, bool]:
    """Have those learn whose schedule says so, from the epoch's mean scores "NAME" and "NAME/references".

    Returns what they are about to find, and whether the generator rests meanwhile.
    """
    chosen = {}
    for (name, one), seed in zip(run.adversaries.items(), seeds, strict=True):
        if one.due(epoch, means[name], means[f"{name}/references"]):
            chosen[name] = seed
        else:
            one.forget()
    pending = run.bridge.learn(
        chosen, {name: run.adversaries[name].settings.deadline for name in chosen}
    )
    return pending, any(run.adversaries[name].settings.skip_generator for name in chosen)


def files(run: "Run") -> dict[str, bytes]:
    """What a checkpoint keeps of the rewards that learn: a file for each and for every process."""
    return {_file(name, process_index()): one.state() for name, one in run.adversaries.items()}


def restore(run: "Run", epoch: int, log: RunLog) -> None:
    """Be as when the checkpoint was taken. A process that there was not then begins with an empty history.

    Raises RestoreError where the checkpoint does not hold what this run's rewards have learnt.
    """
    for name, one in run.adversaries.items():
        own = run.checkpoints.read(epoch, _file(name, process_index()))
        first = own if own is not None else run.checkpoints.read(epoch, _file(name, 0))
        if first is None:
            raise RestoreError(
                f"checkpoint {epoch} holds no state of the reward {name!r}: it did not learn in that run"
            )
        try:
            one.restore(first, with_history=own is not None)
        except ValueError as error:
            raise RestoreError(f"checkpoint {epoch}: {error}") from error
        if own is None:
            log.say(
                f"[bold red]warning[/bold red] {name} had fewer replicas before: a new one starts without history"
            )


def _file(name: str, process: int) -> str:
    return f"rewards/{name}-{process}.safetensors"
