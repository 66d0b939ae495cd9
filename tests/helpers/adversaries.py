"""A small reward that learns, its settings and its pictures."""

import numpy as np
import torch
from PIL import Image
from torch import nn

from reward_bridge.adversary import Adversary
from reward_bridge.adversary_settings import Settings
from reward_bridge.references import References

SETTINGS = {
    "options": {},
    "schedule": "threshold",
    "threshold": 0.6,
    "margin": 0.1,
    "learn_epochs": 2,
    "cycle": 3,
    "patience": 2,
    "min_rise": 0.1,
    "always_first": True,
    "skip_generator": False,
    "optimizer": "adamw",
    "learning_rate": 0.01,
    "betas": (0.9, 0.999),
    "weight_decay": 0.01,
    "batch_size": 4,
    "history_batch_size": 3,
    "history_size": 6,
    "max_passes": 3,
    "target_accuracy": 1.1,
    "ema_decay": 0.9,
    "codec": "none",
    "quality": 90,
    "deadline": 60.0,
}


class Brightness:
    """Logistic regression on a picture's mean colour, with dropout; and a frozen scale."""

    def __init__(self):
        self.model = nn.Sequential(
            nn.Linear(3, 8), nn.Dropout(0.2), nn.Linear(8, 1), nn.Linear(1, 1)
        )
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / 2)
        self.model[3].requires_grad_(False)
        self.model.eval()

    def prepare(self, images):
        return images

    def score(self, model, images, prompts):
        return model(images.float().mean((2, 3)) / 255).squeeze(1).sigmoid()

    def loss(self, model, real, generated, prompts):
        logits = model(torch.cat([real, generated]).float().mean((2, 3)) / 255).squeeze(1)
        target = (torch.arange(len(logits)) < len(real)).float()
        accuracy = ((logits > 0) == (target > 0)).float().mean()
        return nn.functional.binary_cross_entropy_with_logits(logits, target), {
            "accuracy": accuracy
        }


def write_references(folder):
    """Six bright pictures."""
    random = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(random.integers(128, 256, (8, 8, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


def adversary(folder, **changes):
    settings = Settings.read("bright", {**SETTINGS, **changes})
    return Adversary("bright", Brightness(), settings, References(str(folder), "", []), "cpu", None)


def generated(seed, n=8):
    return torch.randint(
        0, 160, (n, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def epoch(one, seed, n=8):
    """What a run does with it in one epoch."""
    prompts, images = [f"p{i}" for i in range(n)], generated(seed, n)
    one.observe(one.draw(prompts, seed, 8, 8), images, prompts)
    return one.update(seed)
