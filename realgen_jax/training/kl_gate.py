"""Which pictures the KL to the base model holds back: those that only the trained reward likes.

GARDO (tinnerhrhe/GARDO): a picture that the trained reward ranks higher than other rewards do has
probably fooled it. Only the share of these pictures with the largest difference is under the KL.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from realgen_jax.training.scoring import weighted_mean

# The share becomes larger in an epoch whose mean gap is above those of so many epochs before it,
# and smaller in one whose mean gap is below them.
MEMORY = 20
FACTORS = (1.1, 0.9)


@dataclass(frozen=True)
class Gate:
    """What the gate remembers from epoch to epoch.

    share: of the pictures with a gap of at least 0, those that are under the KL. means: the mean
    gaps of the last epochs, the newest one last.
    """

    share: float
    means: tuple[float, ...] = ()

    def after(self, mean: float, least: float, most: float) -> "Gate":
        """Return the gate in an epoch with this mean gap; its share stays in [least, most]."""
        share = self.share
        if self.means and mean > max(self.means):
            share *= FACTORS[0]
        elif self.means and mean < min(self.means):
            share *= FACTORS[1]
        return Gate(float(np.clip(share, least, most)), (*self.means, mean)[-MEMORY:])


def rank_gaps(reward: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return by how many ranks the reward places a picture above what the others do: float64 [n].

    reward: [n]; others: [k, n]; larger is better, and ties share a rank. Over n, it is the
    difference of win rates in GARDO's equation 7. GARDO's code has the opposite sign.
    """
    ranks = stats.rankdata(others, axis=1).mean(axis=0)
    return stats.rankdata(reward) - ranks


def under_kl(gaps: np.ndarray, share: float) -> np.ndarray:
    """Return the pictures above the 1 - share quantile of the gaps of at least 0: bool [n]."""
    return gaps > np.quantile(gaps[gaps >= 0], 1.0 - share)


def gate_epoch(
    config: Any, groups: Mapping[str, np.ndarray], history: dict[str, Any]
) -> tuple[np.ndarray | None, dict[str, float]]:
    """Return the KL's weight of each picture, float32 [groups, group], 0 or 1, and metrics.

    None if config.train.kl_gate compares with nothing. groups: {reward: [groups, group]}. history:
    of the run, which checkpoints hold; the gate's own entry is replaced.
    """
    gate = config.train.kl_gate
    if not gate.against:
        return None, {}

    # How far the rankings differ, over all pictures of the epoch.
    reward = weighted_mean(groups, config.reward.fn)
    others = np.stack([groups[name].ravel() for name in gate.against])
    gaps = rank_gaps(reward.ravel(), others)

    # The share of this epoch.
    saved = history.get("kl_gate")
    before = Gate(saved["share"], tuple(saved["means"])) if saved else Gate(gate.share)
    now = before.after(float(gaps[gaps >= 0].mean()), gate.least, gate.most)
    history["kl_gate"] = {"share": now.share, "means": list(now.means)}

    chosen = under_kl(gaps, now.share).reshape(reward.shape)
    metrics = {"kl_gate/share": now.share, "kl_gate/pictures": float(chosen.mean())}
    return chosen.astype(np.float32), metrics


def gate_problems(config: Any) -> list[str]:
    """Return one line for each key that contradicts config.train.kl_gate."""
    gate = config.train.kl_gate
    if not gate.against:
        return []

    problems = []
    scored = [name for name in config.reward.watched if name not in config.reward.fn]
    for name in gate.against:
        if name not in scored:
            problems.append(
                f"config.train.kl_gate.against has {name!r}, which is not scored in every epoch "
                "beside the trained rewards; expected names in config.reward.watched that are not "
                "in config.reward.fn"
            )
    if config.train.beta == 0:
        problems.append(
            f"config.train.kl_gate.against is {tuple(gate.against)!r}, which chooses the pictures "
            "that the KL is for, but config.train.beta is 0; expected a beta above 0"
        )
    if not gate.least <= gate.share <= gate.most:
        problems.append(
            f"config.train.kl_gate.share is {gate.share}; expected a number from kl_gate.least "
            f"{gate.least} to kl_gate.most {gate.most}"
        )
    return problems
