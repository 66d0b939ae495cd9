import numpy as np
import pytest

from realgen_jax.advantages import group_advantages, zero_spread
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
