"""The embedded model's detector, learning on."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from reward_bridge.learners.augment import mirror_and_shift
from reward_bridge.preprocess import resize
from reward_bridge.rewards.embedded import SIZE, ConvDetector, EmbeddedDetector, to_input


class EmbeddedLearner:
    """P(real), trained by binary cross entropy against 1 - `smoothing` and `smoothing`; all weights learn.

    `init`: "shipped", the weights of the frozen reward, or "fresh", drawn from `seed`. In training each picture is
    mirrored or not, and shifted by up to `shift` pixels.
    """

    def __init__(
        self,
        device: str,
        init: str = "shipped",
        seed: int = 0,
        smoothing: float = 0.05,
        shift: int = 2,
    ):
        if init not in ("shipped", "fresh"):
            raise ValueError(f"got embedded_detector.init {init!r}; expected 'shipped' or 'fresh'")
        if not 0 <= smoothing < 0.5 or not 0 <= shift < SIZE:
            raise ValueError(
                f"got embedded_detector's smoothing {smoothing} and shift {shift}; expected 0 to below 0.5, and 0 to "
                f"{SIZE - 1}"
            )
        self.smoothing, self.shift = smoothing, shift
        if init == "shipped":
            self.model = EmbeddedDetector(device).model.requires_grad_(True)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.model = ConvDetector().to(device).eval()

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        return resize(images, (SIZE, SIZE), "bilinear")

    def score(self, model: nn.Module, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return model(to_input(images)).sigmoid()

    def loss(
        self, model: nn.Module, real: torch.Tensor, generated: torch.Tensor, prompts: Sequence[str]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        images = mirror_and_shift(torch.cat([real, generated]), self.shift)
        logits = model(to_input(images)).chunk(2)
        targets = (1 - self.smoothing, self.smoothing)
        real_loss, generated_loss = (
            F.binary_cross_entropy_with_logits(x, torch.full_like(x, t))
            for x, t in zip(logits, targets, strict=True)
        )
        accuracy = ((logits[0] > 0).float().mean() + (logits[1] < 0).float().mean()) / 2
        metrics = {
            "accuracy": accuracy,
            "real_loss": real_loss.detach(),
            "generated_loss": generated_loss.detach(),
        }
        return (real_loss + generated_loss) / 2, metrics
