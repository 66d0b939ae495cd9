"""Stage 7: a tiny DINOv2 for the discriminator, trained by labels that need no annotator.

DINOv2's own self-distillation needs far more pictures. Here the class token learns which photograph
a crop is from, and every patch token how much the crop was blurred, shrunk and covered with noise:
the patches then carry texture. It never sees a generated picture.
"""

from pathlib import Path

import numpy as np
import torch
from fit import fit, rng
from photos import PHOTOS, SIZE, crops
from torch import nn
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2Model

from reward_bridge.preprocess import IMAGENET_MEAN, IMAGENET_STD, normalize

STEPS = 1000
BATCH = 64
CROPS = 256  # of each photograph
LEVELS = 3  # of blur, of shrinking and of noise


class Tasks(nn.Module):
    """A backbone and its two heads."""

    def __init__(self):
        super().__init__()
        self.backbone = Dinov2Model(
            Dinov2Config(
                hidden_size=96,
                num_hidden_layers=4,
                num_attention_heads=4,
                image_size=SIZE,
                patch_size=8,
            )
        )
        self.subject = nn.Linear(96, len(PHOTOS))
        self.levels = nn.Linear(96, LEVELS)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 [n, 3, h, w] in [0, 1] -> logits [n, photographs], levels [n, patches, 3]."""
        pixels = normalize(255 * x, IMAGENET_MEAN, IMAGENET_STD, torch.float32)
        states = self.backbone(pixels).last_hidden_state
        return self.subject(states[:, 0]), self.levels(states[:, 1:])


def build(work: Path, folder: Path) -> None:
    """Write the backbone to `folder` in bfloat16."""
    if (folder / "model.safetensors").exists():
        return
    labels = np.repeat(np.arange(len(PHOTOS)), CROPS)
    pixels = crops(labels, "train", rng("dino-crops", 0), smallest=0.6, mirror=True)

    def loss(model: Tasks, random: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        """Cross entropy of the subject, and the squared error of every patch's levels."""
        rows = random.integers(len(pixels), size=BATCH)
        x, levels = degraded(to_unit(pixels[rows]), random)
        logits, found = model(x)
        target = torch.from_numpy(labels[rows])
        error = F.mse_loss(found, levels[:, None].expand_as(found))
        accuracy = (logits.argmax(1) == target).float().mean()
        metrics = {"accuracy": accuracy.item(), "levels": error.item()}
        return F.cross_entropy(logits, target) + 10 * error, metrics

    torch.manual_seed(0)
    options = {"lr": 1e-3, "weight_decay": 0.05, "ema_decay": 0.98}
    model = fit("dino", Tasks(), loss, work, steps=STEPS, **options)
    model.backbone.to(torch.bfloat16).save_pretrained(folder)
    report(model.float())


def degraded(x: torch.Tensor, random: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Blur, shrink and add noise to each picture by levels from 0 to 1, of which half are 0.

    float32 [n, 3, h, w] in [0, 1] -> the same and the levels [n, 3].
    """
    n = len(x)
    drawn = random.uniform(-1, 1, (n, LEVELS)).astype(np.float32).clip(0)
    levels = torch.from_numpy(drawn)
    blur, shrink, noise = levels.T[..., None, None, None]

    blurred = F.avg_pool2d(F.pad(x, (1,) * 4, mode="reflect"), 3, stride=1)
    x = torch.lerp(x, blurred, blur)
    small = F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True)
    x = torch.lerp(x, F.interpolate(small, size=x.shape[-2:], mode="bilinear"), shrink)
    x = x + 0.1 * noise * torch.from_numpy(random.standard_normal(x.shape, np.float32))
    return x.clamp(0, 1), levels


def to_unit(pixels: np.ndarray) -> torch.Tensor:
    """uint8 [n, h, w, 3] -> float32 [n, 3, h, w] in [0, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def report(model: Tasks) -> None:
    """Print both tasks' results on crops of the training squares and of the held-out squares."""
    labels = np.arange(512) % len(PHOTOS)
    for region in ("train", "held_out"):
        x = to_unit(crops(labels, region, rng("dino-check", 0)))
        x, levels = degraded(x, rng("dino-levels", 0))
        logits, found = model(x)
        accuracy = np.mean(logits.argmax(1).numpy() == labels)
        share = 1 - (found.mean(1) - levels).var(0) / levels.var(0)
        words = "  ".join(f"{value:.2f}" for value in share.tolist())
        print(f"dino on {region} crops: subjects {accuracy:.3f}, explained variance of {words}")
