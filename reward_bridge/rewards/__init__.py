"""The rewards by name. Each one's options are its constructor's arguments; the config gives them.

A name stands for "module:class", imported when asked for: a run loads only what it uses.
"""

import importlib
from collections.abc import Mapping
from typing import Any

from reward_bridge.bridge import Reward

REWARDS = {
    "clip_score": "reward_bridge.rewards.clip_score:ClipScore",
    "jpeg_compressibility": "reward_bridge.rewards.jpeg_compressibility:JpegCompressibility",
    "embedded_detector": "reward_bridge.rewards.embedded:EmbeddedDetector",
    "embedded_held_out": "reward_bridge.rewards.embedded:EmbeddedHeldOut",
    "embedded_prompt_accuracy": "reward_bridge.rewards.embedded:EmbeddedPromptAccuracy",
}


def make_reward(name: str, device: str, options: Mapping[str, Any]) -> Reward:
    """Build a reward on a torch device. Raises ValueError for a name that is not in REWARDS."""
    if name not in REWARDS:
        raise ValueError(f"there is no reward {name!r}; choose from {', '.join(sorted(REWARDS))}")
    module, _, cls = REWARDS[name].partition(":")
    return getattr(importlib.import_module(module), cls)(device=device, **options)
