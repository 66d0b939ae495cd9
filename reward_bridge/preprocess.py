"""What detectors do to a picture before they look at it, on the tensor, on its device: resize, crop, normalise.

Their authors resize with PIL. `resize` gives the same bits, so that a score does not depend on which of the two made
the picture small.
"""

import functools

import torch

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def resize(images: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    """uint8 [n, 3, h, w] -> uint8 [n, 3, *size], antialiased, `mode` "bilinear" or "bicubic", PIL's bits.

    PIL resamples the rows, rounds to 8 bits, then the columns, and rounds again, halves up (1024 -> 512 has many).
    Pillow 13 begins with the columns where the height shrinks by more; this does as the versions before it.
    """
    height, width = size
    return _resample(_resample(images, width, mode).mT, height, mode).mT.contiguous()


def _resample(images: torch.Tensor, n: int, mode: str) -> torch.Tensor:
    """uint8 [..., m] -> uint8 [..., n]; whole numbers below 2**53, so that float64 is exact."""
    if images.shape[-1] == n:
        return images
    x = images.double() @ _pil_weights(images.shape[-1], n, mode, images.device)
    return (x / 2**22 + 0.5).floor().clamp(0, 255).to(torch.uint8)


@functools.lru_cache(maxsize=16)
def _pil_weights(m: int, n: int, mode: str, device: torch.device) -> torch.Tensor:
    """float64 [m, n] of PIL's weights in units of 2**-22, to which it rounds them (Pillow, Resample.c).

    The filter is a triangle, or Keys' cubic with a = -1/2, stretched to the target's pixels where those are larger.
    """
    scale = m / n
    stretch = max(scale, 1.0)
    reach = stretch * {"bilinear": 1, "bicubic": 2}[mode]
    centre = (torch.arange(n, dtype=torch.float64) + 0.5) * scale
    source = torch.arange(m, dtype=torch.float64)[:, None]
    t = ((source - centre + 0.5) * (1 / stretch)).abs()
    if mode == "bilinear":
        weights = (1 - t).clamp(min=0)
    else:
        weights = torch.where(
            t < 1, (1.5 * t - 2.5) * t * t + 1, -0.5 * (((t - 5) * t + 8) * t - 4)
        )
    inside = (source >= (centre - reach + 0.5).trunc()) & (source < (centre + reach + 0.5).trunc())
    weights = torch.where(inside & (t < 2), weights, 0.0)
    weights = weights / weights.sum(0)
    return (weights.sign() * (weights.abs() * 2**22 + 0.5).floor()).to(device)


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
    images: torch.Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """uint8 [n, 3, h, w] -> (x / 255 - mean) / std, per channel, computed in float32 and returned in `dtype`."""
    mean, std = (
        torch.tensor(values, device=images.device)[:, None, None] for values in (mean, std)
    )
    return ((images.float() / 255 - mean) / std).to(dtype)
