"""How much a picture differs from the others of its prompt, in the features of a frozen network.

As a watched reward it tells whether a run draws the same picture again and again; as a trained one
it is a bonus for pictures that differ; and `gardo` weighs advantages with it.
"""

from collections.abc import Sequence

import torch
from torch import nn

from reward_bridge.learners.dino_discriminator import load_dinov2
from reward_bridge.preprocess import IMAGENET_MEAN, IMAGENET_STD, normalize, resize
from reward_bridge.rewards.embedded import load_classifier, to_input
from reward_bridge.weights import torch_dtype


class Diversity:
    """The smallest cosine distance, 1 - cos, to another picture of the prompt: 0 for a copy.

    path: a Dinov2Model folder, such as facebook/dinov2-base, whose normalised class token is the
        feature. Empty: the embedded classifier's `layout`.
    size: pictures are resized to size x size pixels for DINOv2, bicubic.
    dtype: of DINOv2.
    Source: GARDO (tinnerhrhe/GARDO), with another network.
    """

    def __init__(self, device: str, path: str = "", size: int = 224, dtype: str = "float32"):
        self.dino: nn.Module | None = None
        self.size = size
        self.dtype = torch_dtype(dtype)
        if not path:
            self.classifier = load_classifier(device)
            return

        model = load_dinov2(path, "diversity.path")
        if size % model.config.patch_size:
            raise ValueError(
                f"got diversity.size {size}; expected a multiple of the patch size "
                f"{model.config.patch_size} of {path}"
            )
        self.dino = model.to(device, self.dtype).eval()

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [n, 3, h, w] -> float32 [n, d]."""
        if self.dino is None:
            return self.classifier.layout(to_input(images))
        pixels = resize(images, (self.size, self.size), "bicubic")
        pixels = normalize(pixels, IMAGENET_MEAN, IMAGENET_STD, self.dtype)
        return self.dino(pixels).last_hidden_state[:, 0].float()

    def score_groups(self, images: torch.Tensor, prompts: Sequence[str], size: int) -> torch.Tensor:
        """uint8 [groups * size, 3, h, w] -> float32 [groups * size]."""
        return nearest_distance(self.features(images), size)


def nearest_distance(features: torch.Tensor, size: int) -> torch.Tensor:
    """Return the smallest 1 - cos to another row of the group: float32 [n].

    features: [n, d]; a group is `size` consecutive rows.
    """
    groups = nn.functional.normalize(features.float(), dim=-1).reshape(-1, size, features.shape[1])
    distance = 1.0 - groups @ groups.mT
    itself = torch.eye(size, dtype=torch.bool, device=features.device)
    return distance.masked_fill(itself, torch.inf).amin(-1).clamp(min=0.0).flatten()
