"""PickScore that learns to prefer the references, as Adv-GRPO trains it.

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
    """The last `layers` of the vision tower learn which of two pictures is the reference.

    The other options are those of the frozen reward; `divide_by` scales the score but not the loss.
    Everything is float32.
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
        self.model = reward.model
        self.tokenizer = reward.tokenizer
        self.divide_by = divide_by

        tower = self.model.vision_model.encoder.layers
        if not 1 <= layers <= len(tower):
            raise ValueError(
                f"got pickscore.layers {layers}; expected 1 to {len(tower)}, the layers of {path}"
            )
        for layer in tower[-layers:]:
            layer.requires_grad_(True)

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [n, 3, h, w] -> uint8 [n, 3, s, s], s being the model's image size."""
        return resize_and_crop(images, self.model.config.vision_config.image_size)

    def score(self, model: nn.Module, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """PickScore of uint8 pictures [n, 3, s, s] and their prompts: float32 [n]."""
        text = text_features(model, self.tokenizer, prompts)
        scale = model.logit_scale.exp() / self.divide_by
        return scale * cosine(image_features(model, images), text)

    def loss(
        self, model: nn.Module, real: torch.Tensor, generated: torch.Tensor, prompts: Sequence[str]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`preference_loss` of m pairs."""
        text = text_features(model, self.tokenizer, prompts)
        images = image_features(model, torch.cat([real, generated]))
        text = F.normalize(text, dim=-1)
        images = F.normalize(images, dim=-1)
        reference, generated = images.chunk(2)
        return preference_loss(text, reference, generated, model.logit_scale.exp())


def preference_loss(
    text: torch.Tensor, reference: torch.Tensor, generated: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """-log P(reference preferred), mean [] over pairs of unit features [m, d]; P is Bradley-Terry.

    The accuracy is the fraction of pairs whose reference wins.
    """
    margin = scale * (text * (reference - generated)).sum(-1)
    metrics = {
        "accuracy": (margin > 0).float().mean(),
        "margin": margin.mean().detach(),
    }
    return F.softplus(-margin).mean(), metrics
