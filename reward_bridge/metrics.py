"""Metrics of a whole set of pictures. (A reward scores each picture on its own.)"""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.numpy import load_file

from reward_bridge.rewards.embedded import FOLDER, load_classifier, to_input


class Metric(Protocol):
    """A metric; lower is better."""

    least: int  # the smallest number of pictures for which it is defined

    def __call__(self, images: np.ndarray) -> float:
        """Return its value for pictures, uint8 [n, 3, h, w]."""


def frechet_distance(
    mean: np.ndarray, cov: np.ndarray, mean_ref: np.ndarray, cov_ref: np.ndarray
) -> float:
    """Fréchet distance of two Gaussians, means [d] and covariances [d, d] (FID, arXiv 1706.08500).

    |m - m_r|^2 + tr(C + C_r - 2 (C C_r)^(1/2)). The eigenvalues of C C_r are those of a positive
    semi-definite matrix, so negative ones are rounding errors and count as zero.
    """
    roots = np.sqrt(np.clip(np.linalg.eigvals(cov @ cov_ref).real, 0, None))
    return float(
        np.sum((mean - mean_ref) ** 2) + np.trace(cov) + np.trace(cov_ref) - 2 * roots.sum()
    )


def statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [d] and covariance [d, d] of features [n, d], in float64."""
    features = features.astype(np.float64)
    return features.mean(0), np.cov(features, rowvar=False)


class EmbeddedFrechet:
    """Fréchet distance to 2,048 fresh crops of the training squares, in the classifier's features.

    Lower is better.
    """

    REAL = "real_features"
    least = 2  # for a covariance

    def __init__(self, device: str):
        reference = load_file(FOLDER / f"{self.REAL}.safetensors")
        self.mean = reference["mean"]
        self.cov = reference["cov"]
        self.model = load_classifier(device)
        self.device = device

    def features(self, images: np.ndarray) -> np.ndarray:
        """uint8 [n, 3, h, w] -> float32 [n, 64]."""
        with torch.inference_mode():
            pixels = to_input(torch.from_numpy(images).to(self.device))
            return self.model.features(pixels).cpu().numpy()

    def __call__(self, images: np.ndarray) -> float:
        mean, cov = statistics(self.features(images))
        return frechet_distance(mean, cov, self.mean, self.cov)


class EmbeddedFrechetHeldOut(EmbeddedFrechet):
    """Fréchet distance to crops of the held-out squares, on which nothing was ever trained."""

    REAL = "held_out_features"


class EmbeddedSharpness:
    """Mean difference between neighbouring pixels, as a fraction of 255."""

    least = 1

    def __init__(self, device: str):
        pass

    def __call__(self, images: np.ndarray) -> float:
        x = images.astype(np.float32) / 255
        vertical = np.abs(np.diff(x, axis=2)).mean()
        horizontal = np.abs(np.diff(x, axis=3)).mean()
        return float((vertical + horizontal) / 2)


METRICS = {
    "embedded_frechet": EmbeddedFrechet,
    "embedded_frechet_held_out": EmbeddedFrechetHeldOut,
    "embedded_sharpness": EmbeddedSharpness,
}


def make_metric(name: str, device: str, options: Mapping[str, Any]) -> Metric:
    """Build a metric on a torch device. Raises ValueError for a name that is not in METRICS."""
    if name not in METRICS:
        raise ValueError(f"there is no metric {name!r}; choose from {', '.join(sorted(METRICS))}")
    return METRICS[name](device=device, **options)
