"""What a judge's answers add up to: win rates, ratings and the judge's own bias, with intervals."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from realgen_jax.realbench.arena import PROTOCOLS, VERDICTS
from realgen_jax.realbench.results import Judgement

SCORES = {"first": 1.0, "tie": 0.5, "second": 0.0}  # of the picture shown first
PRIOR = 0.5  # answers "tie" that every two entries start with, in either order: ratings stay finite
ELO = 400 / np.log(10)  # rating points of one unit of log-odds
Interval = tuple[float, float, float]  # value, low, high


@dataclass(frozen=True)
class Match:
    """Entry a against entry b. Both orders of a pair make one score: their mean, 1 where a won both."""

    a: str
    b: str
    wins: int  # pairs with a score above 1/2
    losses: int  # below
    ties: int  # of 1/2: also where the judge chose whichever it saw first
    pairs: int  # wins + losses + ties
    win_rate: float  # mean score; nan without pairs
    low: float
    high: float
    refused: int  # answers
    unreadable: int  # answers
    incomplete: int  # pairs without a verdict in every order; not in the rate


@dataclass(frozen=True)
class Rating:
    """Bradley-Terry on Elo's scale: 400 points are odds of ten to one; the mean over the entries is 1000."""

    entry: str
    rating: float  # nan for one that no verdict names
    low: float
    high: float


@dataclass(frozen=True)
class Standings:
    judge: str
    protocol: str
    matches: Sequence[Match]  # of entries that met, in the order of the entries
    ratings: Sequence[Rating]  # of all entries, the best one first
    first_share: Interval  # of the answers "first" and "second", those that say "first"; 1/2: no position bias
    counts: Mapping[str, int]  # verdict -> answers


def standings(
    judgements: Sequence[Judgement],
    entries: Sequence[str],
    settings,
    rng: np.random.Generator,
    *,
    judge: str,
    protocol: str,
) -> Standings:
    """`settings` is config.evaluate: `confidence` of the intervals, from `resamples` of the prompts.

    A prompt is drawn with all its judgements, of every set and pair. Each interval is that of the percentiles, nan
    where fewer than two prompts stand behind the number.
    """
    lines = sorted({judgement.line for judgement in judgements})
    draws = np.zeros((0, 0))
    if lines:  # how often each of them is in each resample
        draws = rng.multinomial(
            len(lines), [1 / len(lines)] * len(lines), settings.resamples
        ).astype(float)
    row = {line: i for i, line in enumerate(lines)}

    def interval(total: np.ndarray, count: np.ndarray) -> Interval:
        """Of a ratio of sums over the lines."""
        if not count.sum():
            return np.nan, np.nan, np.nan
        value = float(total.sum() / count.sum())
        if (count > 0).sum() < 2:
            return value, np.nan, np.nan
        with np.errstate(invalid="ignore"):
            resampled = (draws @ total) / (draws @ count)
        return value, *_percentiles(resampled, settings.confidence)

    matches = []
    for i, a in enumerate(entries):
        for b in entries[i + 1 :]:
            if found := [one for one in judgements if {one.first, one.second} == {a, b}]:
                matches.append(
                    _match(
                        a, b, found, row, interval, 2 if PROTOCOLS[protocol]["both_orders"] else 1
                    )
                )

    decided = np.zeros((2, len(lines)))  # said first, said either
    for judgement in judgements:
        if judgement.verdict in ("first", "second"):
            decided[:, row[judgement.line]] += judgement.verdict == "first", 1
    counts = Counter(judgement.verdict for judgement in judgements)
    return Standings(
        judge=judge,
        protocol=protocol,
        matches=matches,
        ratings=_ratings(judgements, entries, row, draws, settings.confidence, protocol),
        first_share=interval(*decided),
        counts={verdict: counts[verdict] for verdict in VERDICTS},
    )


