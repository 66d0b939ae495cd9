"""The rewards that can learn, by name: what of each is trained, on which loss. Options are the constructor's arguments.

A name stands for "module:class", imported when asked for, as in rewards/__init__.py. Optimizer, averaged weights and
history are the same for all of them and not in here.
"""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from reward_bridge.rewards import _arguments

LEARNERS = {
    "omniaid": "reward_bridge.learners.omniaid:OmniAIDLearner",
    "omniaid_dino": "reward_bridge.learners.omniaid:OmniAIDDinoLearner",
    "dino_discriminator": "reward_bridge.learners.dino_discriminator:DinoDiscriminator",
    "pickscore": "reward_bridge.learners.pickscore:PickScoreLearner",
    "embedded_detector": "reward_bridge.learners.embedded:EmbeddedLearner",
}


class Learner(Protocol):
    """What differs between the rewards that learn. Pictures are uint8 [n, 3, s, s], as `prepare` gives them.

    `model` comes in eval mode; of its parameters exactly those that learn require gradients, and they are float32.
    """

    model: nn.Module

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [n, 3, h, w] -> uint8 [n, 3, s, s]: the first resize; what is kept of a picture."""

    def score(self, model: nn.Module, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """float32 [n], higher is more real, the same for a picture in any company.

        `model` is `self.model` or a copy of it with other weights, in eval mode.
        """

    def loss(
        self, model: nn.Module, real: torch.Tensor, generated: torch.Tensor, prompts: Sequence[str]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss [] of m pairs, augmented, and detached metrics [], among them "accuracy".

        `real` and `generated` are of the same m prompts; `model` is in train mode. Draws from torch's global generator.
        """


def make_learner(name: str, device: str, options: Mapping[str, Any]) -> Learner:
    """Raises ValueError for a name that is not in LEARNERS, and for an option that it does not have or lacks."""
    if name not in LEARNERS:
        raise ValueError(
            f"there is no reward {name!r} that can learn; choose from {', '.join(sorted(LEARNERS))}"
        )
    module, _, cls = LEARNERS[name].partition(":")
    make = getattr(importlib.import_module(module), cls)
    return make(**_arguments(make, name, {"device": device, **options}))
