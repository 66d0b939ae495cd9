"""The rewards by name. Each one's options are its constructor's arguments; the config gives them.

A name stands for "module:class", imported when asked for: a run loads only what it uses.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from reward_bridge.bridge import Reward

REWARDS = {
    "clip_score": "reward_bridge.rewards.clip_score:ClipScore",
    "pickscore": "reward_bridge.rewards.pickscore:PickScore",
    "hpsv2": "reward_bridge.rewards.hpsv2:HPSv2",
    "longclip": "reward_bridge.rewards.longclip:LongClip",
    "aesthetic": "reward_bridge.rewards.aesthetic:Aesthetic",
    "jpeg_compressibility": "reward_bridge.rewards.jpeg_compressibility:JpegCompressibility",
    "forensic_chat": "reward_bridge.rewards.forensic_chat:ForensicChat",
    "hpsv3": "reward_bridge.rewards.hpsv3:Hpsv3",
    "vlm_judge": "reward_bridge.rewards.vlm_judge:VlmJudge",
    "embedded_detector": "reward_bridge.rewards.embedded:EmbeddedDetector",
    "embedded_held_out": "reward_bridge.rewards.embedded:EmbeddedHeldOut",
    "embedded_prompt_accuracy": "reward_bridge.rewards.embedded:EmbeddedPromptAccuracy",
    "omniaid": "reward_bridge.rewards.omniaid:OmniAID",
    "omniaid_dino": "reward_bridge.rewards.omniaid_dino:OmniAIDDino",
    "effort": "reward_bridge.rewards.effort:Effort",
}


def make_reward(name: str, device: str, options: Mapping[str, Any]) -> Reward:
    """Build a reward on a torch device; options that name `servers` leave it to those (reward_bridge/client.py).

    Raises ValueError for a name that is not in REWARDS, for an option that the reward does not have or lacks, and for
    a device without room for the reward.
    """
    if "servers" in options:
        from reward_bridge.client import RemoteReward

        return RemoteReward(**_arguments(RemoteReward, name, {"name": name, **options}))
    if name not in REWARDS:
        raise ValueError(f"there is no reward {name!r}; choose from {', '.join(sorted(REWARDS))}")
    module, _, cls = REWARDS[name].partition(":")
    make = getattr(importlib.import_module(module), cls)
    arguments = _arguments(make, name, {"device": device, **options})
    try:
        return make(**arguments)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{device} has no room for the reward {name!r}: {error}; move it with config.reward.devices, or load it in "
            "a smaller dtype (config.reward.options)"
        ) from error


def _arguments(make: Callable, name: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """`given`, if these are the arguments that `make` takes."""
    try:
        inspect.signature(make).bind(**given)
    except TypeError as error:
        takes = ", ".join(
            key for key in inspect.signature(make).parameters if key not in ("device", "name")
        )
        raise ValueError(
            f"config.reward.options.{name}: {error}; {make.__name__} takes {takes or 'no options'}"
        ) from error
    return given
