"""The embedded model's rewards: small networks on 64x64 pictures (scripts/build_embedded).

The demo trains against `EmbeddedDetector`. `EmbeddedHeldOut`, which has another architecture, and
the classifier behind `EmbeddedPromptAccuracy` and `EmbeddedFrechet` are only used for evaluation.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from reward_bridge.weights import load_strict, read

FOLDER = Path(__file__).parent.parent / "embedded"
SIZE = 64  # pixels


def to_input(images: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 3, h, w] -> float32 [n, 3, 64, 64] in [-1, 1]."""
    x = images.float() / 127.5 - 1
    if x.shape[2:] != (SIZE, SIZE):
        x = F.interpolate(x, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
    return x


def _block(n_in: int, n_out: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(n_in, n_out, 3, stride, 1), nn.GroupNorm(8, n_out), nn.SiLU()]


class ConvDetector(nn.Module):
    """Strided convolutions down to 8x8, and the mean of one logit per position.

    It judges textures everywhere in the picture.
    """

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            *_block(3, 32, 2), *_block(32, 64, 2), *_block(64, 96, 2), *_block(96, 96, 1)
        )
        self.head = nn.Conv2d(96, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, 3, 64, 64] -> logit of "real" [n]."""
        return self.head(self.body(x)).mean((1, 2, 3))


class PoolDetector(nn.Module):
    """Full-resolution convolutions with max-pooling, and one logit for the whole picture."""

    def __init__(self):
        super().__init__()
        widths = (3, 24, 48, 64, 96)
        layers: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise(widths):
            layers += [nn.Conv2d(n_in, n_out, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Sequential(
            nn.Linear(2 * widths[-1], 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, 3, 64, 64] -> logit of "real" [n]."""
        features = self.body(x)
        pooled = torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1)
        return self.head(pooled).squeeze(1)


class Classifier(nn.Module):
    """Classifies which photograph a picture shows.

    Max-pooled convolutions. The Fréchet distance is measured in the 64 features before the head.
    """

    def __init__(self, classes: int):
        super().__init__()
        layers: list[nn.Module] = []
        for n_in, n_out in ((3, 24), (24, 48), (48, 64)):
            layers += [*_block(n_in, n_out, 1), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers, *_block(64, 64, 1))
        self.head = nn.Linear(64, classes)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """[n, 3, 64, 64] -> [n, 64]."""
        return self.body(x).mean((2, 3))

    def layout(self, x: torch.Tensor) -> torch.Tensor:
        """What is where, [n, 3, 64, 64] -> [n, 48 * 16 * 16].

        The maps after the second pooling, each without its mean. `features` are nearly the same for
        all pictures of a subject, while these tell them apart.
        """
        maps = self.body[:8](x)
        return (maps - maps.mean((2, 3), keepdim=True)).flatten(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, 3, 64, 64] -> logits [n, classes]."""
        return self.head(self.features(x))


def _load(model: nn.Module, name: str, device: str) -> nn.Module:
    file = FOLDER / f"{name}.safetensors"
    if not file.exists():
        raise FileNotFoundError(
            f"{file} is missing; it is part of the package (python scripts/build_embedded makes it)"
        )
    return load_strict(model, read(file), file).to(device)


def subjects() -> list[str]:
    """The subjects that the embedded model has learnt to draw, as its prompts name them."""
    return json.loads((FOLDER / "subjects.json").read_text())


def load_classifier(device: str) -> Classifier:
    """The embedded classifier on a torch device."""
    return _load(Classifier(len(subjects())), "classifier", device)


class EmbeddedDetector:
    """P(real) by the detector that the demo trains against."""

    def __init__(self, device: str):
        self.model = _load(ConvDetector(), "detector", device)

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return self.model(to_input(images)).sigmoid()


class EmbeddedHeldOut:
    """P(real) by a detector with another architecture, which nothing is trained against."""

    def __init__(self, device: str):
        self.model = _load(PoolDetector(), "held_out", device)

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return self.model(to_input(images)).sigmoid()


class EmbeddedPromptAccuracy:
    """1 if the classifier recognises the photograph that the prompt names, else 0."""

    def __init__(self, device: str):
        self.subjects = subjects()
        self.model = load_classifier(device)

    def label(self, prompt: str) -> int:
        """The class that a prompt names. Raises ValueError unless it names exactly one."""
        labels = [i for i, subject in enumerate(self.subjects) if subject in prompt]
        if len(labels) != 1:
            raise ValueError(
                f"prompt {prompt!r} names {len(labels)} of the embedded subjects; expected one of: "
                f"{', '.join(self.subjects)}"
            )
        return labels[0]

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        labels = torch.tensor([self.label(prompt) for prompt in prompts], device=images.device)
        return (self.model(to_input(images)).argmax(1) == labels).float()
