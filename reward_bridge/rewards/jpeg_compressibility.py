"""How small a picture is as a JPEG file (the toy reward of DDPO, arXiv 2305.13301, and Flow-GRPO)."""

import io
from collections.abc import Sequence

import torch
from PIL import Image


class JpegCompressibility:
    """Minus the size of the picture as a JPEG of `quality`, in units of 500 kB as Flow-GRPO scales it."""

    def __init__(self, device: str, quality: int = 95):
        self.quality = quality

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        sizes = []
        for pixels in images.permute(0, 2, 3, 1).cpu().numpy():
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, format="JPEG", quality=self.quality)
            sizes.append(file.tell())
        return -torch.tensor(sizes, dtype=torch.float32) / 500_000
