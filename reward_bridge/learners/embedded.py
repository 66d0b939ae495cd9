"""The embedded model's detector, trained further during the run."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from reward_bridge.learners.augment import mirror_and_shift
from reward_bridge.preprocess import resize
from reward_bridge.rewards.embedded import SIZE, ConvDetector, EmbeddedDetector, to_input


class EmbeddedLearner:
    """P(real), trained by binary cross entropy with targets 1 - `smoothing` and `smoothing`.

    All weights are trained.

    init: "shipped", the weights of the frozen reward, or "fresh", drawn with `seed`.
    shift: in training, pictures are mirrored at random and shifted by up to this many pixels.
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
        if not 0 <= smoothing < 0.5:
            raise ValueError(
                f"got embedded_detector.smoothing {smoothing}; expected at least 0 and less than "
                "0.5"
            )
        if not 0 <= shift < SIZE:
            raise ValueError(
                f"got embedded_detector.shift {shift}; expected 0 to {SIZE - 1} pixels"
            )
        self.smoothing = smoothing
        self.shift = shift
        self.model: nn.Module
        if init == "shipped":
            self.model = EmbeddedDetector(device).model.requires_grad_(True)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.model = ConvDetector().to(device).eval()

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [n, 3, h, w] -> uint8 [n, 3, 64, 64]."""
        return resize(images, (SIZE, SIZE), "bilinear")

    def score(self, model: nn.Module, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """P(real) of uint8 pictures [n, 3, 64, 64]: float32 [n]."""
        return model(to_input(images)).sigmoid()

    def loss(
        self, model: nn.Module, real: torch.Tensor, generated: torch.Tensor, prompts: Sequence[str]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Mean binary cross entropy [] of m pairs, and metrics."""
        images = mirror_and_shift(torch.cat([real, generated]), self.shift)
        real_logits, generated_logits = model(to_input(images)).chunk(2)
        real_loss = _cross_entropy(real_logits, 1 - self.smoothing)
        generated_loss = _cross_entropy(generated_logits, self.smoothing)

        real_right = (real_logits > 0).float().mean()
        generated_right = (generated_logits < 0).float().mean()
        metrics = {
            "accuracy": (real_right + generated_right) / 2,
            "real_loss": real_loss.detach(),
            "generated_loss": generated_loss.detach(),
        }
        return (real_loss + generated_loss) / 2, metrics


def _cross_entropy(logits: torch.Tensor, target: float) -> torch.Tensor:
    """Mean binary cross entropy [] of logits [m] against one target probability."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))
