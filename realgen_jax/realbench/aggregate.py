"""The leaderboard: RealBench's means of picture scores, with intervals over prompts."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from ml_collections import ConfigDict

from realgen_jax.realbench.bootstrap import (
    draw_in_blocks,
    percentile_interval,
    ratio_intervals,
    resampled_ratios,
)
from realgen_jax.realbench.results import Results

ALL = "all"  # all sets together
MEAN = "mean"
SHARE = "share above 0.5"
CATEGORIES = "mean over categories"
Measure = tuple[str, str]  # reward; MEAN or SHARE


@dataclass(frozen=True)
class Row:
    """One number of the leaderboard, its interval, and its difference from the first entry.

    nan means that the number is undefined (no pictures, fewer than two prompts, or the first entry
    compared with itself).
    """

    entry: str
    set: str  # ALL: every set
    category: str  # "": every category
    measure: str  # a reward
    kind: str  # MEAN, SHARE, CATEGORIES
    value: float  # over pictures
    low: float
    high: float
    pictures: int
    prompts: int
    difference: float  # over the prompts for which both entries have pictures
    difference_low: float
    difference_high: float


@dataclass(frozen=True)
class _Table:
    """An entry's scores, summed by unit. A unit is a line of a set: set * lines + line."""

    sums: np.ndarray  # float64 [units, measures]
    counts: np.ndarray  # int64 [units]

    def only(self, units: np.ndarray) -> "_Table":
        """Keep only these units, bool [units]; the others become empty."""
        return _Table(self.sums * units[:, None], self.counts * units)


def leaderboard(results: Results, settings: ConfigDict, rng: np.random.Generator) -> list[Row]:
    """Return the rows, ordered by set, category, measure and entry. settings: config.evaluate.

    Values are means over the pictures that exist, as in RealBench. Intervals resample prompts, not
    pictures: all copies of a prompt and its short and long variants stay together. Apart from the
    first entry, a row does not depend on other entries.

    With settings.category_mean, there are rows of the kind CATEGORIES too: the mean of the
    categories' means.
    """
    measures = _measures(results, settings)
    lines = max((len(prompt_set.prompts) for prompt_set in results.sets), default=0)
    tables = _tables(results, measures, lines)
    first = results.entries[0].name
    seed = int(rng.integers(1 << 62))

    rows = []
    for set_name, category, units in _slices(results, lines):
        # -- Each entry's numbers on this slice, and its differences from the first entry.
        reference = tables[first].only(units)
        numbers = {}
        for entry, whole in tables.items():
            table = whole.only(units)
            values = _estimate(table, lines, settings, seed)
            differences = np.full_like(values, np.nan)
            if entry != first:
                differences = _estimate(_gaps(table, reference), lines, settings, seed)
            numbers[entry] = (table, values, differences)
        rows += _rows(set_name, category, measures, numbers)

        # -- The same, with each category counted alike.
        if settings.category_mean and not category:
            parts = _categories_of(results, set_name, lines)
            by_category = [(name, CATEGORIES) for name, kind in measures if kind == MEAN]
            kept = [m for m, (_, kind) in enumerate(measures) if kind == MEAN]
            numbers = {}
            for entry, whole in tables.items():
                values = _balanced(whole, parts, lines, settings, seed)[:, kept]
                differences = np.full_like(values, np.nan)
                if entry != first:
                    gaps = _gaps(whole, tables[first])
                    differences = _balanced(gaps, parts, lines, settings, seed)[:, kept]
                numbers[entry] = (whole.only(units), values, differences)
            rows += _rows(set_name, category, by_category, numbers)
    return rows


def _rows(
    set_name: str,
    category: str,
    measures: list[Measure],
    numbers: dict[str, tuple[_Table, np.ndarray, np.ndarray]],
) -> list[Row]:
    """One row for each measure and entry.

    numbers: {entry: (table, values [3, measures], differences [3, measures])}.
    """
    rows = []
    for m, (measure, kind) in enumerate(measures):
        for entry, (table, values, differences) in numbers.items():
            value, low, high = values[:, m].tolist()
            difference, difference_low, difference_high = differences[:, m].tolist()
            row = Row(
                entry=entry,
                set=set_name,
                category=category,
                measure=measure,
                kind=kind,
                value=value,
                low=low,
                high=high,
                pictures=int(table.counts.sum()),
                prompts=int((table.counts > 0).sum()),
                difference=difference,
                difference_low=difference_low,
                difference_high=difference_high,
            )
            rows.append(row)
    return rows


def _measures(results: Results, settings: ConfigDict) -> list[Measure]:
    """Each reward's mean; for a detector, also the share of pictures that it classifies as real."""
    measures = []
    for name in results.rewards:
        measures.append((name, MEAN))
        if name in settings.detectors:
            measures.append((name, SHARE))
    return measures


