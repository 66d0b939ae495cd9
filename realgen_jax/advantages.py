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
    """A_k = (r_k - mean of the group) / (std + eps) of each reward k, then sum w_k A_k / sum |w_k|.

    scores: {reward: [groups, size]}, one group per prompt. weights: as for `weight_sum`. std is the
    population standard deviation of the group, or of all samples if `global_std`. A group whose
    spread is only rounding error (below 1e-6 of its magnitude) has advantage zero. Returns float32
    [groups, size]; computed in float64.

    Raises ValueError for scores that are not [groups, size]. Source: Flow-GRPO (arXiv 2505.05470).
    """
    divisor = weight_sum(weights)
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
    return (total / divisor).astype(np.float32)


def weight_sum(weights: Mapping[str, float]) -> float:
    """Return sum |w_k|, by which a weighted sum of rewards is divided.

    A reward with a negative weight is a penalty; it changes the sign of no other reward. Raises
    ValueError if all weights are 0, or one is not finite.
    """
    total = sum(map(abs, weights.values()))
    if not 0 < total < np.inf:
        raise ValueError(
            f"the weights {dict(weights)} add up to {total}; expected finite numbers, not all 0"
        )
    return total


def zero_spread(rewards: np.ndarray) -> np.ndarray:
    """Return bool [groups]: which groups of rewards [groups, size] differ only by rounding."""
    return rewards.std(axis=1) <= 1e-6 * np.abs(rewards).max(axis=1)
