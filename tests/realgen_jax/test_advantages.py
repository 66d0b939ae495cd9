import numpy as np
import pytest
from ml_collections import ConfigDict

from realgen_jax.advantages import (
    ADVANTAGES,
    AdvantageError,
    Settings,
    advantage_problems,
    advantages_of,
    group_advantages,
    not_dominated,
    tamed_rewards,
    zero_spread,
)
from realgen_jax.config import base
from realgen_jax.training.scoring import weighted_mean
from tests.helpers.goldens import golden


@pytest.mark.parametrize("global_std", [False, True])
def test_advantages_match_the_golden(global_std):
    case = golden("06_advantage/advantage.npz")
    order = np.argsort(case["group_ids"], kind="stable")
    rewards = case["rewards"][:, order].reshape(3, 3, 6)
    names = ["a", "b", "c"]
    weights = dict(zip(names, case["weights"], strict=True))
    got = group_advantages(dict(zip(names, rewards, strict=True)), weights, global_std=global_std)
    want = case[f"global_std_{str(global_std).lower()}/weighted_mean"][:, 0][order].reshape(3, 6)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_advantages_by_hand():
    scores = {"a": np.float32([[1, 2, 3], [5, 5, 5]]), "b": np.float32([[0, 0, 3], [1, 1, 4]])}
    got = group_advantages(scores, {"a": 1.0, "b": 3.0}, global_std=False, eps=0.0)
    a = np.array([[-1, 0, 1], [0, 0, 0]]) * np.sqrt(1.5)
    b = np.array([[-1, -1, 2], [-1, -1, 2]]) / np.sqrt(2)
    np.testing.assert_allclose(got, (a + 3 * b) / 4, rtol=1e-6)
    assert got.dtype == np.float32
    overall = group_advantages({"a": scores["a"]}, {"a": 1.0}, global_std=True, eps=0.0)
    np.testing.assert_allclose(
        overall, np.array([[-1, 0, 1], [0, 0, 0]]) / scores["a"].std(), rtol=1e-6
    )


def test_a_penalty_turns_no_other_sign():
    """A negative weight larger than the rest: the signs are those of the weights."""
    scores = {"detector": np.float32([[0, 1], [0, 0]]), "clip_score": np.float32([[0, 0], [0, 1]])}
    weights = {"detector": 1.0, "clip_score": -2.0}
    got = group_advantages(scores, weights, global_std=False, eps=0.0)
    np.testing.assert_allclose(got, np.array([[-1, 1], [2, -2]]) / 3, rtol=1e-6)
    shown = weighted_mean(scores, weights)
    np.testing.assert_allclose(shown, np.array([[0, 1], [0, -2]]) / 3, rtol=1e-6)

    # With weights that add up to 0 nothing is divided by it.
    got = group_advantages(scores, {"detector": 1.0, "clip_score": -1.0}, global_std=True)
    assert np.isfinite(got).all()


def test_positive_weights_are_divided_by_their_sum():
    """To the last bit."""
    rng = np.random.default_rng(0)
    scores = {name: rng.random((3, 4), np.float32) for name in "abc"}
    weights = {"a": 0.1, "b": 0.7, "c": 3.3}
    total = sum(weight * scores[name] for name, weight in weights.items())
    assert (weighted_mean(scores, weights) == total / (0.1 + 0.7 + 3.3)).all()


@pytest.mark.parametrize("weights", [{"a": 0.0}, {"a": np.nan}, {"a": -np.inf}])
def test_weights_without_a_sum_are_refused(weights):
    with pytest.raises(ValueError, match="expected finite numbers, not all 0"):
        group_advantages({"a": np.zeros((1, 2))}, weights, global_std=False)


def test_rounding_is_no_spread():
    """21 equal float32 rewards have std 7e-9 in numpy (D13): dividing by it would invent
    advantages.
    """
    scores = {"a": np.full((1, 21), 0.1, np.float32)}
    scores["a"][0, 0] = np.nextafter(np.float32(0.1), np.float32(1))
    assert zero_spread(scores["a"].astype(np.float64))[0]
    np.testing.assert_array_equal(
        group_advantages(scores, {"a": 1.0}, global_std=False, eps=0.0), 0
    )


def test_scores_of_another_shape_are_named():
    """Flat scores would make one group of all pictures."""
    with pytest.raises(ValueError, match=r"scores of 'a' have shape \(6,\); expected \[groups"):
        group_advantages({"a": np.zeros(6)}, {"a": 1.0}, global_std=False)


# -- The other entries of the table, against golden 14

CASE = golden("14_objectives/advantages.npz")
NAMES = ("realism", "ocr", "align")
REWARDS = {name: CASE[f"reward/{name}"] for name in NAMES}
WEIGHTS = dict(zip(NAMES, map(float, CASE["weights"]), strict=True))


def computed(name, scores=None, weights=None, **settings):
    return ADVANTAGES[name](scores or REWARDS, weights or WEIGHTS, Settings(**settings))


@pytest.mark.parametrize(
    ("name", "settings", "recorded"),
    [
        ("per_reward", {}, "project/per_reward"),
        ("weighted_sum", {"global_std": True}, "nft/weighted_sum_global_std"),
        ("mixgrpo", {}, "mixgrpo/advantage_aggr"),
        ("gdpo", {}, "gdpo/flow_factory"),
        ("gdpo_unbiased", {}, "gdpo/pref_grpo"),
        *[
            ("paco", {"tame_above": above, "global_std": std == "global"}, f"paco/{above}/{std}")
            for above in ("mean", "median", "0.2")
            for std in ("group", "global")
        ],
    ],
)
def test_the_table_matches_the_golden(name, settings, recorded):
    if name == "paco":
        recorded = recorded.replace("/g", "/advantages_g") + "_std"
    got = computed(name, **settings)
    np.testing.assert_allclose(got, CASE[recorded], rtol=1e-4, atol=1e-5)
    assert got.dtype == np.float32


