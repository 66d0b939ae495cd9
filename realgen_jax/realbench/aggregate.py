"""From scores of pictures to a leaderboard: means as RealBench takes them, with bootstrap intervals over prompts."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from ml_collections import ConfigDict

from realgen_jax.realbench.results import Evaluated

ALL = "all"  # the sets together
MEAN, SHARE = "mean", "share above 0.5"
BLOCK = 1 << 22  # numbers of a block of resamples: 32 MB


@dataclass(frozen=True)
class Row:
    """One number of the leaderboard, how sure it is, and how far it lies from the first entry's.

    nan: there is no such number (no pictures, fewer than two prompts, the first entry's difference from itself).
    """

    entry: str
    set: str  # ALL: every set
    category: str  # "": every category
    measure: str  # a reward
    kind: str  # MEAN, SHARE
    value: float  # over pictures
    low: float
    high: float
    pictures: int
    prompts: int
    difference: float  # over prompts, those that both entries have pictures of
    difference_low: float
    difference_high: float


def leaderboard(evaluated: Evaluated, settings: ConfigDict, rng: np.random.Generator) -> list[Row]:
    """Rows by set, category, measure and entry. settings: config.evaluate.

    Values are means over the pictures that exist (RealBench). Prompts are drawn for the intervals, not pictures: copies
    of a prompt, and its short and long variants, stay together. A row does not depend on which others there are.
    """
    measures = [(name, MEAN) for name in evaluated.rewards]
    measures = [
        one for m in measures for one in ([m, (m[0], SHARE)] if m[0] in settings.detectors else [m])
    ]
    scores = np.array(
        [
            [p.scores[name] if kind == MEAN else p.scores[name] > 0.5 for name, kind in measures]
            for p in evaluated.pictures
        ],
        np.float64,
    ).reshape(-1, len(measures))
    lines = max((len(one.prompts) for one in evaluated.sets), default=0)
    index = {one.name: i for i, one in enumerate(evaluated.sets)}
    entry = np.array([p.entry for p in evaluated.pictures])
    unit = np.array(
        [index[p.set] * lines + p.line for p in evaluated.pictures], np.int64
    )  # a prompt of a set
    sums, counts = {}, {}
    for one in evaluated.entries:
        own, size = entry == one.name, len(index) * lines
        counts[one.name] = np.bincount(unit[own], minlength=size)
        columns = [np.bincount(unit[own], scores[own, m], size) for m in range(len(measures))]
        sums[one.name] = np.stack(columns, axis=1)
    seed = int(rng.integers(1 << 62))
    first, rows = evaluated.entries[0].name, []
    for name, category, inside in _slices(evaluated, lines):
        found = {}
        for one in counts:
            count, total = counts[one] * inside, sums[one] * inside[:, None]
            value = _estimate(total, count, lines, settings, seed)
            both = (count > 0) & (counts[first] > 0)
            gap = total[both] / count[both, None] - sums[first][both] / counts[first][both, None]
            spread = np.zeros_like(total)
            spread[both] = gap
            difference = _estimate(spread, both.astype(np.int64), lines, settings, seed)
            found[one] = (
                value,
                difference if one != first else np.full_like(difference, np.nan),
                count,
            )
        for m, (measure, kind) in enumerate(measures):
            for one, (value, difference, count) in found.items():
                numbers = [float(v) for v in value[:, m]], [float(v) for v in difference[:, m]]
                sizes = int(count.sum()), int((count > 0).sum())
                rows.append(
                    Row(one, name, category, measure, kind, *numbers[0], *sizes, *numbers[1])
                )
    return rows


def _slices(evaluated: Evaluated, lines: int) -> Iterator[tuple[str, str, np.ndarray]]:
    """(set, category, which units belong to it: bool [sets x lines]), overall before categories."""
    names = [one.name for one in evaluated.sets]
    category = np.full((len(names), lines), "", object)
    for i, one in enumerate(evaluated.sets):
        category[i, : len(one.prompts)] = list(one.categories)
    categories = ["", *sorted({c for one in evaluated.sets for c in one.categories if c})]
    for name in [*names, ALL] if len(names) > 1 else names:
        inside = np.array([name in (ALL, other) for other in names])[:, None]
        for one in categories:
            yield name, one, (inside & ((category == one) | (one == ""))).ravel()


def _estimate(
    sums: np.ndarray, counts: np.ndarray, lines: int, settings: ConfigDict, seed: int
) -> np.ndarray:
    """[3, measures]: sum / count and its percentile interval. sums [units, measures], counts [units]; what is drawn is
    a line with all its units. Lines without any are left out, so that no resample is empty.
    """
    sums = sums.reshape(-1, lines, sums.shape[-1]).sum(axis=0)
    counts = counts.reshape(-1, lines).sum(axis=0)
    sums, counts = sums[counts > 0], counts[counts > 0]
    n = len(counts)
    found = np.full((3, sums.shape[1]), np.nan)
    if n == 0:
        return found
    found[0] = sums.sum(axis=0) / counts.sum()
    if n < 2 or settings.resamples < 1:
        return found
    rng = np.random.default_rng((seed, n))  # as many lines, the same resamples
    columns, means = np.column_stack([sums, counts]), []
    block = max(1, BLOCK // n)
    for start in range(0, settings.resamples, block):
        size = min(block, settings.resamples - start)
        drawn = rng.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
        totals = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n) @ columns
        means.append(totals[:, :-1] / totals[:, -1:])
    tail = 50 * (1 - settings.confidence)
    found[1:] = np.percentile(np.concatenate(means), [tail, 100 - tail], axis=0)
    return found
