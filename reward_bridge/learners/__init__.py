"""The rewards that can learn, by name. A learner defines the trained weights and their loss.

Options are the constructor's arguments. All learners share the code for the optimizer, the averaged
weights and the history (reward_bridge/adversary.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from reward_bridge.registry import (
    CLASS,
    check_arguments,
    check_interface,
    find_class,
    without_class,
)

LEARNERS = {
    "omniaid": "reward_bridge.learners.omniaid:OmniAIDLearner",
    "omniaid_dino": "reward_bridge.learners.omniaid:OmniAIDDinoLearner",
    "dino_discriminator": "reward_bridge.learners.dino_discriminator:DinoDiscriminator",
    "pickscore": "reward_bridge.learners.pickscore:PickScoreLearner",
    "embedded_detector": "reward_bridge.learners.embedded:EmbeddedLearner",
}


class Learner(Protocol):
    """What differs between the rewards that learn.

    Pictures are uint8 [n, 3, s, s], as `prepare` returns them. `model` is in eval mode after
    construction. Exactly its trained parameters require gradients; they are float32.
    """

    model: nn.Module

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """The first resize, uint8 [n, 3, h, w] -> uint8 [n, 3, s, s]; the result is stored."""

    def score(self, model: nn.Module, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Score n pictures: float32 [n], higher is more real.

        A picture's score does not depend on the rest of the batch. `model` is `self.model` or a
        copy of it with other weights, in eval mode.
        """

    def loss(
        self, model: nn.Module, real: torch.Tensor, generated: torch.Tensor, prompts: Sequence[str]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss [] of m augmented pairs and detached metrics [], one of them "accuracy".

        `real` and `generated` belong to the same m prompts. `model` is in train mode. Draws from
        torch's global generator.
        """


def make_learner(name: str, device: str, options: Mapping[str, Any]) -> Learner:
    """Build a learner on a torch device.

    The option `class` names a class that is not in LEARNERS, as "package.module:Class". Raises
    ValueError if there is no such learner, or if an option is unknown or missing.
    """
    make = find_class("learner", name, LEARNERS, options)
    if CLASS in options:
        check_interface(make, "learner", name)
    arguments = {"device": device, **without_class(options)}
    check_arguments(make, name, arguments)
    return make(**arguments)
