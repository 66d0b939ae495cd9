"""Advantages: how much better a picture is than the other pictures of its prompt.

`ADVANTAGES` holds every way to compute them; `config.train.advantages` names one. docs/rewards.md
says when to use which.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

# Rewards [groups, size] by name, and their weights.
Scores = Mapping[str, np.ndarray]
Weights = Mapping[str, float]

DIVERSITY = "diversity"  # the reward that `gardo` reads, trained on or watched


class AdvantageError(RuntimeError):
    """The scores of an epoch do not suit the way in which advantages are computed."""


@dataclass(frozen=True)
class Settings:
    """What some entries of `ADVANTAGES` need besides scores and weights.

    global_std: divide by the std of all pictures of the epoch instead of the group's.
    tame_above: "mean", "median" or a number as text, for `paco`.
    diversity: float32 [groups, size], for `gardo`.
    """

    global_std: bool = False
    tame_above: str = "mean"
    diversity: np.ndarray | None = None


def trained_weights(config: Any) -> dict[str, float]:
    """Return {reward: weight} of what is trained on: config.reward.fn, and rewards of texts.

    Those are the rewriter's, with weights other than 0.
    """
    weights = dict(config.reward.fn)
    if config.stage == "rewriter":
        weights |= {name: weight for name, weight in config.rewriter.text_rewards.items() if weight}
    return weights


def advantages_of(config: Any, scores: Scores) -> np.ndarray:
    """Return an epoch's advantages by `config.train.advantages`, float32 [groups, size].

    scores: of the rewards that are trained on, and "diversity" if `gardo` needs it. Raises
    AdvantageError for scores on which the choice is not defined.
    """
    weights = trained_weights(config)
    settings = Settings(config.sample.global_std, config.train.tame_above, scores.get(DIVERSITY))
    trained = {name: scores[name] for name in weights}
    return ADVANTAGES[config.train.advantages](trained, weights, settings)


def rewards_read(config: Any) -> list[str]:
    """Return the rewards whose scores `advantages_of` reads."""
    names = list(config.reward.fn)
    if config.train.advantages == "gardo" and DIVERSITY not in names:
        names.append(DIVERSITY)
    return names


def advantage_problems(config: Any) -> list[str]:
    """Return one line for each key that contradicts `config.train.advantages`."""
    name = config.train.advantages
    key = f"config.train.advantages is {name!r}"
    if name not in ADVANTAGES:
        return [f"{key}; choose one of {', '.join(ADVANTAGES)}"]

    problems = []
    if config.sample.global_std and name in WITHOUT_GLOBAL_STD:
        problems.append(
            f"{key}, which never divides by the std of an epoch, but config.sample.global_std is "
            "True; expected False"
        )
    if name == "pareto" and len(config.reward.fn) < 2:
        problems.append(
            f"{key}, which compares several rewards, but config.reward.fn has "
            f"{len(config.reward.fn)}; expected 2 or more"
        )
    if name == "gardo" and DIVERSITY not in [*config.reward.fn, *config.reward.watched]:
        problems.append(
            f"{key}, which needs the diversity of the pictures: add {DIVERSITY!r} to "
            "config.reward.watched"
        )
    if name != "paco" and config.train.tame_above != "mean":
        problems.append(
            f"config.train.tame_above is {config.train.tame_above!r}, which only "
            f"config.train.advantages='paco' reads, and that is {name!r}"
        )
    return problems


# -- Per reward


def group_advantages(
    scores: Scores,
    weights: Weights,
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


def per_reward(scores: Scores, weights: Weights, settings: Settings) -> np.ndarray:
    """`group_advantages`."""
    return group_advantages(scores, weights, global_std=settings.global_std)


def mixgrpo(scores: Scores, weights: Weights, settings: Settings) -> np.ndarray:
    """Sum of w_k (r_k - mean) / (std + 1e-8) with the unbiased std of the group.

    The sum is not divided by the weights. Source: MixGRPO `advantage_aggr` (arXiv 2507.21802).
    """
    return _sum_of_z(scores, weights, lambda std: std + 1e-8, ddof=1).astype(np.float32)


def gdpo(scores: Scores, weights: Weights, settings: Settings) -> np.ndarray:
    """Sum of w_k (r_k - mean) / std of the group, made to mean 0 and std 1 over the epoch.

    Each std is at least 1e-6. Source: GDPO, as in Flow-Factory.
    """
    total = _sum_of_z(scores, weights, lambda std: np.maximum(std, 1e-6), ddof=0)
    return _normalised(total, np.maximum(total.std(), 1e-6))


def gdpo_unbiased(scores: Scores, weights: Weights, settings: Settings) -> np.ndarray:
    """`gdpo` with unbiased stds, to which 1e-8 is added. Source: Pref-GRPO's code."""
    total = _sum_of_z(scores, weights, lambda std: std + 1e-8, ddof=1)
    return _normalised(total, total.std(ddof=1) + 1e-8)


