"""Advantages: how much better a picture is than the other pictures of its prompt."""

from collections.abc import Mapping

import numpy as np


def group_advantages(
    scores: Mapping[str, np.ndarray],
    weights: Mapping[str, float],
    *,
    global_std: bool,
    eps: float = 1e-4,
) -> np.ndarray:
    """A_k = (r_k - mean of the group) / (std + eps) for each reward k, then sum w_k A_k / sum w_k.

    scores: {reward: [groups, size]}, one group per prompt. std is the population standard deviation
    of the group, or of all samples if `global_std`. A group whose spread is only rounding error
    (below 1e-6 of its magnitude) has advantage zero. Returns float32 [groups, size]; computed in
    float64.

    Raises ValueError for scores that are not [groups, size]. Source: Flow-GRPO (arXiv 2505.05470).
    """
    shape = next(iter(scores.values())).shape
    total = np.zeros(shape)
    for name, weight in weights.items():
        rewards = np.asarray(scores[name], np.float64)
        if rewards.ndim != 2 or rewards.shape != shape:
            raise ValueError(
                f"the scores of {name!r} have shape {rewards.shape}; expected [groups, size]"
            )
        deviation = rewards - rewards.mean(axis=1, keepdims=True)
        std = rewards.std() if global_std else rewards.std(axis=1, keepdims=True)
        deviation = np.where(zero_spread(rewards)[:, None], 0.0, deviation)
        total += weight * deviation / np.maximum(std + eps, 1e-30)
    return (total / sum(weights.values())).astype(np.float32)


def zero_spread(rewards: np.ndarray) -> np.ndarray:
    """Return bool [groups]: which groups of rewards [groups, size] differ only by rounding."""
    return rewards.std(axis=1) <= 1e-6 * np.abs(rewards).max(axis=1)
