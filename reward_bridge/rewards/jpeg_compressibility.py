"""The size of a picture as a JPEG file: a toy reward (DDPO, arXiv 2305.13301; Flow-GRPO)."""

import io
from collections.abc import Sequence

import torch
from PIL import Image

UNIT = 500_000  # bytes, as Flow-GRPO scales the size


class JpegCompressibility:
    """The negative size of the picture as a JPEG of this quality, in units of 500 kB."""

    can_be_negative = True

    def __init__(self, device: str, quality: int = 95):
        self.quality = quality

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        sizes = []
        for pixels in images.permute(0, 2, 3, 1).cpu().numpy():
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, format="JPEG", quality=self.quality)
            sizes.append(file.tell())
        return -torch.tensor(sizes, dtype=torch.float32) / UNIT
