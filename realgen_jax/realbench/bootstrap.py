"""Percentile bootstrap of ratios of sums, for the leaderboard and the arena.

A resample is represented by how often each unit (a prompt) is drawn: counts [resamples, units].
"""

from collections.abc import Iterable, Iterator

import numpy as np

BLOCK = 1 << 22  # numbers in a block of resamples: 32 MB


def draw(units: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Return float64 [resamples, units]: how often each unit is in each resample."""
    return rng.multinomial(units, [1 / units] * units, resamples).astype(float)


def draw_in_blocks(units: int, resamples: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Like `draw`, but in blocks of bounded size, int64 [resamples of the block, units].

    This uses the generator differently from `draw`, so the two do not give the same resamples.
    """
    block = max(1, BLOCK // units)
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        drawn = rng.integers(units, size=(size, units)) + units * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * units).reshape(size, units)


def ratio_intervals(
    draws: Iterable[np.ndarray], sums: np.ndarray, counts: np.ndarray, confidence: float
) -> np.ndarray:
    """Return float64 [2, m]: the intervals of sums.sum(0) / counts.sum() over the resamples.

    Arguments as of `resampled_ratios`. Resamples without any count are left out.
    """
    return percentile_interval(resampled_ratios(draws, sums, counts), confidence)


def resampled_ratios(
    draws: Iterable[np.ndarray], sums: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """Return float64 [resamples, m]: sums.sum(0) / counts.sum() of each resample.

    draws: blocks of counts [resamples, units]; sums [units, m]; counts [units]. nan for a resample
    without any count.
    """
    columns = np.column_stack([sums, counts])
    ratios = []
    for block in draws:
        totals = block @ columns
        with np.errstate(invalid="ignore"):
            ratios.append(totals[:, :-1] / totals[:, -1:])
    return np.concatenate(ratios)


def percentile_interval(values: np.ndarray, confidence: float) -> np.ndarray:
    """Return [2, ...]: the ends of the central `confidence` of values [resamples, ...].

    nan where every resample has nan, or if there are no resamples.
    """
    if not len(values):
        return np.full((2, *values.shape[1:]), np.nan)
    tail = 50 * (1 - confidence)
    undefined = np.isnan(values).all(axis=0)
    ends = np.nanpercentile(np.where(undefined, 0.0, values), [tail, 100 - tail], axis=0)
    return np.where(undefined, np.nan, ends)
