"""What is done to pictures before a detector learns from them, each for itself, drawn from torch's global generator.

Draws are made on the CPU, so that they are the same on every device. Nothing is rounded to 8 bits on the way.
"""

import torch
from torch.nn import functional as F

GREY = (0.299, 0.587, 0.114)


def augment(images: torch.Tensor) -> torch.Tensor:
    """[n, 3, h, w] in 0..255 -> float32, by RealGen's recipe: mirrored, blurred, recoloured, each with p 1/2 a picture.

    The blur is Gaussian, 3 or 5 pixels wide, sigma from U[0.1, 2]; colours see `jitter`. Source: RealGen_v2,
    flow_grpo/trainable_scorers.py.
    """
    return torch.stack([_augment_one(picture) for picture in images.float() / 255]) * 255


def _augment_one(x: torch.Tensor) -> torch.Tensor:
    if torch.rand(()) < 0.5:
        x = x.flip(-1)
    if torch.rand(()) < 0.5:
        x = blur(x, 3 if torch.rand(()) < 0.5 else 5, _uniform(0.1, 2.0))
    if torch.rand(()) < 0.5:
        x = jitter(x, 0.1, 0.1, 0.1, 0.05)
    return x


def mirror_and_shift(images: torch.Tensor, most: int) -> torch.Tensor:
    """[n, 3, h, w]: each mirrored with p 1/2, and moved by up to `most` pixels, with its own reflection at the edge."""
    height, width = images.shape[2:]
    padded = F.pad(images.float(), (most,) * 4, mode="reflect").to(images.dtype)
    mirrored = torch.rand(len(images)) < 0.5
    corners = torch.randint(2 * most + 1, (len(images), 2)).tolist()
    crops = [
        x[:, top : top + height, left : left + width]
        for x, (top, left) in zip(padded, corners, strict=True)
    ]
    return torch.stack([x.flip(-1) if flip else x for x, flip in zip(crops, mirrored, strict=True)])


def blur(x: torch.Tensor, width: int, sigma: float) -> torch.Tensor:
    """[c, h, w] under a Gaussian sampled at `width` (odd) pixels, reflected at the edges."""
    reach = width // 2
    kernel = torch.exp(
        -0.5 * (torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype) / sigma) ** 2
    )
    kernel = kernel / kernel.sum()
    return F.conv2d(
        F.pad(x[:, None], (reach,) * 4, mode="reflect"), torch.outer(kernel, kernel)[None, None]
    )[:, 0]


def jitter(
    x: torch.Tensor, brightness: float, contrast: float, saturation: float, hue: float
) -> torch.Tensor:
    """[3, h, w] in 0..1: factors from U[1 - b, 1 + b] and so on, a turn of the hue from U[-hue, hue], in any order."""
    factors = [_uniform(1 - spread, 1 + spread) for spread in (brightness, contrast, saturation)]
    turn = _uniform(-hue, hue)
    for step in torch.randperm(4).tolist():
        if step == 3:
            x = turn_hue(x, turn)
        else:  # towards black, the mean grey, or the pixel's own grey
            towards = (lambda x: 0, lambda x: grey(x).mean(), grey)[step](x)
            x = (factors[step] * x + (1 - factors[step]) * towards).clamp(0, 1)
    return x


def grey(x: torch.Tensor) -> torch.Tensor:
    """[3, h, w] -> [1, h, w]."""
    return (x * x.new_tensor(GREY)[:, None, None]).sum(0, keepdim=True)


def turn_hue(x: torch.Tensor, turn: float) -> torch.Tensor:
    """[3, h, w] in 0..1, the hue of HSV turned by `turn` of a full circle."""
    red, green, blue = x
    value, chroma = x.amax(0), x.amax(0) - x.amin(0)
    safe = chroma.clamp(min=1e-12)  # of a grey pixel the hue does not matter
    sixth = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sixth = (sixth + 6 * turn)[None] + torch.tensor([5.0, 3.0, 1.0], device=x.device)[:, None, None]
    k = sixth.remainder(6)
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * torch.rand((), dtype=torch.float64).item()
