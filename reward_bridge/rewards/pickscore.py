"""PickScore, which predicts the picture that people would choose (arXiv 2305.01569)."""

from collections.abc import Sequence

import torch

from reward_bridge.rewards.clip import (
    cosine,
    image_features,
    load_folder,
    load_tokenizer,
    text_features,
)


class PickScore:
    """exp(logit_scale) * cosine / `divide_by`, by a CLIP-H tuned on human choices (equation 1).

    path: the CLIPModel folder, yuvalkirstain/PickScore_v1.
    tokenizer: the folder of its tokenizer, if that is a different folder. The published model uses
        that of laion/CLIP-ViT-H-14-laion2B-s32B-b79K.
    divide_by: 1 as in RealGen's server and evaluation (scores of about 20); 26 in Flow-GRPO.
    """

    def __init__(
        self,
        device: str,
        path: str,
        tokenizer: str | None = None,
        divide_by: float = 1.0,
        dtype: str = "float32",
    ):
        self.model = load_folder(path, "pickscore.path", device, dtype)
        self.tokenizer = load_tokenizer(tokenizer or path, "pickscore.tokenizer", self.model)
        self.scale = self.model.logit_scale.exp() / divide_by

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        text = text_features(self.model, self.tokenizer, prompts)
        return self.scale * cosine(image_features(self.model, images), text)
