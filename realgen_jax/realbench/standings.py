"""Aggregate a judge's answers: win rates, ratings and position bias, with intervals."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from realgen_jax.realbench.bootstrap import draw, percentile_interval, ratio_intervals
from realgen_jax.realbench.questions import PROTOCOLS, VERDICTS
from realgen_jax.realbench.results import Judgement

SCORES = {"first": 1.0, "tie": 0.5, "second": 0.0}  # of the picture shown first
PRIOR = 0.5  # prior "tie" answers for every ordered pair of entries, which keep ratings finite
ELO = 400 / np.log(10)  # rating points per unit of log-odds
Interval = tuple[float, float, float]  # value, low, high


@dataclass(frozen=True)
class Match:
    """Entry a against entry b. A pair's score is the mean over its orders, 1 if a won them all."""

    a: str
    b: str
    wins: int  # pairs with a score above 1/2
    losses: int  # pairs with a score below 1/2
    ties: int  # pairs with a score of 1/2, including those where the judge always chose the first
    pairs: int  # wins + losses + ties
    win_rate: float  # mean score; nan without pairs
    low: float
    high: float
    refused: int  # answers, not pairs
    unreadable: int  # answers, not pairs
    incomplete: int  # pairs that lack a verdict in some order; not part of the rate


@dataclass(frozen=True)
class Rating:
    """A Bradley-Terry rating on the Elo scale: 400 points are odds of ten to one, mean 1000."""

    entry: str
    rating: float  # nan for an entry without verdicts
    low: float
    high: float


@dataclass(frozen=True)
class Standings:
    """The aggregated answers of one judge under one protocol."""

    judge: str
    protocol: str
    matches: Sequence[Match]  # of entries that met, in the order of the entries
    ratings: Sequence[Rating]  # of all entries, the best one first
    first_share: Interval  # share of "first" among "first" and "second"; 1/2: no position bias
    counts: Mapping[str, int]  # verdict -> number of answers


class _Lines:
    """The prompts that were judged, and resamples of them."""

    def __init__(self, judgements: Sequence[Judgement], settings: Any, rng: np.random.Generator):
        lines = sorted({judgement.line for judgement in judgements})
        self.row = {line: i for i, line in enumerate(lines)}
        self.confidence = settings.confidence
        self.draws = np.zeros((0, 0))  # float64 [resamples, lines]
        if lines:
            self.draws = draw(len(lines), settings.resamples, rng)

    def __len__(self) -> int:
        return len(self.row)

    def interval(self, sums: np.ndarray, counts: np.ndarray) -> Interval:
        """The interval of a ratio of sums over lines; nan if fewer than two lines count."""
        if not counts.sum():
            return np.nan, np.nan, np.nan
        value = float(sums.sum() / counts.sum())
        if (counts > 0).sum() < 2:
            return value, np.nan, np.nan
        ends = ratio_intervals([self.draws], sums[:, None], counts, self.confidence)
        low, high = ends[:, 0].tolist()
        return value, low, high


def standings(
    judgements: Sequence[Judgement],
    entries: Sequence[str],
    settings: Any,
    rng: np.random.Generator,
    *,
    judge: str,
    protocol: str,
) -> Standings:
    """Add up the answers. settings: config.evaluate with its `confidence` and `resamples`.

    A prompt is resampled with all its judgements, from all sets and pairs. Intervals are percentile
    intervals, or nan if the number is based on fewer than two prompts.
    """
    lines = _Lines(judgements, settings, rng)

    # -- Matches between entries that met.
    orders = 2 if PROTOCOLS[protocol].both_orders else 1
    matches = []
    for i, a in enumerate(entries):
        for b in entries[i + 1 :]:
            met = [
                judgement
                for judgement in judgements
                if {judgement.first, judgement.second} == {a, b}
            ]
            if met:
                matches.append(_match(a, b, met, lines, orders))

    # -- Position bias.
    said_first = np.zeros(len(lines))
    said_either = np.zeros(len(lines))
    for judgement in judgements:
        if judgement.verdict in ("first", "second"):
            said_first[lines.row[judgement.line]] += judgement.verdict == "first"
            said_either[lines.row[judgement.line]] += 1

    # Under `realgen` the photograph is always second, so its strength and a position bias cannot be
    # told apart.
    with_position = protocol != "realgen"
    counts = Counter(judgement.verdict for judgement in judgements)
    return Standings(
        judge=judge,
        protocol=protocol,
        matches=matches,
        ratings=_ratings(judgements, entries, lines, with_position),
        first_share=lines.interval(said_first, said_either),
        counts={verdict: counts[verdict] for verdict in VERDICTS},
    )


