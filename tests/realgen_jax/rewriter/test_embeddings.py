"""Embeddings of fresh texts beside a cache's."""

from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest

from realgen_jax.rewriter.embeddings import FreshTexts
from tests.helpers.models import golden_model


def stored(**arrays):
    """A cache that has the rows of "" and "old"."""
    row = {"": 0, "old": 1}
    return SimpleNamespace(
        read=lambda prompts: {
            name: array[[row[prompt] for prompt in prompts]] for name, array in arrays.items()
        }
    )


def test_fresh_and_stored_rows_are_read_in_order():
    fresh = {
        "t5": np.arange(12, dtype=ml_dtypes.bfloat16).reshape(2, 3, 2),
        "clip": np.array([[1.0], [2.0]], np.float32),
    }
    cache = stored(
        t5=np.full((2, 2, 2), 7, ml_dtypes.bfloat16), clip=np.array([[3.0], [4.0]], np.float32)
    )
    texts = FreshTexts(cache, ["new", "other"], fresh)
    got = texts.read(["other", "old", "new", "old"])
    assert got["t5"].dtype == ml_dtypes.bfloat16
    assert got["clip"].ravel().tolist() == [2, 4, 1, 4]
    np.testing.assert_array_equal(got["t5"][0], fresh["t5"][1])
    # The cache's texts were shorter: the third token is 0, as the encoders leave it.
    np.testing.assert_array_equal(got["t5"][1].astype(int), [[7, 7], [7, 7], [0, 0]])
    with pytest.raises(KeyError, match="unknown"):
        texts.read(["unknown"])


def test_only_fresh_rows_do_not_ask_the_cache():
    texts = FreshTexts(None, ["new"], {"clip": np.ones((1, 1))})
    assert texts.read(["new", "new"])["clip"].shape == (2, 1)


@pytest.mark.parametrize(
    ("arrays", "cached", "message"),
    [
        ({"clip": np.ones((2, 1))}, {}, "gave 2 rows of clip for 1 texts"),
        ({"clip": np.ones((1, 1))}, {}, "the text cache has another array 'clip'"),
        ({"clip": np.ones((1, 1))}, {"clip": np.ones((2, 1), int)}, "another array 'clip'"),
        ({"t5": np.ones((1, 2, 1))}, {"t5": np.ones((2, 3, 1))}, "has 3 tokens of 't5', more than"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arrays, cached, message):
    with pytest.raises(ValueError, match=message):
        FreshTexts(stored(**cached), ["new"], arrays).read(["new", "old"])


def test_the_model_takes_them_as_its_cache():
    model = golden_model()
    arrays = {
        "t5": np.arange(2 * 4 * 8, dtype=np.float32).reshape(2, 4, 8),
        "clip": np.arange(2 * 6, dtype=np.float32).reshape(2, 6),
    }
    cond = model.cond(FreshTexts(None, ["a", "b"], arrays), ["b", "a"], 3.5)
    np.testing.assert_array_equal(jax.device_get(cond.t5), arrays["t5"][::-1])
