"""LAION's aesthetic predictor (christophschuhmann/improved-aesthetic-predictor), as DDPO and Flow-GRPO use it."""

import itertools
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from reward_bridge.rewards.clip import image_features, load_folder
from reward_bridge.weights import find, load_strict, read, rename

# Layers between these are dropouts; there is no activation
TABLE = [
    (rf"layers\.{theirs}\.(weight|bias)", rf"{ours}.\1")
    for ours, theirs in enumerate((0, 2, 4, 6, 7))
]


class Aesthetic:
    """How people would rate the picture, about 1 to 10, whatever the prompt; unscaled (arXiv 2305.13301).

    A perceptron on CLIP-L/14's normalised image feature. `path` is sac+logos+ava1-l14-linearMSE.pth or its folder,
    `clip` the CLIPModel folder openai/clip-vit-large-patch14. The perceptron stays in float32.
    """

    def __init__(self, device: str, path: str, clip: str, dtype: str = "float32"):
        file = find(path, "aesthetic.path", "sac+logos+ava1-l14-linearMSE.pth")
        self.model = load_folder(clip, "aesthetic.clip", device, dtype)
        widths = (self.model.config.projection_dim, 1024, 128, 64, 16, 1)
        head = nn.Sequential(
            *(nn.Linear(n_in, n_out) for n_in, n_out in itertools.pairwise(widths))
        )
        self.head = load_strict(head, rename(read(file), TABLE, file), file).to(device)

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return self.head(F.normalize(image_features(self.model, images), dim=-1)).squeeze(1)
