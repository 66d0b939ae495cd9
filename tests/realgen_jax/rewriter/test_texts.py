"""Which rewrites are drawn, the rewards of their texts, and their statistics."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from realgen_jax.rewriter.texts import (
    difference,
    drawn,
    kept_share,
    log_odds,
    parse,
    statistics,
    text_scores,
    text_settings,
    usable,
    words,
)

SPAM = (r"IMG_\d+", r"\.(CR[23]|NEF)\b", r"\b(8k|masterpiece)\b", r"canon eos")


def settings(**changes):
    values = {
        "min_words": 4,
        "max_words": 8,
        "text_rewards": {"usable": 1.0, "length": 0.25, "kept": 0.25, "spam": 0.0},
        "spam_patterns": SPAM,
        "answer_tag": "",
    }
    return text_settings(SimpleNamespace(**{**values, **changes}))


@pytest.mark.parametrize(
    ("text", "tag", "want"),
    [
        (" a cat\n", "", "a cat"),
        ("a\N{NO-BREAK SPACE}cat\ton a roof", "", "a cat on a roof"),
        ("a cat\n\nA roof.", "", "a cat\n\nA roof."),
        ("Sure!\n<answer>\na cat\n</answer> Done.", "answer", "a cat"),
        ("a cat", "answer", ""),
        ("<answer>a</answer><answer>b</answer>", "answer", ""),
        ("<answer>a cat", "answer", ""),
        ("<think>\nhm\n</think>\n\na cat", "", "a cat"),
        ("<think>\nhm", "", ""),
    ],
)
def test_parse_finds_the_rewrite_in_an_answer(text, tag, want):
    assert parse(text, tag) == want


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "...",
        "a cat\na roof",
        "a cat\u2028a roof",
        "a c\N{REPLACEMENT CHARACTER}t",
        "a\x00b",
    ],
)
def test_what_is_not_one_printable_paragraph_is_not_usable(text):
    assert not usable(text, ended=True, fits=True)


def test_a_rewrite_is_usable_if_it_ended_and_the_image_model_reads_it():
    text = "a “cat” on a caféN{RIGHT SINGLE QUOTATION MARK}s roof — naïve, 35 mm"
    assert usable(text, ended=True, fits=True)
    assert not usable(text, ended=False, fits=True)
    assert not usable(text, ended=True, fits=False)


def test_an_unusable_rewrite_is_never_drawn():
    assert drawn(["a", "b"], ["a long", "\n"], [True, False]) == ["a long", "b"]


def test_text_rewards_of_written_out_examples():
    prompts = ["A red cat on the roof"] * 5
    rewrites = [
        "A red cat on the roof, in rain.",  # 8 words
        "Red cats, roof",  # 3 words: one below 4, a whole quarter of it
        "a red cat on the roof in rain today",  # 9: half of a quarter of 8 above
        "a dog",
        "IMG_10.CR2 masterpiece canon eos red roof",  # 6 words, 4 of them spam
    ]
    scores = text_scores(settings(), prompts, rewrites, [True, True, True, False, True])
    assert list(scores) == ["usable", "length", "kept", "spam"]
    assert all(values.dtype == np.float32 for values in scores.values())
    assert scores["usable"].tolist() == [1, 1, 1, 0, 1]
    np.testing.assert_allclose(scores["length"], [0, -1, -0.5, -1, 0])
    np.testing.assert_allclose(scores["kept"], [1, 2 / 3, 1, 0, 2 / 3], rtol=1e-6)
    np.testing.assert_allclose(scores["spam"], [0, 0, 0, 0, -4 / 6], rtol=1e-6)


def test_only_the_rewards_of_the_config_are_computed():
    scores = text_scores(settings(text_rewards={"kept": 1.0}), ["a cat"], ["a cat"], [True])
    assert list(scores) == ["kept"]


def test_words_have_no_punctuation_around_them():
    text = "“A cat\N{RIGHT SINGLE QUOTATION MARK}s — IMG_1018.CR2.” (wet-look)"
    assert words(text) == ["a", "cat\N{RIGHT SINGLE QUOTATION MARK}s", "img_1018.cr2", "wet-look"]


def test_kept_counts_every_word_of_a_prompt_without_content_words():
    assert kept_share("what is it", "it is") == pytest.approx(2 / 3)
    assert kept_share("...", "a cat") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_words": 9}, r"^config\.rewriter\.min_words is 9 and max_words is 8; expected"),
        ({"min_words": 0}, r"^config\.rewriter\.min_words is 0 "),
        ({"text_rewards": {"long": 1.0}}, r"text_rewards has long; choose from usable, length, k"),
        ({"spam_patterns": ("(",)}, r"spam_patterns has '\(', which is no regular expression"),
        ({"answer_tag": "<a>"}, r"answer_tag is '<a>'; expected a word, such as answer"),
    ],
)
def test_wrong_settings_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_statistics_of_written_out_examples():
    prompts = ["red cat", "red cat", "blue boat", "blue boat"]
    rewrites = ["a red cat, 8k", "a red cat at night, 8k", "boat", "an 8k blue boat on water"]
    figures = statistics(settings(), prompts, rewrites, group=2)
    assert figures["words"] == pytest.approx((4 + 6 + 1 + 6) / 4)
    assert figures["words_95"] == pytest.approx(6)
    assert figures["kept"] == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    assert figures["spam"] == pytest.approx((1 / 4 + 1 / 6 + 0 + 1 / 6) / 4)
    assert figures["tail"] == pytest.approx(3 / 4)  # "8k" ends two of them, and three hold it
    # 3 + 5 pairs, of which "a red" and "red cat" are there twice; 5 pairs, all different
    assert figures["distinct_2"] == pytest.approx((6 / 8 + 1) / 2)


def test_statistics_of_nothing_but_single_words():
    figures = statistics(settings(), ["a", "b"], ["x", ""], group=2)
    assert "distinct_2" not in figures
    assert figures["tail"] == 0.5


def test_log_odds_rank_words_by_how_sure_their_change_is():
    before = ["grey cat"] * 6 + ["red cat"] * 2
    after = ["bright cat, bright light"] * 7 + ["red cat"]
    changes = log_odds(before, after)
    assert changes[0].word == "bright"
    assert changes[-1].word == "grey"
    grey = changes[-1]
    assert (grey.before, grey.after) == (6, 0)
    want = math.log(0.5 / 8.5) - math.log(6.5 / 2.5)
    assert grey.log_odds == pytest.approx(want)
    assert grey.z == pytest.approx(want / math.sqrt(1 / 0.5 + 1 / 8.5 + 1 / 6.5 + 1 / 2.5))
    cat = next(change for change in changes if change.word == "cat")
    assert (cat.before, cat.after, cat.log_odds) == (8, 8, 0)
    with pytest.raises(ValueError, match="rewrites of both times"):
        log_odds(before, [])


def test_difference_has_the_words_that_only_one_text_has():
    assert difference("A bright, wide cat", "a dark cat; dark") == (["bright", "wide"], ["dark"])
