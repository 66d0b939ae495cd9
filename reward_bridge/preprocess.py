"""Preprocessing of pictures for detectors, on the tensor's own device: resize, crop, normalise.

The detectors' authors resize with PIL. `resize` gives the same bits, so that scores do not depend
on which of the two resized the picture.
"""

import functools

import torch

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

UNIT = 2**22  # PIL rounds its weights to multiples of 1 / UNIT


def resize(images: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    """Resize uint8 [n, 3, h, w] to uint8 [n, 3, *size], antialiased, with PIL's bits.

    `mode` is "bilinear" or "bicubic". PIL resamples the rows, rounds to 8 bits, then does the same
    with the columns; halves are rounded up (1024 -> 512 has many). Pillow 13 begins with the
    columns if the height shrinks more than the width; this function follows earlier versions.
    """
    height, width = size
    images = _resample(images, width, mode)
    return _resample(images.mT, height, mode).mT.contiguous()


def _resample(images: torch.Tensor, n: int, mode: str) -> torch.Tensor:
    """uint8 [..., m] -> uint8 [..., n]. Sums are integers below 2**53, exact in float64."""
    if images.shape[-1] == n:
        return images
    x = images.double() @ _pil_weights(images.shape[-1], n, mode, images.device)
    return (x / UNIT + 0.5).floor().clamp(0, 255).to(torch.uint8)


@functools.lru_cache(maxsize=16)
def _pil_weights(m: int, n: int, mode: str, device: torch.device) -> torch.Tensor:
    """PIL's resampling weights, float64 [m, n], in units of 1 / UNIT (Pillow, Resample.c).

    The filter is a triangle, or Keys' cubic with a = -1/2. It is stretched to the size of the
    target's pixels if those are larger.
    """
    # Distance from every source pixel to every target pixel's centre, in units of the filter.
    scale = m / n
    stretch = max(scale, 1.0)
    centre = (torch.arange(n, dtype=torch.float64) + 0.5) * scale
    source = torch.arange(m, dtype=torch.float64)[:, None]
    t = ((source - centre + 0.5) * (1 / stretch)).abs()

    # The filter's values.
    if mode == "bilinear":
        weights = (1 - t).clamp(min=0)
    else:
        near = (1.5 * t - 2.5) * t * t + 1
        far = -0.5 * (((t - 5) * t + 8) * t - 4)
        weights = torch.where(t < 1, near, far)

    # PIL cuts the filter off at whole pixels, then normalises and rounds half away from zero.
    reach = stretch * {"bilinear": 1, "bicubic": 2}[mode]
    first = (centre - reach + 0.5).trunc()
    end = (centre + reach + 0.5).trunc()
    inside = (source >= first) & (source < end)
    weights = torch.where(inside & (t < 2), weights, 0.0)
    weights = weights / weights.sum(0)
    return (weights.sign() * (weights.abs() * UNIT + 0.5).floor()).to(device)


def resize_and_crop(images: torch.Tensor, side: int, mode: str = "bicubic") -> torch.Tensor:
    """uint8 [n, 3, h, w] -> uint8 [n, 3, side, side]: CLIP's preprocessing.

    The short side is resized to `side` and the middle is cropped. The long side is rounded down to
    whole pixels. The crop's corner is rounded half to even. Both are as in torchvision's Resize and
    CenterCrop.
    """
    height, width = images.shape[2:]
    short = min(height, width)
    images = resize(images, (side * height // short, side * width // short), mode)

    height, width = images.shape[2:]
    top = round((height - side) / 2)
    left = round((width - side) / 2)
    return images[:, :, top : top + side, left : left + side]


def normalize(
    images: torch.Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """(x / 255 - mean) / std per channel, for images [n, 3, h, w] in 0..255.

    Computed in float32 and returned in `dtype`.
    """
    mean_by_channel = torch.tensor(mean, device=images.device)[:, None, None]
    std_by_channel = torch.tensor(std, device=images.device)[:, None, None]
    return ((images.float() / 255 - mean_by_channel) / std_by_channel).to(dtype)
