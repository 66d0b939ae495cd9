"""What detectors do to a picture before they look at it, on the tensor, on its device: resize, crop, normalise.

Their authors resize with PIL. `resize` repeats PIL's two passes with their roundings, so that a score does not depend
on which of the two made the picture small (tested against PIL: at most one grey level, on few pixels).
"""

import torch
from torch.nn import functional as F

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def resize(images: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    """uint8 [n, 3, h, w] -> uint8 [n, 3, *size], antialiased, `mode` "bilinear" or "bicubic", as PIL does it.

    PIL resamples the rows, rounds to 8 bits, then the columns, and rounds again. Computed in float32 because only the
    CPU resizes uint8.
    """
    height, width = size
    for target in ((images.shape[2], width), (height, width)):
        if target != tuple(images.shape[2:]):
            x = F.interpolate(images.float(), target, mode=mode, antialias=True, align_corners=False)
            images = x.round().clamp(0, 255).to(torch.uint8)
    return images


def resize_and_crop(images: torch.Tensor, side: int, mode: str = "bicubic") -> torch.Tensor:
    """uint8 [n, 3, h, w] -> uint8 [n, 3, side, side]: the short side to `side`, then the middle (CLIP's way).

    The long side is cut to whole pixels and the crop rounded to even, as torchvision's Resize and CenterCrop do.
    """
    height, width = images.shape[2:]
    short = min(height, width)
    images = resize(images, (side * height // short, side * width // short), mode)
    top, left = (round((n - side) / 2) for n in images.shape[2:])
    return images[:, :, top : top + side, left : left + side]


def normalize(
    images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """uint8 [n, 3, h, w] -> (x / 255 - mean) / std, per channel, computed in float32 and returned in `dtype`."""
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (mean, std))
    return ((images.float() / 255 - mean) / std).to(dtype)
