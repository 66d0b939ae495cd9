"""The interface of a reward, its result and its error."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch


class Reward(Protocol):
    """Any callable with this signature. Higher scores are better."""

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Score uint8 images [n, 3, h, w] and their n prompts: float32 [n]."""


@runtime_checkable
class GroupReward(Protocol):
    """A reward that compares the pictures of a prompt with each other."""

    def score_groups(self, images: torch.Tensor, prompts: Sequence[str], size: int) -> torch.Tensor:
        """Score uint8 images [groups * size, 3, h, w] of whole groups: float32 [groups * size].

        A group is `size` consecutive pictures with the same prompt. `prompts` has one per picture.
        """


@runtime_checkable
class TrainableReward(Reward, Protocol):
    """A reward that learns from what it scores (reward_bridge/adversary.py)."""

    def draw(self, prompts: Sequence[str], seed: int, height: int, width: int) -> torch.Tensor:
        """Draw one reference picture per prompt, for generated pictures of this size.

        Returns uint8 [n, 3, s, s], where s is the size at which the reward stores pictures.
        """

    def observe(self, real: torch.Tensor, generated: torch.Tensor, prompts: Sequence[str]) -> None:
        """Keep n pairs, uint8 [n, 3, h, w] each, until the next update."""

    def update(self, seed: int) -> dict[str, float]:
        """Learn from the pairs observed since the last update. Returns metrics by name."""


class RewardError(RuntimeError):
    """A reward failed permanently. The step that needs its scores must not be trained on."""

    image: int | None = None  # index in the batch, if a single image caused the error


@dataclass(frozen=True)
class Scores:
    """The scores of one batch of n images."""

    rewards: dict[str, np.ndarray]  # {reward: float32 [n]}
    references: dict[str, np.ndarray]  # {reward that learns: scores of its references, float32 [n]}
