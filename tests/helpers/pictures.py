"""Pictures for tests of rewards."""

import numpy as np
import torch
from PIL import Image

from tests.helpers.goldens import golden


def pictures(n, height, width, seed=0):
    """Smooth random pictures, uint8 [n, 3, h, w]: as photographs, easier to resample than noise."""
    small = np.random.default_rng(seed).integers(0, 256, (n, height // 8, width // 8, 3), np.uint8)
    big = [
        np.asarray(Image.fromarray(p).resize((width, height), Image.Resampling.BICUBIC))
        for p in small
    ]
    return torch.from_numpy(np.stack(big).transpose(0, 3, 1, 2).copy())


def photographs(height, width):
    """Eight crops of photographs, uint8 [8, 3, height, width].

    Not higher than wide: Pillow 13 resizes such pictures in another order.
    """
    return torch.from_numpy(golden("photographs.npz")["pixels"][::8, :, :height, :width].copy())


def as_pil(images):
    return [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in images]
