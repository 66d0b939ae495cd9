"""Augmentation of the pictures that a detector learns from, independent for each picture.

All random numbers come from torch's global CPU generator, so they are the same on every device.
Intermediate results are not rounded to 8 bits.
"""

import torch
from torch.nn import functional as F

GREY = (0.299, 0.587, 0.114)  # weights of red, green, blue


def augment(images: torch.Tensor) -> torch.Tensor:
    """RealGen's augmentation: mirror, blur and colour jitter, each with probability 1/2.

    [n, 3, h, w] in 0..255 -> float32 of the same shape and range. The Gaussian blur is 3 or 5
    pixels wide with sigma from U[0.1, 2]; for colours, see `jitter`. Source: RealGen_v2,
    flow_grpo/trainable_scorers.py.
    """
    return torch.stack([_augment_picture(picture) for picture in images.float() / 255]) * 255


def _augment_picture(x: torch.Tensor) -> torch.Tensor:
    """float32 [3, h, w] in 0..1."""
    if torch.rand(()) < 0.5:
        x = x.flip(-1)
    if torch.rand(()) < 0.5:
        width = 3 if torch.rand(()) < 0.5 else 5
        x = blur(x, width, _uniform(0.1, 2.0))
    if torch.rand(()) < 0.5:
        x = jitter(x, 0.1, 0.1, 0.1, 0.05)
    return x


def mirror_and_shift(images: torch.Tensor, most: int) -> torch.Tensor:
    """Mirror each picture [n, 3, h, w] with probability 1/2 and shift it by up to `most` pixels.

    Edges are filled by reflection. Keeps shape and dtype.
    """
    height, width = images.shape[2:]
    padded = F.pad(images.float(), (most,) * 4, mode="reflect").to(images.dtype)
    mirrored = torch.rand(len(images)) < 0.5
    corners = torch.randint(2 * most + 1, (len(images), 2)).tolist()

    moved = []
    for x, (top, left), flip in zip(padded, corners, mirrored, strict=True):
        crop = x[:, top : top + height, left : left + width]
        moved.append(crop.flip(-1) if flip else crop)
    return torch.stack(moved)


def blur(x: torch.Tensor, width: int, sigma: float) -> torch.Tensor:
    """Blur [c, h, w] with a Gaussian sampled at `width` (odd) pixels, reflected at the edges."""
    reach = width // 2
    offsets = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    padded = F.pad(x[:, None], (reach,) * 4, mode="reflect")
    return F.conv2d(padded, torch.outer(kernel, kernel)[None, None])[:, 0]


def jitter(
    x: torch.Tensor, brightness: float, contrast: float, saturation: float, hue: float
) -> torch.Tensor:
    """Colour jitter of [3, h, w] in 0..1, with its four steps in random order.

    Factors are from U[1 - b, 1 + b] and so on; the hue is rotated by U[-hue, hue] of a circle.
    """
    factors = [_uniform(1 - spread, 1 + spread) for spread in (brightness, contrast, saturation)]
    turn = _uniform(-hue, hue)
    for step in torch.randperm(4).tolist():
        if step == 3:
            x = turn_hue(x, turn)
            continue

        # Brightness blends with black, contrast with the mean grey, saturation with each pixel's.
        if step == 0:
            target = 0
        elif step == 1:
            target = grey(x).mean()
        else:
            target = grey(x)
        x = (factors[step] * x + (1 - factors[step]) * target).clamp(0, 1)
    return x


def grey(x: torch.Tensor) -> torch.Tensor:
    """[3, h, w] -> [1, h, w]."""
    return (x * x.new_tensor(GREY)[:, None, None]).sum(0, keepdim=True)


def turn_hue(x: torch.Tensor, turn: float) -> torch.Tensor:
    """Rotate HSV's hue of [3, h, w] in 0..1 by `turn` of a full circle."""
    red, green, blue = x
    value = x.amax(0)
    chroma = x.amax(0) - x.amin(0)
    safe = chroma.clamp(min=1e-12)  # the hue of a grey pixel does not matter

    # The hue in sixths of a circle, counted from red.
    from_red = (green - blue) / safe
    from_green = 2 + (blue - red) / safe
    from_blue = 4 + (red - green) / safe
    sixths = torch.where(value == red, from_red, torch.where(value == green, from_green, from_blue))
    sixths = sixths + 6 * turn

    # Back to red, green and blue.
    offsets = torch.tensor([5.0, 3.0, 1.0], device=x.device)[:, None, None]
    k = (sixths[None] + offsets).remainder(6)
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * torch.rand((), dtype=torch.float64).item()