def _match(a: str, b: str, judgements: Sequence[Judgement], lines: _Lines, orders: int) -> Match:
    """judgements: of these two entries; orders: how many judgements a pair needs."""
    # -- {(set, line): {entry shown first: a's score}}
    pairs: dict[tuple[str, int], dict[str, float]] = {}
    for judgement in judgements:
        scores = pairs.setdefault((judgement.set, judgement.line), {})
        if judgement.verdict in SCORES:
            score = SCORES[judgement.verdict]
            scores[judgement.first] = score if judgement.first == a else 1 - score

    # -- The mean score of each pair that is complete.
    complete = {}
    for key, scores in pairs.items():
        if len(scores) == orders:
            complete[key] = sum(scores.values()) / orders

    # -- The win rate over them.
    sums = np.zeros(len(lines))
    counts = np.zeros(len(lines))
    for (_, line), score in complete.items():
        sums[lines.row[line]] += score
        counts[lines.row[line]] += 1
    win_rate, low, high = lines.interval(sums, counts)

    verdicts = Counter(judgement.verdict for judgement in judgements)
    return Match(
        a=a,
        b=b,
        wins=sum(score > 0.5 for score in complete.values()),
        losses=sum(score < 0.5 for score in complete.values()),
        ties=sum(score == 0.5 for score in complete.values()),
        pairs=len(complete),
        win_rate=win_rate,
        low=low,
        high=high,
        refused=verdicts["refused"],
        unreadable=verdicts["unreadable"],
        incomplete=len(pairs) - len(complete),
    )


def _ratings(
    judgements: Sequence[Judgement], entries: Sequence[str], lines: _Lines, with_position: bool
) -> list[Rating]:
    """Every entry's rating with its interval, the best one first."""
    answers = [judgement for judgement in judgements if judgement.verdict in SCORES]
    named = {judgement.first for judgement in answers} | {judgement.second for judgement in answers}
    rated = [name for name in entries if name in named]
    columns = {name: i for i, name in enumerate(rated)}
    values, low, high = _rate(answers, columns, lines, with_position)

    ratings = []
    for name in entries:
        if name in columns:
            i = columns[name]
            rating = Rating(name, float(values[i]), float(low[i]), float(high[i]))
        else:
            rating = Rating(name, np.nan, np.nan, np.nan)
        ratings.append(rating)
    return sorted(ratings, key=lambda rating: (np.isnan(rating.rating), -rating.rating))


def _rate(
    answers: Sequence[Judgement], columns: Mapping[str, int], lines: _Lines, with_position: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (ratings, low, high), each [k], of the k entries in `columns`."""
    k = len(columns)
    if k == 0:
        return np.zeros(0), np.zeros(0), np.zeros(0)

    # -- Scores and answers by line, entry shown first, entry shown second.
    score = np.zeros((len(lines), k, k))
    count = np.zeros((len(lines), k, k))
    for judgement in answers:
        cell = lines.row[judgement.line], columns[judgement.first], columns[judgement.second]
        score[cell] += SCORES[judgement.verdict]
        count[cell] += 1

    # -- Ratings of all answers.
    strengths, _ = bradley_terry(score.sum(0)[None], count.sum(0)[None], with_position)
    values = 1000 + ELO * strengths[0]
    if len(lines) < 2 or not len(lines.draws):
        return values, np.full(k, np.nan), np.full(k, np.nan)

    # -- The ratings of every resample.
    score_draws = (lines.draws @ score.reshape(len(lines), -1)).reshape(-1, k, k)
    count_draws = (lines.draws @ count.reshape(len(lines), -1)).reshape(-1, k, k)
    strengths, _ = bradley_terry(score_draws, count_draws, with_position)
    low, high = percentile_interval(1000 + ELO * strengths, lines.confidence)
    return values, low, high


def bradley_terry(
    score: np.ndarray, count: np.ndarray, with_position: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return maximum-likelihood strengths [r, k], with mean 0, and position terms [r], of r tables.

    P(i beats j | i shown first) = 1 / (1 + exp(-(s_i - s_j + gamma))), gamma 0 without a position
    term. count [r, k, k]: answers with entry i shown first and j second; score: the wins of i among
    them, ties as halves. Bradley and Terry 1952; the position term as in Davidson and Beaver 1977.
    Newton's method on all tables at once, with bounded steps so that it cannot overshoot.
    """
    r, k, _ = count.shape

    # -- The off-diagonal cells, each with its share of the prior.
    first, second = np.nonzero(~np.eye(k, dtype=bool))
    n = count[:, first, second] + PRIOR
    wins = score[:, first, second] + PRIOR / 2

    # -- One row per cell: +1 and -1 for its entries, and the position term.
    design = np.zeros((len(first), k + 1))
    design[range(len(first)), first] = 1
    design[range(len(first)), second] = -1
    design[:, k] = with_position
    squares = (design[:, :, None] * design[:, None, :]).reshape(len(first), -1)

    # -- A penalty on the sum of strengths, which the data do not determine, and on an unused gamma.
    penalty = np.ones((k + 1, k + 1))
    penalty[k] = 0
    penalty[:, k] = 0
    penalty[k, k] = not with_position

    parameters = np.zeros((r, k + 1))
    for _ in range(100):
        p = 1 / (1 + np.exp(-parameters @ design.T))
        gradient = (n * p - wins) @ design + parameters @ penalty
        hessian = ((n * p * (1 - p)) @ squares).reshape(r, k + 1, k + 1) + penalty
        step = np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
        parameters -= step / np.maximum(np.abs(step).max(1, keepdims=True), 1)
        if np.abs(step).max() < 1e-10:
            break
    return parameters[:, :k], parameters[:, k]
