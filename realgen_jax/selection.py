"""Which of many cheap previews of a prompt are worth a full rollout (scout and select).

Scores are those of the previews, [..., n]; the last axis is one prompt's. Both functions return
int64 [..., keep], indices on that axis. Source: NVlabs/Sana, `train_scripts/sol_rl`.
"""

import numpy as np


def best_worst(scores: np.ndarray, keep: int) -> np.ndarray:
    """Return the best keep // 2, best first, then the worst of the rest, worst first.

    Raises ValueError unless 1 <= keep <= n.
    """
    _check(scores, keep)
    best = keep // 2
    order = np.argsort(scores, axis=-1, kind="stable")
    first = np.flip(order, axis=-1)[..., :best]
    return np.concatenate([first, order[..., : keep - best]], axis=-1)


def mean_deviation(scores: np.ndarray, keep: int) -> np.ndarray:
    """Return the `keep` scores that are farthest from the mean, the farthest first.

    Raises ValueError unless 1 <= keep <= n.
    """
    _check(scores, keep)
    scores = np.asarray(scores, np.float64)
    distance = np.abs(scores - scores.mean(axis=-1, keepdims=True))
    return np.argsort(-distance, axis=-1, kind="stable")[..., :keep]


SELECTIONS = {"best_worst": best_worst, "mean_deviation": mean_deviation}


def _check(scores: np.ndarray, keep: int) -> None:
    count = scores.shape[-1]
    if not 1 <= keep <= count:
        raise ValueError(f"keep is {keep} of {count} previews; expected 1 to {count}")
