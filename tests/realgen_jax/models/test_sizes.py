"""Pictures of several sizes from one copy of the weights."""

import jax
import numpy as np
import pytest

from realgen_jax.models.loading import load_model, with_size
from realgen_jax.nn.convert import leaves
from tests.helpers.models import one_device, pretrained
from tests.helpers.sd3 import SD3_PIPELINE

MODELS = {"flux": pretrained(), "sd3": pretrained(SD3_PIPELINE)}
KEY = "config.evaluate.sample"


@pytest.mark.parametrize("family", MODELS)
def test_another_size_shares_the_weights(family):
    """Only SD3's table of positions belongs to a size; wide and high take other parts of it."""
    chosen = MODELS[family]
    model = load_model(chosen, (64, 64), one_device())
    positions = {}
    for size in ((96, 64), (64, 96)):
        other = with_size(model, chosen, size, KEY)
        loaded = load_model(chosen, size, one_device())
        assert (16 * other.width, 16 * other.height) == size
        assert jax.tree.structure(other) == jax.tree.structure(loaded)
        np.testing.assert_array_equal(other.sigmas(4), loaded.sigmas(4))
        before, expected = leaves(model.params), leaves(loaded.params)
        for name, array in leaves(other.params).items():
            assert (array is before[name]) == (name != "pos")
            np.testing.assert_array_equal(array, expected[name])
        positions[size] = leaves(other.params).get("pos")
    if family == "sd3":
        assert (positions[96, 64] != positions[64, 96]).any()


def test_a_size_that_does_not_fit_is_named_with_its_key():
    model = load_model(MODELS["sd3"], (64, 64), one_device())
    expected = r"^config\.evaluate\.sample\.height is 72; expected a multiple of 16 pixels$"
    with pytest.raises(ValueError, match=expected):
        with_size(model, MODELS["sd3"], (64, 72), KEY)
    with pytest.raises(ValueError, match=r"4 x 400 tokens are larger than the model's table"):
        with_size(model, MODELS["sd3"], (6400, 64), KEY)
