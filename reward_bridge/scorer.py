"""Frozen rewards behind the bridge, for programs that score pictures from memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from reward_bridge.bridge import PendingScores, RewardBridge
from reward_bridge.dlpack import check_room, reserve
from reward_bridge.rewards import make_reward


def open_scorer(reward_config: Any, devices: Mapping[str, str], *, load: bool) -> "BridgeScorer":
    """Load rewards on their devices and return a scorer. Call it before JAX starts.

    reward_config: config.reward; devices: {reward: torch device}; load: False reserves the devices
    and loads nothing, for processes that do not score. Raises ValueError if a reward cannot be
    made, or if JAX would not find room on a GPU that both use.
    """
    shared = reserve({*devices.values()}, reward_config.share_gpu)

    options = reward_config.options.to_dict()
    rewards = {}
    if load:
        for name, device in devices.items():
            rewards[name] = make_reward(name, device, options.get(name, {}))
    for device in shared:
        check_room(device)

    bridge = RewardBridge(
        rewards,
        devices,
        deadline=reward_config.deadline,
        retries=reward_config.retries,
        batch_size=reward_config.batch_size,
    )
    return BridgeScorer(bridge)


@dataclass(frozen=True)
class BridgeScorer:
    """A reward bridge that takes numpy arrays."""

    bridge: RewardBridge

    def submit(
        self, images: np.ndarray, prompts: Sequence[str], names: Sequence[str]
    ) -> "PendingRewards":
        """Queue uint8 images [n, 3, h, w] for the named rewards and return at once."""
        return PendingRewards(self.bridge.submit(torch.from_numpy(images), prompts, names))

    def close(self) -> None:
        self.bridge.close()


@dataclass(frozen=True)
class Scores:
    rewards: Mapping[str, np.ndarray]  # {reward: float32 [n]}


@dataclass(frozen=True)
class PendingRewards:
    pending: PendingScores

    def result(self) -> Scores:
        """Wait for the scores. Raises RewardError."""
        return Scores(self.pending.result())
