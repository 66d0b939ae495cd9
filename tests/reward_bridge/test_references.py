"""Reference pictures, and the codec that both sides pass."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from reward_bridge.adversary import Adversary
from reward_bridge.adversary_settings import Settings
from reward_bridge.learners import make_learner
from reward_bridge.references import References, load, recode
from tests.helpers.adversaries import SETTINGS, generated, write_references
from tests.helpers.goldens import ROOT


@pytest.fixture
def folder(tmp_path):
    return write_references(tmp_path)


def test_references_by_prompt_and_by_folder(folder):
    (folder / "pairs.jsonl").write_text(
        '{"prompt": "a", "image": "0.png"}\n{"prompt": "b", "images": ["1.png", "2.png"]}\n'
    )
    (folder / "lists.json").write_text(json.dumps({"a": ["3.png"], "b": ["4.png", "5.png"]}))
    pairs = References(str(folder / "pairs.jsonl"), "", ["a", "b"])
    drawn = pairs.draw(["b", "a", "b", "b"], seed=1)
    assert drawn[1].name == "0.png"
    assert {drawn[0].name, drawn[2].name} == {"1.png", "2.png"}  # each once before any comes again
    assert drawn == pairs.draw(["b", "a", "b", "b"], seed=1)
    lists = References(str(folder / "lists.json"), str(folder), ["a"])
    assert lists.draw(["a"], 0) == [folder / "3.png"]
    unpaired = References(str(folder), "", ["anything"])
    assert len({*unpaired.draw(["x"] * 6, 0)}) == 6
    assert unpaired.draw(["x"] * 6, 0) != unpaired.draw(["x"] * 6, 1)


def test_references_that_cannot_be_used_are_named(folder):
    (folder / "pairs.jsonl").write_text(
        '{"prompt": "a", "image": "0.png"}\n{"prompt": "b", "image": "none.png"}\n'
    )
    with pytest.raises(
        ValueError, match=r"1 of 2 reference pictures cannot be used:\s+\S*none\.png does not exist"
    ):
        References(str(folder / "pairs.jsonl"), "", ["a"])
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:-60])
    with pytest.raises(ValueError, match=r"1 of 6 .*\s+\S*3\.png is damaged or not a picture"):
        References(str(folder), "", [])
    (folder / "3.png").unlink()
    (folder / "pairs.jsonl").write_text('{"prompt": "a", "image": "0.png"}\n')
    with pytest.raises(ValueError, match="no picture for 2 prompts of this run, such as 'c'"):
        References(str(folder / "pairs.jsonl"), "", ["a", "c", "c", "d"])
    (folder / "pairs.jsonl").write_text('{"prompt": "a", "image": 3}\n')
    with pytest.raises(ValueError, match=r"line 1: got images 3; expected a file under"):
        References(str(folder / "pairs.jsonl"), "", [])
    with pytest.raises(FileNotFoundError, match=r"references\.path is '/nowhere'"):
        References("/nowhere", "", [])
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match=r"references\.path: .* contains no pictures"):
        References(str(folder / "empty"), "", [])


def test_files_that_are_no_pictures_are_left_out_with_a_warning(folder, caplog):
    for name in ("a.HEIC", "b.heic", "c.txt", "._0.png", ".DS_Store"):
        (folder / name).write_bytes(b"no picture")
    drawn = References(str(folder), "", []).draw(["x"] * 6, 0)
    assert sorted({file.name for file in drawn}) == [f"{i}.png" for i in range(6)]
    assert "3 files are left out, which are not AVIF, BMP" in caplog.text
    assert caplog.text.strip().endswith(": 2 .heic, 1 .txt")
    caplog.clear()
    for name in ("a.HEIC", "b.heic", "c.txt"):
        (folder / name).unlink()
    References(str(folder), "", [])
    assert not caplog.text


def test_references_are_read_as_realbench_reads_pictures(tmp_path):
    Image.fromarray(np.full((4, 4), 128 * 257, np.uint16)).save(tmp_path / "deep.png")
    assert (load(tmp_path / "deep.png", 4, 4) == 128).all()
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (load(tmp_path / "clear.png", 4, 4) == 255).all()
    (tmp_path / "cut.png").write_bytes((tmp_path / "deep.png").read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"cut\.png is damaged or not a picture"):
        load(tmp_path / "cut.png", 4, 4)


@pytest.mark.parametrize("name", ["pairs.jsonl", "lists.json"])
def test_tables_of_references_are_utf_8(folder, name):
    prompt = "a cat,\u2028seen from above, café"
    table = {prompt: ["0.png"]} if name == "lists.json" else {"prompt": prompt, "image": "0.png"}
    text = json.dumps(table, ensure_ascii=False)
    (folder / name).write_text("\ufeff" + text + "\n", encoding="utf-8")
    assert References(str(folder / name), "", [prompt]).draw([prompt], 0) == [folder / "0.png"]
    (folder / name).write_text(text.replace("\u2028", " "), encoding="cp1252")
    with pytest.raises(ValueError, match=rf"{name}, line 1 is not UTF-8 \(byte 0xe9\)"):
        References(str(folder / name), "", [])


def test_a_file_name_with_half_a_character_is_named(folder):
    (folder / "pairs.jsonl").write_text('{"prompt": "a", "image": "\\ud83d.png"}\n')
    with pytest.raises(ValueError, match=r"line 1 has half of a surrogate pair, \\ud83d"):
        References(str(folder / "pairs.jsonl"), "", [])


def test_a_reference_is_cropped_to_the_aspect(tmp_path):
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert load(tmp_path / "wide.png", 64, 64).shape == (3, 10, 10)
    assert (load(tmp_path / "wide.png", 64, 64) == 255).all()
    assert load(tmp_path / "wide.png", 64, 128).shape == (3, 10, 20)


def test_the_codec_is_jpeg():
    images = generated(0)
    assert recode(images, "none", 90) is images
    once = recode(images, "jpeg", 90)
    assert once.shape == images.shape
    assert once.dtype == torch.uint8
    assert not torch.equal(once, images)
    assert torch.equal(once[2:3], recode(images[2:3], "jpeg", 90))  # each by itself


QUALITY = 12  # of JPEG


def accuracy_of_real_against_real(folder, side, codec):
    """Accuracy of a detector that learns to tell photographs from the same ones as poor JPEGs.

    A run would show it real and generated pictures instead. `side`: pixels of the files.
    """
    for name in ("lossless", "jpeg"):
        (folder / name).mkdir(parents=True)
    for file in sorted(
        (ROOT / "reward_bridge" / "embedded" / "references" / "photographs").glob("*.webp")
    )[::2]:
        image = Image.open(file).resize((side, side), Image.Resampling.BICUBIC)
        image.save(folder / "lossless" / f"{file.stem}.png")
        image.save(folder / "jpeg" / f"{file.stem}.jpg", quality=QUALITY)
    changes = {
        "codec": codec,
        "quality": QUALITY,
        "batch_size": 16,
        "learning_rate": 1e-3,
        "history_size": 256,
    }
    settings = Settings.read("d", {**SETTINGS, **changes})
    learner = make_learner("embedded_detector", "cpu", {})
    one = Adversary("d", learner, settings, References(str(folder / "jpeg"), "", []), "cpu", None)
    other, found = References(str(folder / "lossless"), "", []), []
    for seed in range(15):
        prompts = ["x"] * 64
        generated = torch.stack([load(file, 64, 64) for file in other.draw(prompts, 100 + seed)])
        one.observe(one.draw(prompts, seed, 64, 64), generated, prompts)
        found.append(one.update(seed)["accuracy"])
    return float(np.mean(found[-4:]))


@pytest.mark.slow
def test_real_against_real_stays_at_chance(tmp_path):
    """The files' compression must not show.

    The codec covers it, and that of larger files is gone after the resize. Without the codec it
    does show.
    """
    assert accuracy_of_real_against_real(tmp_path / "bare", 64, "none") > 0.65
    assert abs(accuracy_of_real_against_real(tmp_path / "coded", 64, "jpeg") - 0.5) < 0.05
    assert abs(accuracy_of_real_against_real(tmp_path / "large", 256, "jpeg") - 0.5) < 0.05
