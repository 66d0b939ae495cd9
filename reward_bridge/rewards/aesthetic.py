"""LAION's aesthetic predictor, as DDPO and Flow-GRPO use it.

Source: christophschuhmann/improved-aesthetic-predictor.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from reward_bridge.rewards.clip import image_features, load_folder
from reward_bridge.weights import find, load_strict, read, rename

# The indices of the linear layers in the published file, which has dropout layers between them.
# There is no activation.
PUBLISHED_LAYERS = (0, 2, 4, 6, 7)
TABLE = [
    (rf"layers\.{theirs}\.(weight|bias)", rf"{ours}.\1")
    for ours, theirs in enumerate(PUBLISHED_LAYERS)
]


class Aesthetic:
    """The predicted human rating of the picture, about 1 to 10, unscaled (arXiv 2305.13301).

    An MLP on CLIP-L/14's normalised image feature, in float32. The prompt is not used.

    path: sac+logos+ava1-l14-linearMSE.pth or its folder.
    clip: the CLIPModel folder openai/clip-vit-large-patch14.
    """

    def __init__(self, device: str, path: str, clip: str, dtype: str = "float32"):
        file = find(path, "aesthetic.path", "sac+logos+ava1-l14-linearMSE.pth")
        self.model = load_folder(clip, "aesthetic.clip", device, dtype)
        head = linear_layers(self.model.config.projection_dim)
        self.head = load_strict(head, rename(read(file), TABLE, file), file).to(device)

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        features = image_features(self.model, images)
        return self.head(F.normalize(features, dim=-1)).squeeze(1)


def linear_layers(width: int) -> nn.Sequential:
    """The layers from a feature of this width to a score. ImageReward has the same ones."""
    widths = (width, 1024, 128, 64, 16, 1)
    return nn.Sequential(*(nn.Linear(n_in, n_out) for n_in, n_out in itertools.pairwise(widths)))
