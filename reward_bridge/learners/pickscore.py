"""PickScore that learns to prefer the references, as Adv-GRPO co-trains it.

Source: showlab/Adv-GRPO, adv_grpo/pick_score_training.py and scripts/train_sd3_fast_pickscore.py.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from reward_bridge.preprocess import resize_and_crop
from reward_bridge.rewards.clip import cosine, image_features, text_features
from reward_bridge.rewards.pickscore import PickScore


class PickScoreLearner:
    """The last `layers` of the vision tower learn, on which of two pictures of a prompt is the reference.

    The other options are the frozen reward's; `divide_by` scales the score alone. Everything is float32.
    """

    def __init__(
        self,
        device: str,
        path: str,
        tokenizer: str | None = None,
        divide_by: float = 1.0,
        layers: int = 1,
    ):
        reward = PickScore(device, path, tokenizer, divide_by)
        self.model, self.tokenizer, self.divide_by = reward.model, reward.tokenizer, divide_by
        tower = self.model.vision_model.encoder.layers
        if not 1 <= layers <= len(tower):
            raise ValueError(
                f"got pickscore.layers {layers}; expected 1 to {len(tower)}, the layers of {path}"
            )
        for layer in tower[-layers:]:
            layer.requires_grad_(True)

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        return resize_and_crop(images, self.model.config.vision_config.image_size)

    def score(self, model: nn.Module, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        text = text_features(model, self.tokenizer, prompts)
        return (
            model.logit_scale.exp() / self.divide_by * cosine(image_features(model, images), text)
        )

    def loss(
        self, model: nn.Module, real: torch.Tensor, generated: torch.Tensor, prompts: Sequence[str]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        text = text_features(model, self.tokenizer, prompts)
        images = image_features(model, torch.cat([real, generated]))
        text, images = F.normalize(text, dim=-1), F.normalize(images, dim=-1)
        return preference_loss(text, *images.chunk(2), model.logit_scale.exp())


def preference_loss(
    text: torch.Tensor, reference: torch.Tensor, generated: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """-log P(reference is preferred), mean over pairs; unit features [m, d], P by Bradley and Terry.

    The accuracy is the share of pairs whose reference wins.
    """
    margin = scale * (text * (reference - generated)).sum(-1)
    return F.softplus(-margin).mean(), {
        "accuracy": (margin > 0).float().mean(),
        "margin": margin.mean().detach(),
    }
