"""The rewards by name. A reward's options are its constructor's arguments; the config sets them."""

from collections.abc import Mapping
from typing import Any

import torch

from reward_bridge.registry import (
    CLASS,
    check_arguments,
    check_interface,
    check_packages,
    find_class,
    without_class,
)
from reward_bridge.reward import Reward

REWARDS = {
    "clip_score": "reward_bridge.rewards.clip_score:ClipScore",
    "pickscore": "reward_bridge.rewards.pickscore:PickScore",
    "hpsv2": "reward_bridge.rewards.hpsv2:HPSv2",
    "imagereward": "reward_bridge.rewards.imagereward:ImageReward",
    "longclip": "reward_bridge.rewards.longclip:LongClip",
    "aesthetic": "reward_bridge.rewards.aesthetic:Aesthetic",
    "jpeg_compressibility": "reward_bridge.rewards.jpeg_compressibility:JpegCompressibility",
    "forensic_chat": "reward_bridge.rewards.forensic_chat:ForensicChat",
    "hpsv3": "reward_bridge.rewards.hpsv3:Hpsv3",
    "pairwise_judge": "reward_bridge.rewards.pairwise_judge:PairwiseJudge",
    "vlm_judge": "reward_bridge.rewards.vlm_judge:VlmJudge",
    "unifiedreward": "reward_bridge.rewards.ratings:UnifiedReward",
    "qwen_vl_score": "reward_bridge.rewards.ratings:QwenVlScore",
    "visualquality_r1": "reward_bridge.rewards.ratings:VisualQualityR1",
    "deqa": "reward_bridge.rewards.deqa:Deqa",
    "brisque": "reward_bridge.rewards.brisque:Brisque",
    "geneval": "reward_bridge.rewards.geneval:Geneval",
    "dpg": "reward_bridge.rewards.dpg:Dpg",
    "ocr": "reward_bridge.rewards.ocr:Ocr",
    "diversity": "reward_bridge.rewards.diversity:Diversity",
    "embedded_detector": "reward_bridge.rewards.embedded:EmbeddedDetector",
    "embedded_held_out": "reward_bridge.rewards.embedded:EmbeddedHeldOut",
    "embedded_prompt_accuracy": "reward_bridge.rewards.embedded:EmbeddedPromptAccuracy",
    "omniaid": "reward_bridge.rewards.omniaid:OmniAID",
    "omniaid_dino": "reward_bridge.rewards.omniaid_dino:OmniAIDDino",
    "effort": "reward_bridge.rewards.effort:Effort",
}


def make_reward(name: str, device: str, options: Mapping[str, Any]) -> Reward:
    """Build a reward on a torch device.

    Two options are not passed to the constructor: `servers` delegates the reward to reward servers
    (reward_bridge/client.py), and `class` names a class that is not in REWARDS, as
    "package.module:Class".

    Raises ValueError if there is no such reward, if an option is unknown or missing, or if the
    device has no room for the reward.
    """
    if "servers" in options:
        # Imported here because only remote rewards need an HTTP client.
        from reward_bridge.client import RemoteReward

        arguments = {"name": name, **options}
        check_arguments(RemoteReward, name, arguments)
        return RemoteReward(**arguments)

    make = find_class("reward", name, REWARDS, options)
    if CLASS in options:
        check_interface(make, "reward", name)
    check_packages(make, name)
    arguments = {"device": device, **without_class(options)}
    check_arguments(make, name, arguments)
    try:
        return make(**arguments)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{device} has no room for the reward {name!r}: {error}; move it with "
            "config.reward.devices, or load it in a smaller dtype (config.reward.options)"
        ) from error
