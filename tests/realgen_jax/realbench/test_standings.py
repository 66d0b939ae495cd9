"""Standings against hand-computed numbers, closed forms and simulated judges."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.optimize

for module in ("httpx2", "tenacity"):
    pytest.importorskip(module)


from realgen_jax.realbench.results import Judgement  # noqa: E402
from realgen_jax.realbench.standings import bradley_terry, standings  # noqa: E402


def told(a: str, b: str, *verdicts: tuple[int, str], name: str = "short") -> list[Judgement]:
    """Of pictures a, b in this order: (line, verdict)."""
    return [Judgement(name, line, a, b, verdict, "") for line, verdict in verdicts]


def add_up(
    judgements, entries=("a", "b"), protocol="balanced", confidence=0.95, resamples=2000, seed=0
):
    given = SimpleNamespace(confidence=confidence, resamples=resamples)
    return standings(
        judgements, entries, given, np.random.default_rng(seed), judge="j", protocol=protocol
    )


def test_pairs_in_both_orders_by_hand():
    """Scores of a: 1, 1/2 (first twice), 3/4 (a tie and a win), 0, and three incomplete pairs."""
    judgements = told(
        "a",
        "b",
        (0, "first"),
        (1, "first"),
        (2, "tie"),
        (3, "second"),
        (4, "first"),
        (5, "refused"),
        (6, "first"),
    ) + told(
        "b",
        "a",
        (0, "second"),
        (1, "first"),
        (2, "second"),
        (3, "first"),
        (4, "unreadable"),
        (5, "first"),
    )
    found = add_up(judgements)
    (match,) = found.matches
    assert (match.a, match.b) == ("a", "b")
    assert (match.wins, match.losses, match.ties, match.pairs) == (2, 1, 1, 4)
    assert match.win_rate == (1 + 0.5 + 0.75 + 0) / 4
    assert (match.refused, match.unreadable, match.incomplete) == (1, 1, 3)
    assert match.low < match.win_rate < match.high
    assert found.counts == {"first": 7, "second": 3, "tie": 1, "refused": 1, "unreadable": 1}
    assert found.first_share[0] == 7 / 10
    assert (found.judge, found.protocol) == ("j", "balanced")
    (turned,) = add_up(judgements, ("b", "a")).matches
    assert turned.win_rate == 1 - match.win_rate
    assert (turned.wins, turned.losses) == (1, 2)


def test_the_papers_win_rate_by_hand():
    """count1 / (count1 + count2): what cannot be read is in neither."""
    judgements = told("a", "photos", (0, "first"), (1, "second"), (2, "second"), (3, "unreadable"))
    (match,) = add_up(judgements, ("a", "photos"), "realgen").matches
    assert match.win_rate == 1 / 3
    assert (match.pairs, match.unreadable, match.incomplete) == (3, 1, 1)


def test_a_person_sees_every_pair_once():
    judgements = told("a", "b", (0, "first"), (2, "tie")) + told("b", "a", (1, "first"))
    (match,) = add_up(judgements, protocol="human").matches
    assert (match.wins, match.losses, match.ties, match.win_rate) == (1, 1, 1, 0.5)


def test_intervals_are_those_of_the_binomial():
    """30 wins of 50 pairs: percentiles are the quantiles of Binomial(50, 0.6) / 50."""
    judgements = told("a", "b", *((line, "first" if line < 30 else "second") for line in range(50)))
    (match,) = add_up(judgements, protocol="human", resamples=20000).matches
    assert match.win_rate == 0.6
    assert (match.low, match.high) == pytest.approx(
        (0.46, 0.74), abs=0.021
    )  # scipy.stats.binom.ppf: 23, 37
    (narrower,) = add_up(judgements, protocol="human", resamples=20000, confidence=0.5).matches
    assert (narrower.low, narrower.high) == pytest.approx((0.56, 0.64), abs=0.021)  # 28, 32


def test_intervals_draw_prompts_not_answers():
    """Both sets of a prompt are drawn together: doubled answers do not narrow the interval."""
    once = told("a", "b", *((line, "first" if line % 3 else "second") for line in range(30)))
    twice = once + [Judgement("long", *list(vars(one).values())[1:]) for one in once]
    (a,), (b,) = (add_up(judgements, protocol="human").matches for judgements in (once, twice))
    assert b.pairs == 2 * a.pairs
    assert (b.win_rate, b.low, b.high) == (a.win_rate, a.low, a.high)


def test_one_prompt_has_no_interval_and_none_no_rate():
    found = add_up(told("a", "b", (0, "first")), protocol="human")
    assert found.matches[0].win_rate == 1
    assert math.isnan(found.matches[0].low)
    assert math.isnan(found.ratings[0].high)
    nothing = add_up(told("a", "b", (0, "refused"), (1, "unreadable")), protocol="human")
    assert math.isnan(nothing.matches[0].win_rate)
    assert nothing.matches[0].incomplete == 2
    assert all(math.isnan(rating.rating) for rating in nothing.ratings)
    empty = add_up([])
    assert not empty.matches
    assert len(empty.ratings) == 2


def test_a_judge_that_always_says_first_finds_no_difference():
    lines = [(line, "first") for line in range(10)]
    judgements = [one for a in "abc" for b in "abc" if a != b for one in told(a, b, *lines)]
    found = add_up(judgements, "abc")
    for match in found.matches:
        assert (match.win_rate, match.low, match.high, match.ties) == (0.5, 0.5, 0.5, 10)
    assert found.first_share == (1, 1, 1)
    assert [one.rating for one in found.ratings] == pytest.approx([1000] * 3)


def test_two_players_in_closed_form():
    """Both cells are met exactly: s_a - s_b = (logit(7/10) - logit(4/10)) / 2, gamma is their mean.

    The prior adds a quarter of a win and of a loss to each.
    """
    judgements = told("a", "b", *((i, "first" if i < 7 else "second") for i in range(10)))
    judgements += told("b", "a", *((i, "first" if i < 4 else "second") for i in range(10)))
    score = np.array([[[0, 7], [4, 0]]])
    count = np.array([[[0, 10], [10, 0]]])
    strengths, gamma = bradley_terry(score, count, True)
    ab, ba = math.log(7.25 / 3.25), math.log(4.25 / 6.25)
    assert strengths[0, 0] - strengths[0, 1] == pytest.approx((ab - ba) / 2, abs=1e-9)
    assert gamma[0] == pytest.approx((ab + ba) / 2, abs=1e-9)
    best, worst = add_up(judgements).ratings
    assert (best.entry, worst.entry) == ("a", "b")
    assert best.rating - worst.rating == pytest.approx(400 / math.log(10) * (ab - ba) / 2)
    assert best.rating + worst.rating == pytest.approx(2000)
    assert best.low < best.rating < best.high


def test_ratings_are_the_likeliest():
    """Against scipy's minimiser on the likelihood as it is written, with the prior's ties."""
    rng = np.random.default_rng(3)
    count = rng.integers(1, 30, (4, 4)) * (1 - np.eye(4))
    score = np.round(count * rng.random((4, 4)) * 2) / 2

    def loss(x):
        total = 0.0
        for i in range(4):
            for j in range(4):
                if i != j:
                    z = x[i] - x[j] + x[4]
                    total += (count[i, j] + 0.5) * np.logaddexp(0, z) - (score[i, j] + 0.25) * z
        return total + x[:4].sum() ** 2

    best = scipy.optimize.minimize(loss, np.zeros(5), tol=1e-10).x
    strengths, gamma = bradley_terry(score[None], count[None], True)
    np.testing.assert_allclose([*strengths[0], gamma[0]], best, atol=1e-4)


def simulate(strengths, gamma, lines, seed=0, both=True):
    """Answers of a judge that follows Bradley and Terry's model with a position bias."""
    rng, judgements = np.random.default_rng(seed), []
    names = "abcd"[: len(strengths)]
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            if i < j or (both and i != j):
                p = 1 / (1 + np.exp(-(strengths[i] - strengths[j] + gamma)))
                drawn = rng.random(lines) < p
                judgements += told(
                    a, b, *((line, "first" if won else "second") for line, won in enumerate(drawn))
                )
    return judgements


