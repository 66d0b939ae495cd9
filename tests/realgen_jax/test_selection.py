import numpy as np
import pytest

from realgen_jax.selection import SELECTIONS
from tests.helpers.goldens import golden

CASE = golden("14_objectives/selection.npz")


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("case", ["main", "odd"])
def test_a_selection_matches_the_golden(name, case):
    want = CASE[f"{case}/{name}"]
    got = SELECTIONS[name](CASE[f"{case}/scores"], len(want))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", SELECTIONS)
def test_each_prompt_is_selected_alone(name):
    scores = CASE["main/scores"].reshape(4, 24)
    got = SELECTIONS[name](scores, 5)
    for row, selected in zip(scores, got, strict=True):
        np.testing.assert_array_equal(SELECTIONS[name](row, 5), selected)


def test_all_of_a_prompt_may_be_kept():
    """The best half first, then the worst of the rest; none twice."""
    got = SELECTIONS["best_worst"](np.float32([3, 1, 2]), 3)
    assert got.tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("keep", [0, 4])
def test_more_than_there_are_cannot_be_kept(name, keep):
    with pytest.raises(ValueError, match=f"keep is {keep} of 3 previews; expected 1 to 3"):
        SELECTIONS[name](np.zeros(3), keep)
