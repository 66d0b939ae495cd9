"""Image-text alignment by any CLIP (arXiv 2103.00020)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel
from transformers.utils.logging import disable_progress_bar


class ClipScore:
    """Cosine similarity of image and prompt times `scale`, from a local `CLIPModel` folder with its tokenizer.

    Flow-GRPO's clip_score is logits_per_image / 30, which for OpenAI's models (logit scale 100) is scale = 100 / 30.
    Pictures are resized on their device, bicubic and antialiased, short side to the model's size, and centre-cropped.
    """

    def __init__(self, device: str, path: str, scale: float = 100 / 30):
        if not (Path(path) / "config.json").exists():
            raise FileNotFoundError(
                f"{path} is no CLIPModel folder (no config.json); set config.reward.options.clip_score.path"
            )
        self.scale = scale
        disable_progress_bar()  # of loading; it would tear the run's own
        self.model = CLIPModel.from_pretrained(path, dtype=torch.float32).eval().requires_grad_(False).to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        processor = CLIPImageProcessorPil.from_pretrained(path)
        self.size = self.model.config.vision_config.image_size
        self.mean, self.std = (
            torch.tensor(values, device=device)[:, None, None] for values in (processor.image_mean, processor.image_std)
        )

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [n, 3, h, w] -> what the vision tower takes."""
        x = images.float()
        height, width = x.shape[2:]
        factor = self.size / min(height, width)
        if factor != 1:
            x = F.interpolate(
                x, (round(height * factor), round(width * factor)), mode="bicubic", antialias=True, align_corners=False
            ).clamp(0, 255)
        top, left = (x.shape[2] - self.size) // 2, (x.shape[3] - self.size) // 2
        x = x[:, :, top : top + self.size, left : left + self.size]
        return (x / 255 - self.mean) / self.std

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        unique = list(dict.fromkeys(prompts))
        tokens = self.tokenizer(unique, padding="max_length", truncation=True, return_tensors="pt").to(images.device)
        text = F.normalize(self.model.get_text_features(**tokens).pooler_output, dim=-1)
        text = text[[unique.index(prompt) for prompt in prompts]]
        image = F.normalize(self.model.get_image_features(pixel_values=self.pixels(images)).pooler_output, dim=-1)
        return self.scale * (image * text).sum(-1)