# -- Of the rewards' sum


def weighted_sum(scores: Scores, weights: Weights, settings: Settings) -> np.ndarray:
    """(R - mean of the group) / (std + 1e-4) of R = sum w_k r_k.

    std is that of the group, or of all pictures with `global_std`. Source: DiffusionNFT
    (arXiv 2509.16117), which takes that of all.
    """
    return _z(_checked(scores, weights), weights, settings.global_std)


def paco(scores: Scores, weights: Weights, settings: Settings) -> np.ndarray:
    """`weighted_sum` of rewards that are tamed by a logarithm where they vary too much.

    r_k becomes log(1 + r_k) where h_k = std / (mean + 1e-6) over all pictures is above
    `tame_above`: the mean or the median of all h, or a number. Raises AdvantageError for a reward
    with values of -1 or less, or a mean that is not positive. Source: X-GenGroup/PaCo-RL.
    """
    rewards = _checked(scores, weights)
    for name, values in rewards.items():
        if values.min() <= -1 or values.mean() <= 0:
            raise AdvantageError(
                f"config.train.advantages is 'paco', but the scores of {name!r} go down to "
                f"{values.min():.3g} with mean {values.mean():.3g}; expected values above -1 and a "
                "positive mean"
            )
    tamed = {}
    for name, is_wild in zip(rewards, tamed_rewards(rewards, settings.tame_above), strict=True):
        tamed[name] = np.log1p(rewards[name]) if is_wild else rewards[name]
    return _z(tamed, weights, settings.global_std)


def tamed_rewards(rewards: Scores, above: str) -> np.ndarray:
    """Return which rewards `paco` tames: bool [rewards]. above: its `tame_above`."""
    variation = []
    for values in rewards.values():
        values = np.asarray(values, np.float64)
        variation.append(values.std() / (values.mean() + 1e-6))
    if above == "mean":
        limit = np.mean(variation)
    elif above == "median":
        limit = np.median(variation)
    else:
        limit = float(above)
    return np.array(variation) > limit


def dr_grpo(scores: Scores, weights: Weights, settings: Settings) -> np.ndarray:
    """R - mean of the group, of the weighted mean R of the rewards; not divided by a std.

    Groups with a small spread then count less. Source: Dr. GRPO (arXiv 2503.20783), without its
    length term.
    """
    return _deviation(_weighted_mean(scores, weights)).astype(np.float32)


def gardo(scores: Scores, weights: Weights, settings: Settings) -> np.ndarray:
    """`dr_grpo`, where what is not below the group's mean is multiplied by its diversity.

    The diversity of a picture is its smallest distance to another one of the group, divided by the
    group's mean of that. Raises AdvantageError without it. Source: GARDO's code
    (tinnerhrhe/GARDO); the paper does not divide.
    """
    if settings.diversity is None:
        raise AdvantageError("config.train.advantages is 'gardo', which needs the diversity")
    deviation = _deviation(_weighted_mean(scores, weights))
    distance = np.asarray(settings.diversity, np.float64)
    relative = distance / np.maximum(distance.mean(axis=1, keepdims=True), 1e-12)
    return np.where(deviation < 0, deviation, deviation * relative).astype(np.float32)


# -- By comparison