def _tables(results: Results, measures: list[Measure], lines: int) -> dict[str, _Table]:
    """Every entry's sums and counts by unit."""
    set_index = {prompt_set.name: i for i, prompt_set in enumerate(results.sets)}
    units = len(set_index) * lines

    # -- All pictures as arrays: float64 [pictures, measures], and what they belong to.
    scores = np.zeros((len(results.pictures), len(measures)))
    unit = np.zeros(len(results.pictures), np.int64)
    for i, picture in enumerate(results.pictures):
        unit[i] = set_index[picture.set] * lines + picture.line
        for m, (name, kind) in enumerate(measures):
            score = picture.scores[name]
            scores[i, m] = score if kind == MEAN else score > 0.5
    entry = np.array([picture.entry for picture in results.pictures])

    # -- Add them up.
    tables = {}
    for participant in results.entries:
        mine = entry == participant.name
        sums = np.zeros((units, len(measures)))
        for m in range(len(measures)):
            sums[:, m] = np.bincount(unit[mine], scores[mine, m], units)
        tables[participant.name] = _Table(sums, np.bincount(unit[mine], minlength=units))
    return tables


def _gaps(table: _Table, reference: _Table) -> _Table:
    """The differences of means by unit; a unit counts once if both entries have pictures of it."""
    both = (table.counts > 0) & (reference.counts > 0)
    gaps = np.zeros_like(table.sums)
    means = table.sums[both] / table.counts[both, None]
    gaps[both] = means - reference.sums[both] / reference.counts[both, None]
    return _Table(gaps, both.astype(np.int64))


def _slices(results: Results, lines: int) -> Iterator[tuple[str, str, np.ndarray]]:
    """(set, category, its units as bool [sets * lines]); all categories first, then each."""
    names = [prompt_set.name for prompt_set in results.sets]
    category_of = np.full((len(names), lines), "", object)
    for i, prompt_set in enumerate(results.sets):
        category_of[i, : len(prompt_set.prompts)] = list(prompt_set.categories)
    categories = ["", *sorted(set(category_of.ravel()) - {""})]

    set_names = [*names, ALL] if len(names) > 1 else names
    for set_name in set_names:
        in_set = np.array([set_name in (ALL, name) for name in names])[:, None]
        for category in categories:
            in_category = (category_of == category) | (category == "")
            yield set_name, category, (in_set & in_category).ravel()


def _categories_of(results: Results, set_name: str, lines: int) -> list[np.ndarray]:
    """The units of each category of a set, bool [sets * lines]."""
    parts = []
    for name, category, units in _slices(results, lines):
        if name == set_name and category:
            parts.append(units)
    return parts


def _balanced(
    table: _Table, parts: list[np.ndarray], lines: int, settings: ConfigDict, seed: int
) -> np.ndarray:
    """[3, measures]: the means of the parts' means, and both ends of their intervals.

    nan without parts, or if one of them has no pictures. Lines are resampled within each part.
    """
    means = []
    resamples = []
    for number, part in enumerate(parts):
        sums, counts = _by_line(table.only(part), lines)
        if len(counts) == 0:
            means = []
            break
        means.append(sums.sum(axis=0) / counts.sum())
        if len(counts) > 1 and settings.resamples > 0:
            rng = np.random.default_rng((seed, number, len(counts)))
            draws = draw_in_blocks(len(counts), settings.resamples, rng)
            resamples.append(resampled_ratios(draws, sums, counts))

    estimate = np.full((3, table.sums.shape[1]), np.nan)
    if means:
        estimate[0] = np.mean(means, axis=0)
        if len(resamples) == len(means):
            estimate[1:] = percentile_interval(np.mean(resamples, axis=0), settings.confidence)
    return estimate


def _by_line(table: _Table, lines: int) -> tuple[np.ndarray, np.ndarray]:
    """The sums [n, measures] and counts [n] of the n lines that have pictures, over all sets."""
    sums = table.sums.reshape(-1, lines, table.sums.shape[-1]).sum(axis=0)
    counts = table.counts.reshape(-1, lines).sum(axis=0)
    return sums[counts > 0], counts[counts > 0]


def _estimate(table: _Table, lines: int, settings: ConfigDict, seed: int) -> np.ndarray:
    """[3, measures]: the means over pictures and both ends of their intervals.

    Resampling draws lines, each with all its units. Lines without pictures are left out, so that no
    resample is empty.
    """
    sums, counts = _by_line(table, lines)

    estimate = np.full((3, sums.shape[1]), np.nan)
    if len(counts) == 0:
        return estimate
    estimate[0] = sums.sum(axis=0) / counts.sum()
    if len(counts) < 2 or settings.resamples < 1:
        return estimate

    # Use the same resamples for all numbers over the same number of lines.
    rng = np.random.default_rng((seed, len(counts)))
    draws = draw_in_blocks(len(counts), settings.resamples, rng)
    estimate[1:] = ratio_intervals(draws, sums, counts, settings.confidence)
    return estimate
