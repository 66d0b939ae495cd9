"""How a reward learns: the settings in config.reward.adversarial, and when it is due to learn."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
CODECS = ("none", "jpeg")


@dataclass(frozen=True)
class Settings:
    """config.reward.adversarial.NAME; `adversary()` in realgen_jax/config.py explains each key.

    Sizes count pairs of a real and a generated picture, on one replica.
    """

    options: Mapping[str, Any]
    schedule: str
    threshold: float
    margin: float
    learn_epochs: int
    cycle: int
    patience: int
    min_rise: float
    always_first: bool
    skip_generator: bool
    optimizer: str
    learning_rate: float
    betas: tuple[float, float]
    weight_decay: float
    batch_size: int
    history_batch_size: int
    history_size: int
    max_passes: int
    target_accuracy: float
    ema_decay: float
    codec: str
    quality: int
    deadline: float  # seconds

    @classmethod
    def read(cls, name: str, values: Mapping[str, Any]) -> "Settings":
        """Settings from the config's values.

        Raises ValueError naming keys that are missing, unknown or out of range.
        """
        prefix = f"config.reward.adversarial.{name}"
        _check_keys(prefix, values, {field.name for field in fields(cls)})
        settings = cls(**{**values, "betas": tuple(values["betas"])})
        _check_choice(prefix, "schedule", settings.schedule, SCHEDULES)
        _check_choice(prefix, "optimizer", settings.optimizer, OPTIMIZERS)
        _check_choice(prefix, "codec", settings.codec, CODECS)
        _check_least(prefix, "max_passes", settings.max_passes, 1)
        _check_least(prefix, "cycle", settings.cycle, 1)
        _check_least(prefix, "patience", settings.patience, 1)
        _check_least(prefix, "batch_size", settings.batch_size, 0)
        _check_least(prefix, "history_size", settings.history_size, 0)
        if not 0 <= settings.ema_decay < 1:
            raise ValueError(
                f"{prefix}.ema_decay is {settings.ema_decay}; expected at least 0 (no averaging) "
                "and less than 1"
            )
        return settings


# A schedule decides whether to learn in this epoch (counted from 0), given the epoch's mean rewards
# of generated and of reference pictures. It may keep rewards in `memory` between epochs. That is
# cleared when the reward learns, since earlier rewards are then no longer comparable.
Memory = dict[str, list[float]]


def _threshold(
    settings: Settings, epoch: int, generated: float, references: float, memory: Memory
) -> bool:
    return generated > settings.threshold


def _margin(
    settings: Settings, epoch: int, generated: float, references: float, memory: Memory
) -> bool:
    return references - generated < settings.margin


def _every(
    settings: Settings, epoch: int, generated: float, references: float, memory: Memory
) -> bool:
    return epoch % settings.cycle < settings.learn_epochs


def _plateau(
    settings: Settings, epoch: int, generated: float, references: float, memory: Memory
) -> bool:
    """Due if the reward has risen by less than `min_rise` over the last `patience` epochs."""
    rewards = [*memory.get("rewards", []), generated][-settings.patience - 1 :]
    memory["rewards"] = rewards
    return len(rewards) > settings.patience and rewards[-1] - rewards[0] < settings.min_rise


SCHEDULES: dict[str, Callable[[Settings, int, float, float, Memory], bool]] = {
    "threshold": _threshold,
    "margin": _margin,
    "every": _every,
    "plateau": _plateau,
}


def _check_keys(prefix: str, values: Mapping[str, Any], known: set[str]) -> None:
    problems = [f"missing key {key}" for key in sorted(known - values.keys())]
    problems += [f"unknown key {key}" for key in sorted(values.keys() - known)]
    if problems:
        raise ValueError(
            f"{prefix}: {', '.join(problems)}; adversary() in realgen_jax/config.py has all keys"
        )


def _check_choice(prefix: str, key: str, value: str, choices: Mapping | tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{prefix}.{key} is {value!r}; choose from {', '.join(choices)}")


def _check_least(prefix: str, key: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{prefix}.{key} is {value}; expected {least} or more")
