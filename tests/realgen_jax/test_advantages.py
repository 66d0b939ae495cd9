import numpy as np
import pytest

from realgen_jax.advantages import group_advantages, zero_spread
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
