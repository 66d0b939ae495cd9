"""BRISQUE, quality without a reference from the statistics of brightness (Mittal et al., 2012).

The published support vector machine was trained on features of the authors' release. The steps here
are that release's: grey values of 0 to 255, zeros around the picture, a grid of shapes.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.special import gamma
from torch.nn import functional as F

from reward_bridge.weights import find

SIDE = 7  # of the Gaussian window, in pixels
SIGMA = 7 / 6
GREY = (0.2989, 0.5870, 0.1140)
NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))  # rows and columns away

# Shapes of the generalised Gaussian, and the ratio mean(|x|)^2 / mean(x^2) of each.
SHAPES = np.arange(0.2, 10.0005, 0.001)
RATIOS = gamma(2 / SHAPES) ** 2 / (gamma(1 / SHAPES) * gamma(3 / SHAPES))

# The features' ranges over LIVE, to which the machine's inputs are scaled: the release's allrange.
LOWEST = (
    *(0.336999, 0.019667, 0.23, -0.125959, 0.000167, 0.000616, 0.231, -0.125873, 0.000165),
    *(0.0006, 0.241, -0.128814, 0.000179, 0.000386, 0.243, -0.13308, 0.000182, 0.000421),
    *(0.436998, 0.016929, 0.247, -0.200231, 0.000104, 0.000834, 0.257, -0.200017, 0.000112),
    *(0.000876, 0.257, -0.155072, 0.000112, 0.000356, 0.258, -0.154374, 0.000117, 0.000351),
)
HIGHEST = (
    *(9.999411, 0.807472, 1.644021, 0.202917, 0.712384, 0.468672, 1.644021, 0.169548, 0.713132),
    *(0.467896, 1.553016, 0.101368, 0.687324, 0.533087, 1.554016, 0.101, 0.689177, 0.533133),
    *(3.639918, 0.800955, 1.096995, 0.175286, 0.755547, 0.39927, 1.095995, 0.155928, 0.751488),
    *(0.402398, 1.041992, 0.093209, 0.623516, 0.532925, 1.042992, 0.093714, 0.621958, 0.534484),
)


class Brisque:
    """Minus BRISQUE: 0 for a natural, undistorted picture, -100 for a badly distorted one.

    A check to hold out: it sees blur, noise and compression, and no content. The prompt is not
    used. A picture of one colour has no statistics, which is an error.

    path: the release's `allmodel` (the package brisque has it as models/svm.txt), or its folder.
    """

    can_be_negative = True

    def __init__(self, device: str, path: str):
        file = find(path, "brisque.path", "allmodel", "svm.txt")
        self.machine = SupportVectors(file)

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        weights = torch.tensor(GREY, dtype=torch.float64, device=images.device)
        grey = torch.einsum("nchw,c->nhw", images.double(), weights).round()
        half = F.interpolate(grey[:, None], scale_factor=0.5, mode="bicubic", antialias=True)[:, 0]
        scores = []
        for picture, small in zip(grey, half, strict=True):
            features = np.concatenate([scale_features(picture), scale_features(small)])
            scores.append(-self.machine(features))
        return torch.tensor(scores, dtype=torch.float32)


class SupportVectors:
    """A support vector regression with a Gaussian kernel, from a file of LIBSVM."""

    def __init__(self, file: Path):
        """Raises ValueError for another kind of file."""
        try:
            header, _, rows = file.read_text().partition("\nSV\n")
            values = dict(line.split(maxsplit=1) for line in header.splitlines())
            kind = values["svm_type"], values["kernel_type"]
            if kind != ("epsilon_svr", "rbf"):
                raise ValueError(f"a machine of the kind {kind}")
            self.gamma = float(values["gamma"])
            self.offset = float(values["rho"])
            lines = [line.split() for line in rows.splitlines()]
            self.weights = np.array([float(line[0]) for line in lines])
            self.vectors = np.zeros((len(lines), len(LOWEST)))
            for row, line in enumerate(lines):
                for entry in line[1:]:
                    index, _, value = entry.partition(":")
                    self.vectors[row, int(index) - 1] = float(value)
            if len(lines) != int(values["total_sv"]):
                raise ValueError(f"{len(lines)} support vectors instead of {values['total_sv']}")
        except (ValueError, LookupError) as error:
            raise ValueError(
                f"{file} is not BRISQUE's model ({type(error).__name__}: {error}); expected a file "
                "of LIBSVM, epsilon_svr with kernel rbf on 36 features: set "
                "config.reward.options.brisque.path"
            ) from error

    def __call__(self, features: np.ndarray) -> float:
        """BRISQUE of 36 features."""
        lowest = np.array(LOWEST)
        scaled = 2 * (features - lowest) / (np.array(HIGHEST) - lowest) - 1
        distance = ((self.vectors - scaled) ** 2).sum(axis=1)
        return float(self.weights @ np.exp(-self.gamma * distance) - self.offset)


def scale_features(grey: torch.Tensor) -> np.ndarray:
    """The 18 features of one scale of a picture, grey [h, w] in 0..255.

    Raises ValueError for a picture of one colour.
    """
    # Brightness relative to the neighbourhood's, in units of the neighbourhood's deviation.
    mean = _blur(grey)
    deviation = (_blur(grey**2) - mean**2).abs().sqrt()
    x = (grey - mean) / (deviation + 1)

    # Its distribution, and those of products of neighbours.
    shape, left, right = fit(x)
    features = [shape, (left**2 + right**2) / 2]
    for rows, columns in NEIGHBOURS:
        shifted = x.roll((rows, columns), (0, 1))
        shape, left, right = fit(x * shifted)
        spread = (right - left) * np.sqrt(gamma(1 / shape) / gamma(3 / shape))
        features += [
            shape,
            spread * gamma(2 / shape) / gamma(1 / shape),
            left**2,
            right**2,
        ]
    return np.array(features)


def fit(x: torch.Tensor) -> tuple[float, float, float]:
    """Fit an asymmetric generalised Gaussian: shape, deviation below 0 and above.

    By moments, and the nearest shape of the grid (Lasmar et al., 2009).
    """
    below, above = x[x < 0], x[x > 0]
    if len(below) == 0 or len(above) == 0:
        raise ValueError("brisque cannot score a picture of one colour: it has no statistics")
    left = below.square().mean().sqrt().item()
    right = above.square().mean().sqrt().item()
    skew = left / right
    ratio = (x.abs().mean() ** 2 / x.square().mean()).item()
    ratio *= (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2
    return float(SHAPES[np.abs(RATIOS - ratio).argmin()]), left, right


def _blur(x: torch.Tensor) -> torch.Tensor:
    """The Gaussian window's weighted mean at every pixel of [h, w], with zeros outside."""
    offsets = torch.arange(SIDE, dtype=x.dtype, device=x.device) - SIDE // 2
    window = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    window = window / window.sum()
    kernel = torch.outer(window, window)[None, None]
    return F.conv2d(x[None, None], kernel, padding=SIDE // 2)[0, 0]
