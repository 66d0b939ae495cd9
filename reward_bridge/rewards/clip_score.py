"""Image-text alignment by any CLIP (arXiv 2103.00020)."""

from collections.abc import Sequence

import torch
from transformers import CLIPImageProcessorPil

from reward_bridge.rewards.clip import (
    cosine,
    image_features,
    load_folder,
    load_tokenizer,
    text_features,
)
from reward_bridge.weights import find


class ClipScore:
    """Cosine similarity of image and prompt, times `scale`.

    path: a local `CLIPModel` folder with its tokenizer.

    Flow-GRPO's clip_score is logits_per_image / 30; for OpenAI's models (logit scale 100) that is
    scale = 100 / 30. Pictures are resized as by PIL, bicubic, as in CLIP's training. Flow-GRPO
    resizes the float tensor, bilinear.
    """

    def __init__(self, device: str, path: str, scale: float = 100 / 30, dtype: str = "float32"):
        self.scale = scale
        self.model = load_folder(path, "clip_score.path", device, dtype)
        self.tokenizer = load_tokenizer(path, "clip_score.path", self.model)

        # transformers 5 keeps the image processor's settings in the processor's file.
        names = ("preprocessor_config.json", "processor_config.json")
        folder = find(path, "clip_score.path", *names).parent
        processor = CLIPImageProcessorPil.from_pretrained(folder)
        self.mean = processor.image_mean
        self.std = processor.image_std

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        image = image_features(self.model, images, self.mean, self.std)
        text = text_features(self.model, self.tokenizer, prompts)
        return self.scale * cosine(image, text)