def test_a_known_ranking_is_found_through_the_bias():
    truth = np.array([0.9, 0.2, -0.3, -0.8])
    found = add_up(simulate(truth, 1.0, 1500), "abcd", resamples=300)
    assert [one.entry for one in found.ratings] == list("abcd")
    for one, strength in zip(found.ratings, truth, strict=True):
        assert one.rating == pytest.approx(1000 + 400 / math.log(10) * strength, abs=15)
        assert one.low < one.rating < one.high
    assert found.first_share[1] > 0.5


def test_both_orders_cancel_the_bias_and_one_does_not():
    """Strengths 0.4 apart and a bias of 1.

    Over both orders P(a wins) = (sigmoid(1.4) + 1 - sigmoid(0.6)) / 2 = 0.578, near the unbiased
    sigmoid(0.4) = 0.599. In one order it seems to be sigmoid(1.4) = 0.802.
    """
    truth = [0.2, -0.2]
    (match,) = add_up(simulate(truth, 1.0, 4000)).matches
    assert match.win_rate == pytest.approx(0.578, abs=0.02)
    assert match.low < 0.578 < match.high
    (once,) = add_up(simulate(truth, 1.0, 4000, both=False), protocol="realgen").matches
    assert once.win_rate == pytest.approx(0.802, abs=0.02)
    assert once.low > 0.599


def test_separable_answers_stay_finite():
    """A hundred wins out of a hundred, in every resample."""
    judgements = [
        one
        for a, b in ("ab", "bc", "ac")
        for one in told(a, b, *((line, "first") for line in range(100)))
    ]
    judgements += [
        one
        for a, b in ("ab", "bc", "ac")
        for one in told(b, a, *((line, "second") for line in range(100)))
    ]
    found = add_up(judgements, "abc", resamples=50)
    assert [one.entry for one in found.ratings] == list("abc")
    assert all(np.isfinite([one.rating, one.low, one.high]).all() for one in found.ratings)
