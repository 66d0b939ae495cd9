"""Grids of pictures with captions."""

import numpy as np
import pytest

from realgen_jax.training.pictures import break_rows, picture_grid, wrap_caption


def test_grids_hold_the_pictures_and_their_captions():
    red = np.zeros((2, 3, 64, 64), np.uint8)
    red[:, 0] = 255
    caption = "a caption so long that it has to wrap several times over"
    image = np.asarray(picture_grid([red], [["a", caption]]))
    assert (image[20:180, 20:180] == [255, 0, 0]).all()
    below = image[8 + 192 :]
    assert (below < 50).all(-1).any()
    plain = np.asarray(picture_grid([red], [["", ""]]))
    assert plain.shape[0] < image.shape[0]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", [""]),
        ("one two three", ["one two", "three"]),
        ("one\n\ntwo", ["one", "", "two"]),
        ("a well-known unbreakable word", ["a", "well-known", "unbreakable", "word"]),
        ("\n".join("123456789"), list("12345678")),
    ],
)
def test_captions_wrap_between_words(text, lines):
    assert wrap_caption(text, 8) == lines


def test_rows_that_belong_together_break_together():
    first = np.arange(3)
    second = np.arange(3) + 10
    rows, captions = break_rows([first, second], [list("abc"), list("xyz")], columns=2)
    assert [row.tolist() for row in rows] == [[0, 1], [10, 11], [2], [12]]
    assert captions == [["a", "b"], ["x", "y"], ["c"], ["z"]]