def pareto(scores: Scores, weights: Weights, settings: Settings) -> np.ndarray:
    """size / kept times sum w_k r_k / sum |w_k|, of pictures that no other of the group dominates.

    The others have advantage 0. There is no baseline, so the scale and the sign of the
    rewards matter. A reward with a negative weight is better when it is smaller. Source: Parrot
    (arXiv 2401.05675), equation 4.
    """
    rewards = _checked(scores, weights)
    signed = [np.sign(weights[name]) * values for name, values in rewards.items()]
    keep = not_dominated(np.stack(signed, axis=-1))
    share = keep / keep.mean(axis=1, keepdims=True)
    return (share * _weighted_mean(scores, weights)).astype(np.float32)


def not_dominated(rewards: np.ndarray) -> np.ndarray:
    """Return which pictures no other one of their group dominates: bool [groups, size].

    rewards: [groups, size, rewards], larger is better. One picture dominates another if it is at
    least as good in every reward and better in one; so equal ones do not.
    """
    first = rewards[:, :, None]
    second = rewards[:, None, :]
    dominates = (first >= second).all(axis=-1) & (first > second).any(axis=-1)
    return ~dominates.any(axis=1)


# -- The table: (scores, weights, settings) -> float32 [groups, size]

ADVANTAGES = {
    "per_reward": per_reward,
    "weighted_sum": weighted_sum,
    "dr_grpo": dr_grpo,
    "mixgrpo": mixgrpo,
    "gdpo": gdpo,
    "gdpo_unbiased": gdpo_unbiased,
    "paco": paco,
    "pareto": pareto,
    "gardo": gardo,
}

WITHOUT_GLOBAL_STD = ("dr_grpo", "mixgrpo", "gdpo", "gdpo_unbiased", "pareto", "gardo")

# Those for which the scale of a reward does not change its part in the sum.
SCALE_FREE = ("per_reward", "mixgrpo", "gdpo", "gdpo_unbiased")


# -- Parts


def _checked(scores: Scores, weights: Weights) -> dict[str, np.ndarray]:
    """The weighted rewards as float64 [groups, size]. Raises ValueError for other shapes."""
    shape = next(iter(scores.values())).shape
    rewards = {}
    for name in weights:
        rewards[name] = np.asarray(scores[name], np.float64)
        if rewards[name].ndim != 2 or rewards[name].shape != shape:
            raise ValueError(
                f"the scores of {name!r} have shape {rewards[name].shape}; expected [groups, size]"
            )
    weight_sum(weights)
    return rewards


def _deviation(rewards: np.ndarray) -> np.ndarray:
    """r - mean of the group [groups, size]; 0 in a group that differs only by rounding."""
    deviation = rewards - rewards.mean(axis=1, keepdims=True)
    return np.where(zero_spread(rewards)[:, None], 0.0, deviation)


def _z(rewards: Scores, weights: Weights, global_std: bool) -> np.ndarray:
    """(R - mean of the group) / (std + 1e-4) of R = sum w_k r_k."""
    total = sum(weight * rewards[name] for name, weight in weights.items())
    std = total.std() if global_std else total.std(axis=1, keepdims=True)
    return (_deviation(total) / (std + 1e-4)).astype(np.float32)


def _sum_of_z(scores: Scores, weights: Weights, divisor: Callable, ddof: int) -> np.ndarray:
    """Sum of w_k (r_k - mean) / divisor(std of the group)."""
    rewards = _checked(scores, weights)
    total = 0.0
    for name, weight in weights.items():
        std = rewards[name].std(axis=1, ddof=ddof, keepdims=True)
        total = total + weight * _deviation(rewards[name]) / divisor(std)
    return total


def _normalised(total: np.ndarray, std: float) -> np.ndarray:
    return ((total - total.mean()) / std).astype(np.float32)


def _weighted_mean(scores: Scores, weights: Weights) -> np.ndarray:
    """Sum of w_k r_k / sum |w_k|, float64 [groups, size]."""
    rewards = _checked(scores, weights)
    total = sum(weight * rewards[name] for name, weight in weights.items())
    return total / weight_sum(weights)


def weight_sum(weights: Weights) -> float:
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
