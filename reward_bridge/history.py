"""Pairs of real and generated pictures that a reward learns from, and a history of earlier ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Pairs:
    """Real and generated pictures of the same n prompts."""

    real: np.ndarray  # uint8 [n, 3, s, s]
    generated: np.ndarray  # uint8 [n, 3, s, s]
    prompts: list[str]


class History:
    """Up to `size` pairs from earlier epochs, in host memory.

    Once it is full, a new pair replaces a random old one. `pairs` holds tuples (real, generated,
    prompt), the pictures as uint8 [3, s, s].
    """

    def __init__(self, size: int):
        self.size = size
        self.pairs: list[tuple[np.ndarray, np.ndarray, str]] = []

    def add(self, real: np.ndarray, generated: np.ndarray, prompts: Sequence[str]) -> None:
        """Add n pairs, uint8 [n, 3, s, s] each. Draws from torch's global generator."""
        for pair in zip(real, generated, prompts, strict=True):
            if len(self.pairs) < self.size:
                self.pairs.append(pair)
            elif self.size:
                self.pairs[int(torch.randint(self.size, ()))] = pair

    def draw(self, count: int) -> tuple[list[np.ndarray], list[np.ndarray], list[str]]:
        """Draw `count` pairs with replacement, or none while the history is empty."""
        if not self.pairs:
            return [], [], []
        rows = torch.randint(len(self.pairs), (count,)).tolist()
        pairs = [self.pairs[row] for row in rows]
        real = [pair[0] for pair in pairs]
        generated = [pair[1] for pair in pairs]
        prompts = [pair[2] for pair in pairs]
        return real, generated, prompts
