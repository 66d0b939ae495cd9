"""Reference pictures: their files and noise, what is made again, and a pipeline of diffusers."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from reward_bridge.reference_maker import (
    Slot,
    check_arguments,
    check_settings,
    make_pictures,
    missing_slots,
    write_table,
)
from reward_bridge.references import References

PROMPTS = ["a cat", "a dög", "a cat"]


class Pipeline:
    """Draws the first number of each generator, as a grey."""

    def __init__(self):
        self.batches = []

    def __call__(self, prompt, generator, output_type, width=8, height=8):
        self.batches.append(list(prompt))
        images = []
        for noise in generator:
            grey = int(torch.randint(256, (), generator=noise))
            images.append(Image.new("RGB", (width, height), (grey, grey, grey)))
        return SimpleNamespace(images=images)


def made(folder, slots, batch_size=2, seed=0, **arguments):
    pipeline, counts = Pipeline(), []
    make_pictures(
        pipeline, slots, folder, seed=seed, batch_size=batch_size, arguments=arguments,
        advance=counts.append,
    )  # fmt: skip
    return pipeline, counts


def test_pictures_are_made_once_whatever_the_order(tmp_path):
    slots = missing_slots(tmp_path, PROMPTS, 3)
    assert [(slot.prompt, slot.variation) for slot in slots] == [
        (prompt, variation) for prompt in PROMPTS[:2] for variation in range(3)
    ]
    pipeline, counts = made(tmp_path, slots, batch_size=4, width=16)
    assert counts == [4, 2]
    assert pipeline.batches == [["a cat"] * 3 + ["a dög"], ["a dög"] * 2]
    assert missing_slots(tmp_path, PROMPTS, 3) == []
    assert len({(tmp_path / slot.file).read_bytes() for slot in slots}) > 3

    # The same noise alone, in the other order; more variations need only the new ones.
    other = tmp_path / "other"
    other.mkdir()
    made(other, slots[::-1], batch_size=1, width=16)
    for slot in slots:
        pixels = [np.asarray(Image.open(folder / slot.file)) for folder in (tmp_path, other)]
        np.testing.assert_array_equal(*pixels)
    assert missing_slots(tmp_path, PROMPTS, 4) == [Slot("a cat", 3), Slot("a dög", 3)]
    assert Slot("a cat", 0).noise(0) != Slot("a cat", 0).noise(1)


def test_the_table_is_read_as_references(tmp_path):
    made(tmp_path, missing_slots(tmp_path, PROMPTS, 2))
    table = write_table(tmp_path, PROMPTS, 2)
    references = References(str(table), "", PROMPTS)
    drawn = references.draw(["a dög"] * 2, seed=0)
    assert sorted(file.name for file in drawn) == sorted(Slot("a dög", i).file for i in (0, 1))
    assert list(json.loads(table.read_text(encoding="utf-8"))) == ["a cat", "a dög"]


def test_other_settings_are_refused(tmp_path):
    settings = {"model": "x", "arguments": {"width": 8}, "seed": 0}
    check_settings(tmp_path, settings)
    check_settings(tmp_path, settings)
    with pytest.raises(ValueError, match=r"arguments \{'width': 8\}, now it is \{\}; use anot"):
        check_settings(tmp_path, {**settings, "arguments": {}})
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        check_settings(tmp_path, settings)


def test_arguments_that_a_pipeline_lacks_are_named(tmp_path):
    check_arguments(Pipeline(), {"width": 8})
    with pytest.raises(ValueError, match="Pipeline takes no argument 'guidance'; it takes prompt"):
        check_arguments(Pipeline(), {"guidance": 3})
    with pytest.raises(ValueError, match="takes no prompt; expected a text-to-image pipeline"):
        check_arguments(lambda image: image, {})


def test_a_missing_picture_is_an_error(tmp_path):
    def one_for_all(prompt, generator, output_type):
        return SimpleNamespace(images=[Image.new("RGB", (8, 8))])

    with pytest.raises(ValueError, match="returned 1 pictures for 2 prompts"):
        make_pictures(
            one_for_all, missing_slots(tmp_path, ["a"], 2), tmp_path, seed=0, batch_size=2,
            arguments={}, advance=lambda count: None,
        )  # fmt: skip
    assert not list(tmp_path.iterdir())