@pytest.mark.parametrize("above", ["mean", "median", "0.2"])
def test_paco_tames_the_rewards_of_the_golden(above):
    np.testing.assert_array_equal(tamed_rewards(REWARDS, above), CASE[f"paco/{above}/tamed"])


@pytest.mark.parametrize("name", NAMES)
def test_dr_grpo_matches_the_golden(name):
    got = computed("dr_grpo", {name: REWARDS[name]}, {name: 1.0})
    np.testing.assert_allclose(got, CASE[f"dr_grpo/{name}"], rtol=1e-4, atol=1e-5)


def test_win_rates_become_pref_grpos_advantages():
    case = golden("14_objectives/win_rates.npz")
    got = computed("mixgrpo", {"judge": case["rate_rounded"]}, {"judge": 1.0})
    np.testing.assert_allclose(got, case["advantages"], rtol=1e-5, atol=1e-6)


def test_pareto_matches_the_golden():
    """Of each reward alone, Parrot's coefficient; times the size, as a loss is a mean."""
    case = golden("14_objectives/pareto.npz")
    rewards = case["rewards"]
    size = rewards.shape[1]
    np.testing.assert_array_equal(not_dominated(rewards), case["keep"])
    scores = {name: rewards[:, :, k] for k, name in enumerate(NAMES)}
    got = computed("pareto", scores, WEIGHTS)
    want = (case["coefficient"] * CASE["weights"]).sum(-1) * size / CASE["weights"].sum()
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_pareto_turns_a_penalty_around():
    """The second picture is worse in the penalty, so the first dominates it."""
    scores = {"good": np.float32([[1, 1, 2]]), "bad": np.float32([[0, 1, 1]])}
    got = computed("pareto", scores, {"good": 1.0, "bad": -1.0})
    np.testing.assert_allclose(got, [[0.75, 0, 0.75]], rtol=1e-6)


def test_gardo_matches_the_golden():
    """Its groups differ in size, so each is a call of its own."""
    case = golden("14_objectives/gardo.npz")
    for group in np.unique(case["group"]):
        rows = case["group"] == group
        scores = {"a": case["reward"][rows][None]}
        got = computed("gardo", scores, {"a": 1.0}, diversity=case["diversity"][rows][None])
        np.testing.assert_allclose(got[0], case["advantages"][rows], rtol=1e-4, atol=1e-5)


def test_gardo_without_the_diversity_is_an_error():
    with pytest.raises(AdvantageError, match="needs the diversity"):
        computed("gardo")


@pytest.mark.parametrize("lowest", [-1.0, -0.9])
def test_paco_refuses_rewards_without_a_logarithm(lowest):
    """Values of -1, and a mean that is not positive."""
    scores = {"bad": np.float32([[lowest, 1.5 if lowest == -1 else 0.5]])}
    with pytest.raises(AdvantageError, match=f"scores of 'bad' go down to {lowest:.3g}"):
        computed("paco", scores, {"bad": 1.0})


@pytest.mark.parametrize("name", [name for name in ADVANTAGES if name != "pareto"])
def test_a_group_that_differs_by_rounding_teaches_nothing(name):
    scores = np.full((2, 6), 0.1, np.float32)
    scores[0, 0] = np.nextafter(np.float32(0.1), np.float32(1))
    scores[1] = np.arange(6)
    got = computed(name, {"a": scores}, {"a": 1.0}, diversity=np.ones((2, 6), np.float32))
    np.testing.assert_allclose(got[0], 0, atol=1e-6)
    assert np.ptp(got[1]) > 0.5


@pytest.mark.parametrize("name", ADVANTAGES)
def test_every_entry_refuses_flat_scores(name):
    scores = {"a": np.ones(6), "b": np.ones(6)}
    with pytest.raises(ValueError, match=r"scores of 'a' have shape \(6,\)"):
        computed(name, scores, {"a": 1.0, "b": 1.0}, diversity=np.ones(6))


# -- The config


def config(**changes):
    c = base()
    c.reward.fn = ConfigDict({"a": 1.0})
    c.update_from_flattened_dict({key.replace("__", "."): new for key, new in changes.items()})
    return c


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__advantages": "z"}, "is 'z'; choose one of per_reward, weighted_sum"),
        ({"train__advantages": "pareto"}, "config.reward.fn has 1; expected 2 or more"),
        ({"train__advantages": "gardo"}, "add 'diversity' to config.reward.watched"),
        ({"train__advantages": "gdpo", "sample__global_std": True}, "global_std is True"),
        ({"train__tame_above": "0.2"}, "only config.train.advantages='paco' reads"),
    ],
)
def test_contradictory_keys_are_refused(changes, message):
    (problem,) = advantage_problems(config(**changes))
    assert message in problem


def test_fitting_keys_are_not_refused():
    assert not advantage_problems(config())
    assert not advantage_problems(config(train__advantages="paco", train__tame_above="0.2"))
    assert not advantage_problems(config(train__advantages="gardo", reward__watched=("diversity",)))


def test_the_config_names_the_entry():
    c = config(train__advantages="gardo", reward__watched=("diversity",))
    scores = {"a": np.float32([[0, 1, 2, 5]]), "diversity": np.float32([[1, 1, 1, 5]])}
    np.testing.assert_allclose(advantages_of(c, scores), [[-2, -1, 0, 7.5]])
    c.train.advantages = "per_reward"
    want = group_advantages({"a": scores["a"]}, {"a": 1.0}, global_std=False)
    assert (advantages_of(c, scores) == want).all()