def _match(
    a: str, b: str, found: Sequence[Judgement], row: Mapping[int, int], interval, orders: int
) -> Match:
    """`found` are the judgements of these two, `orders` how many a pair needs."""
    pairs: dict[tuple[str, int], dict[str, float]] = {}  # {(set, line): {shown first: a's score}}
    for one in found:
        scores = pairs.setdefault((one.set, one.line), {})
        if one.verdict in SCORES:
            scores[one.first] = SCORES[one.verdict] if one.first == a else 1 - SCORES[one.verdict]
    complete = {
        key: sum(scores.values()) / orders for key, scores in pairs.items() if len(scores) == orders
    }
    total, count = np.zeros(len(row)), np.zeros(len(row))
    for (_, line), score in complete.items():
        total[row[line]] += score
        count[row[line]] += 1
    rate, low, high = interval(total, count)
    return Match(
        a=a,
        b=b,
        wins=sum(score > 0.5 for score in complete.values()),
        losses=sum(score < 0.5 for score in complete.values()),
        ties=sum(score == 0.5 for score in complete.values()),
        pairs=len(complete),
        win_rate=rate,
        low=low,
        high=high,
        refused=sum(one.verdict == "refused" for one in found),
        unreadable=sum(one.verdict == "unreadable" for one in found),
        incomplete=len(pairs) - len(complete),
    )


def _ratings(judgements, entries, row, draws, confidence: float, protocol: str) -> list[Rating]:
    answers = [one for one in judgements if one.verdict in SCORES]
    rated = [name for name in entries if any(name in (one.first, one.second) for one in answers)]
    values, low, high = (dict.fromkeys(entries, np.nan) for _ in range(3))
    if rated:
        place = {name: i for i, name in enumerate(rated)}
        score, count = np.zeros(
            (2, len(row), len(rated), len(rated))
        )  # per line, shown first, shown second
        for one in answers:
            at = row[one.line], place[one.first], place[one.second]
            score[at] += SCORES[one.verdict]
            count[at] += 1
        position = (
            protocol != "realgen"
        )  # there the photograph is always second: its strength and the bias are one
        flat = [table.reshape(len(row), -1) for table in (score, count)]
        strengths, _ = bradley_terry(
            *(table.sum(0).reshape(1, len(rated), -1) for table in flat), position
        )
        values |= dict(zip(rated, 1000 + ELO * strengths[0], strict=True))
        if len(row) > 1:
            resampled = [(draws @ table).reshape(-1, len(rated), len(rated)) for table in flat]
            strengths, _ = bradley_terry(*resampled, position)
            ends = [_percentiles(1000 + ELO * column, confidence) for column in strengths.T]
            low |= dict(zip(rated, (one[0] for one in ends), strict=True))
            high |= dict(zip(rated, (one[1] for one in ends), strict=True))
    ratings = [
        Rating(name, float(values[name]), float(low[name]), float(high[name])) for name in entries
    ]
    return sorted(ratings, key=lambda one: (np.isnan(one.rating), -one.rating))


def bradley_terry(
    score: np.ndarray, count: np.ndarray, position: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Most likely strengths [r, k], of mean 0, and position terms [r], of r tables by themselves.

    P(i beats j | i shown first) = 1 / (1 + exp(-(s_i - s_j + gamma))); without `position` gamma is 0.
    `count` [r, k, k] are the answers of entry i shown first against j second, `score` the wins of i, ties as halves
    (Bradley and Terry 1952; the term for the order as in Davidson and Beaver 1977). Newton's method on all tables at
    once; the steps are bounded, so that it cannot overshoot.
    """
    r, k, _ = count.shape
    first, second = np.nonzero(~np.eye(k, dtype=bool))
    n = count[:, first, second] + PRIOR
    wins = score[:, first, second] + PRIOR / 2
    design = np.zeros((len(first), k + 1))
    design[range(len(first)), first] = 1
    design[range(len(first)), second] = -1
    design[:, k] = position
    squares = (design[:, :, None] * design[:, None, :]).reshape(len(first), -1)
    fixed = np.ones(
        (k + 1, k + 1)
    )  # a penalty on the sum of strengths, which the data leave open, and on an unused gamma
    fixed[k], fixed[:, k], fixed[k, k] = 0, 0, not position
    found = np.zeros((r, k + 1))
    for _ in range(100):
        p = 1 / (1 + np.exp(-found @ design.T))
        gradient = (n * p - wins) @ design + found @ fixed
        hessian = (n * p * (1 - p)) @ squares
        step = np.linalg.solve(hessian.reshape(r, k + 1, k + 1) + fixed, gradient[:, :, None])[
            :, :, 0
        ]
        found -= step / np.maximum(np.abs(step).max(1, keepdims=True), 1)
        if np.abs(step).max() < 1e-10:
            break
    return found[:, :k], found[:, k]


def _percentiles(values: np.ndarray, confidence: float) -> tuple[float, float]:
    ends = np.nanquantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(ends[0]), float(ends[1])
