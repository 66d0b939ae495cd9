"""The text encoders of SD3 and Z-Image in the program: its checks, and interruptions."""

import json
import shutil

import numpy as np
import pytest

pytest.importorskip("torch")

from realgen_jax.text_cache import open_cache
from realgen_scripts import encode_prompts
from tests.helpers.text import SD3, SD3_ENCODERS, ZIMAGE, ZIMAGE_ENCODERS, fill, settings


def swap_clips_tokenizers(model):
    (model / "tokenizer").rename(model / "other")
    (model / "tokenizer_2").rename(model / "tokenizer")
    (model / "other").rename(model / "tokenizer_2")


def pad_otherwise(model):
    """T5's tokenizer with another piece for padding."""
    change_entry(model / "tokenizer_3" / "tokenizer_config.json", "pad_token", "</s>")


def lose_padding(model):
    change_entry(model / "tokenizer" / "tokenizer_config.json", "pad_token", None)


def change_entry(file, entry, value):
    file.write_text(json.dumps(json.loads(file.read_text()) | {entry: value}))


def lose_text_encoder_3(model):
    shutil.rmtree(model / "text_encoder_3")


def lose_template(model):
    (model / "tokenizer" / "chat_template.jinja").unlink()


def damage_template(model):
    (model / "tokenizer" / "chat_template.jinja").write_text("{% for m in messages %}")


def reach_out(model):
    """A template that would run a program, if it were not rendered in a sandbox."""
    (model / "tokenizer" / "chat_template.jinja").write_text(
        "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    )


@pytest.mark.parametrize(
    ("model", "encoders", "damage", "message"),
    [
        (
            SD3,
            SD3_ENCODERS,
            swap_clips_tokenizers,
            r"tokenizer in .*/tokenizer pads with '!', but .* was trained with '<\|endoftext\|>'",
        ),
        (SD3, SD3_ENCODERS, pad_otherwise, r"tokenizer_3 pads with '</s>', but .* with '<pad>'"),
        (SD3, SD3_ENCODERS, lose_text_encoder_3, r"text_encoder_3 is missing; .* download the who"),
        (ZIMAGE, ZIMAGE_ENCODERS, lose_padding, r"tokenizer pads with None, but the text encoder"),
        (ZIMAGE, ZIMAGE_ENCODERS, lose_template, r"the tokenizer in .*tokenizer has no chat templ"),
        (
            ZIMAGE,
            ZIMAGE_ENCODERS,
            damage_template,
            r"chat template of .*tokenizer cannot be filled in \(TemplateSyntaxError: ",
        ),
        (
            ZIMAGE,
            ZIMAGE_ENCODERS,
            reach_out,
            r"chat template of .*tokenizer cannot be filled in \(SecurityError: ",
        ),
    ],
)
def test_other_families_tokenizers_are_checked_before_weights_are_read(
    tmp_path, monkeypatch, model, encoders, damage, message
):
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    damage(copy)
    monkeypatch.setattr("reward_bridge.encoders.load_model", None)
    with pytest.raises((ValueError, OSError), match=message) as refusal:
        fill(tmp_path, copy, encoders, ["a cat"], 16)
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("model", "encoders"), [(SD3, SD3_ENCODERS), (ZIMAGE, ZIMAGE_ENCODERS)], ids=["sd3", "zimage"]
)
def test_an_interrupted_encoding_of_several_arrays_gives_the_same_bits(
    tmp_path, monkeypatch, model, encoders
):
    """The third batch fails first; its longest prompt is longer than those of the others."""
    prompts = ["a cat", "", "a red boat", "water", "a small red boat on calm water at night"]
    monkeypatch.setattr(encode_prompts, "BATCH", 2)
    want = fill(tmp_path / "whole", model, encoders, prompts, 96).read(prompts)

    encode_batch = encode_prompts.encode_batch

    def interrupted(encoders, tokens, rows, prompts):
        if rows.start == 4:
            raise KeyboardInterrupt
        return encode_batch(encoders, tokens, rows, prompts)

    monkeypatch.setattr(encode_prompts, "encode_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "stopped", model, encoders, prompts, 96)
    monkeypatch.setattr(encode_prompts, "encode_batch", encode_batch)
    cache = open_cache(prompts, model, encoders, settings(tmp_path / "stopped", 96))
    assert cache.missing_rows() == [4]

    # A row of one array is lost too.
    array = encoders[0].arrays[-1]
    shutil.rmtree(cache.folder / f"{array}.zarr" / "c" / "1", ignore_errors=True)
    (cache.folder / f"{array}.zarr" / "c" / "1").unlink(missing_ok=True)
    again = fill(tmp_path / "stopped", model, encoders, prompts, 96)
    assert again.missing_rows() == []
    got = again.read(prompts)
    assert sorted(got) == sorted(name for encoder in encoders for name in encoder.arrays)
    for name, array in got.items():
        np.testing.assert_array_equal(array, want[name], err_msg=name)


def test_clips_padding_is_a_word_in_a_prompt(tmp_path):
    """CLIP-G pads with "!", which is a word."""
    assert fill(tmp_path, SD3, SD3_ENCODERS, ["!"], 16).missing_rows() == []
