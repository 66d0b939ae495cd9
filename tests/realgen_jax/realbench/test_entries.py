"""An evaluation's prompts and entries, and how picture files are read."""

import numpy as np
import pytest
from PIL import Image

from realgen_jax.data import overlaps, read_categorised, read_prompts
from realgen_jax.realbench.entries import find_pictures, read_entries, weights_of
from realgen_jax.realbench.picture_files import decode
from realgen_jax.realbench.prompts import read_sets
from realgen_jax.realbench.results import Entry, PromptSet
from tests.helpers import golden_config
from tests.helpers.goldens import ROOT

EMBEDDED = ROOT / "realgen_jax" / "embedded"


def test_the_embedded_prompts_are_pairs_of_the_same_subject():
    pytest.importorskip("torch")
    from reward_bridge.rewards.embedded import EmbeddedPromptAccuracy

    label, sets = EmbeddedPromptAccuracy("cpu").label, {}
    for name in ("short", "long"):
        sets[name] = read_categorised(EMBEDDED / f"realbench_{name}.jsonl")
        labels = [label(prompt) for prompt, _ in sets[name]]
        assert sorted(labels) == sorted([*range(16)] * 2)
        assert len({prompt for prompt, _ in sets[name]}) == 32
    for (short, category), (long, same) in zip(sets["short"], sets["long"], strict=True):
        assert label(short) == label(long)
        assert len(short) < len(long)
        assert category == same != ""


def test_no_embedded_prompt_is_in_two_files():
    """Neither the test prompts nor those of the report are trained on."""
    files = [*EMBEDDED.glob("*.txt"), *EMBEDDED.glob("*.jsonl")]
    assert len(files) == 4
    prompts = {file.name: read_prompts(file) for file in files}
    for name in prompts:
        others = {other: prompts[other] for other in prompts if other != name}
        assert overlaps(name, prompts[name], others) == []


def test_sets_must_have_as_many_lines_as_each_other(tmp_path):
    (tmp_path / "a.txt").write_text("a boat on a lake\nsnow\n")
    (tmp_path / "b.jsonl").write_text(
        '{"prompt": "a boat", "category": "scenes"}\n{"prompt": "x"}\n'
    )
    files = {"a": tmp_path / "a.txt", "b": tmp_path / "b.jsonl"}
    short, long = read_sets(files)
    assert (short.name, short.prompts, short.categories) == ("b", ("a boat", "x"), ("scenes", ""))
    assert (long.name, long.categories) == ("a", ("", ""))
    (tmp_path / "a.txt").write_text("one\n")
    with pytest.raises(ValueError, match=r"has 1 prompts .*a\.txt.* has 2 .*b\.jsonl"):
        read_sets(files)
    (tmp_path / "b.jsonl").write_text('{"prompt": "a boat", "category": 3}\n')
    with pytest.raises(ValueError, match=r"line 1 has 3 under \"category\""):
        read_sets(files)
    with pytest.raises(ValueError, match="'a/b'"):
        read_sets({"a/b": tmp_path / "a.txt"})


def test_entries_have_names_of_their_own(tmp_path):
    config = golden_config.get_config().pretrained
    for name in (
        "runs/one/lora",
        "runs/one/best",
        "x=1/two",
        "runs/full/lora/transformer",
        "arena",
    ):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "runs/full/lora/transformer/config.json").write_text("{}")

    def names(*loras, models=(), base=True):
        found = read_entries(config, [str(word) for word in loras], models, [], None, base)
        return [entry.name for entry in found]

    one, best = tmp_path / "runs/one/lora", tmp_path / "runs/one/best"
    assert names(one, best, tmp_path / "x=1/two") == ["base", "one", "one-best", "two"]
    assert names(f"mine={one}", base=False) == ["mine"]
    with pytest.raises(ValueError, match=r"'one' names several entries .*use NAME=PATH"):
        names(one, one)
    with pytest.raises(ValueError, match="'arena' cannot name an entry"):
        names(tmp_path / "arena")
    with pytest.raises(FileNotFoundError, match="given as lora 'none'"):
        names(f"none={tmp_path / 'nothing'}")
    with pytest.raises(ValueError, match="nothing to evaluate"):
        names(base=False)
    full = str(tmp_path / "runs/full/lora")
    base, other = read_entries(config, [], [full], [], None, True)
    assert other.name == "full"
    assert weights_of(other, config).transformer == f"{full}/transformer"
    assert weights_of(base, config).model == config.model


def test_pictures_have_any_suffix_that_pillow_reads(tmp_path):
    for name in ("00000.avif", "00000_1.TIFF", "00001.heic", "._00002.png", "scores.jsonl"):
        (tmp_path / name).touch()
    entry = Entry("tool", "folder", str(tmp_path))
    pictures, problems = find_pictures(entry, [PromptSet("short", ("a", "b", "c"), ("", "", ""))])
    names = {slot: file.name for slot, file in pictures["short"].items()}
    assert names == {(0, 0): "00000.avif", (0, 1): "00000_1.TIFF"}
    assert [problem.kind for problem in problems] == ["missing", "missing"]
    assert problems[0].detail.startswith("of line 1; 00001.heic is none of AVIF, BMP")
    assert problems[1].detail == "of line 2"


def test_pictures_are_read_upright_opaque_and_in_eight_bits(tmp_path):
    def saved(image, name, **options):
        image.save(tmp_path / name, **options)
        return decode((tmp_path / name).read_bytes())

    half = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    half.putpixel((1, 0), (0, 0, 0, 0))
    np.testing.assert_array_equal(saved(half, "a.png")[:, 0], [[0, 255]] * 3)  # transparent: white
    np.testing.assert_array_equal(saved(Image.new("L", (1, 1), 7), "b.png"), np.full((3, 1, 1), 7))
    deep = Image.fromarray(np.array([[0, 257 * 200]], np.uint16))
    np.testing.assert_array_equal(saved(deep, "c.png")[:, 0], [[0, 200]] * 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    assert saved(Image.new("RGB", (6, 4)), "d.png", exif=exif).shape == (3, 6, 4)
    with pytest.raises(ValueError, match="cannot identify"):
        decode(b"no picture")


def test_every_model_is_there_again_with_each_rewriter(tmp_path):
    pretrained = golden_config.get_config().pretrained
    lora = tmp_path / "two" / "lora"
    rewriter = tmp_path / "one" / "rewriter"
    for folder in (lora, rewriter):
        folder.mkdir(parents=True)
    (rewriter / "rewriter.json").write_text("{}")
    entries = read_entries(pretrained, [str(lora)], [], [], None, True, [f"A={rewriter}"])
    assert [(entry.name, entry.rewriter) for entry in entries] == [
        ("base", ""), ("A", str(rewriter)), ("two", ""), ("two+A", str(rewriter)),
    ]  # fmt: skip
    base, with_rewriter, own, both = [weights_of(entry, pretrained) for entry in entries]
    assert base == with_rewriter
    assert own == both
    assert both.lora == str(lora)

    # Without a name it is its run's.
    assert read_entries(pretrained, [], [], [], None, True, [str(rewriter)])[1].name == "one"
    (rewriter / "rewriter.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"holds no rewriter\.json; --rewriter needs the fol"
    ):
        read_entries(pretrained, [], [], [], None, True, [str(rewriter)])
