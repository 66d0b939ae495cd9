"""The ocr reward reads text that Pillow has drawn, whose right score is known."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

pytest.importorskip("rapidocr")
pytest.importorskip("rapidfuzz")

import numpy as np

from reward_bridge.rewards import make_reward
from reward_bridge.rewards.ocr import quoted_text


@pytest.fixture(scope="module")
def ocr():
    return make_reward("ocr", "cpu", {})


def drawn(*lines):
    """Lines of black text on white, uint8 [3, 96, 320]."""
    picture = Image.new("RGB", (320, 96), "white")
    for number, line in enumerate(lines):
        place = 12, 6 + 42 * number
        ImageDraw.Draw(picture).text(place, line, fill="black", font=ImageFont.load_default(34))
    return torch.from_numpy(np.asarray(picture).transpose(2, 0, 1).copy())


def test_text_is_read_and_compared(ocr):
    cases = [
        (["We are OPEN"], 'a sign that says "Open"', 1.0),  # part of what is read
        (["Fresh", "Bread"], "a shop sign, “fresh bread”", 1.0),  # two lines
        (["Coffee"], 'a cup with "Toffee"', 1 - 1 / 6),  # one letter of six
    ]
    images = torch.stack([drawn(*lines) for lines, _, _ in cases])
    scores = ocr(images, [prompt for _, prompt, _ in cases])
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx([score for _, _, score in cases])


@pytest.mark.parametrize(
    ("read", "quoted", "score"),
    [
        ("Open 24 hours", "OPEN 24 HOURS", 1.0),
        ("the tea shop", "Tea", 1.0),  # more text is not punished
        ("Tea", "Team work", 3 / 8),  # five of eight letters are missing
        ("", "Tea", 0.0),
        ("a long text without it", "xyz", 0.0),  # never below 0
    ],
)
def test_scores_are_those_of_the_edit_distance(ocr, monkeypatch, read, quoted, score):
    monkeypatch.setattr(ocr, "reader", lambda picture: SimpleNamespace(txts=read.split(" ")))
    assert ocr(drawn()[None], [f'a sign "{quoted}"']).tolist() == pytest.approx([score])


@pytest.mark.parametrize("prompt", ["a cat", 'an unfinished "quote', 'nothing " " inside', ""])
def test_a_prompt_without_a_quoted_text_is_named(ocr, prompt):
    with pytest.raises(ValueError, match="quotes no text; expected the text") as error:
        ocr(drawn("a")[None], [prompt])
    assert repr(prompt) in str(error.value)
    assert "\n" not in str(error.value)


def test_the_first_pair_of_quotes_counts():
    assert quoted_text('say "A b" and "C"') == "A b"
    assert quoted_text('say “A” and "C"') == "A"
