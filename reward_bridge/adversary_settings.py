"""How a reward learns: the settings in config.reward.adversarial, and when it is due to learn."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


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
        """Settings from the config's values. Raises ValueError for missing and unknown keys.

        The values are in the ranges of realgen_jax/config_ranges.py, which programs check first.
        """
        known = {field.name for field in fields(cls)}
        problems = [f"missing key {key}" for key in sorted(known - values.keys())]
        problems += [f"unknown key {key}" for key in sorted(values.keys() - known)]
        if problems:
            raise ValueError(
                f"config.reward.adversarial.{name}: {', '.join(problems)}; adversary() in "
                "realgen_jax/config.py has all keys"
            )
        return cls(**{**values, "betas": tuple(values["betas"])})

    def always_rests(self) -> bool:
        """Whether the generator rests in all epochs, because this learns in all of them."""
        in_all = self.schedule == "every" and self.learn_epochs >= self.cycle
        return self.skip_generator and in_all


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
