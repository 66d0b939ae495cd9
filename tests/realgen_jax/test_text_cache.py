"""The cache of text embeddings, and the program that fills it."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from realgen_jax.models import FAMILIES
from realgen_jax.models.family import Encoder
from realgen_jax.models.flux.family import FLUX
from realgen_jax.models.prompts import embed_prompts
from realgen_jax.text_cache import (
    TextCache,
    cache_folder,
    encoders_from_json,
    encoders_to_json,
    ensure_encoded,
    open_cache,
)
from tests.helpers.goldens import PIPELINE, ROOT, golden

pytest.importorskip("transformers")
from realgen_scripts import encode_prompts

SCRIPT = ROOT / "scripts" / "encode_prompts.py"
PROMPTS = json.loads((PIPELINE.parent / "prompts.json").read_text())["prompts"]
FLOAT32 = {"max_tokens": 16, "dtype": "float32"}

ENCODERS = FLUX.encoders


def folder_of(root, prompts, model=PIPELINE, encoders=ENCODERS, **changes):
    return cache_folder(root, model, prompts, encoders, **{**FLOAT32, **changes})


def prompt_file(tmp_path, prompts):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts) + "\n")
    return file


def program_arguments(root, file, model=PIPELINE):
    options = {"--model": model, "--prompts": file, "--cache": root, "--max_tokens": 16}
    return [str(word) for option in options.items() for word in option]


def test_embeddings_match_the_golden_and_are_made_once(tmp_path):
    settings = SimpleNamespace(cache=tmp_path, device="cpu", **FLOAT32)
    prompts = [*PROMPTS, PROMPTS[0]]
    command = [sys.executable, str(SCRIPT)]
    cache = ensure_encoded(prompts, PIPELINE, ENCODERS, settings, command)
    assert (cache.folder, cache.prompts) == (folder_of(tmp_path, PROMPTS), PROMPTS)

    want = golden("08_pipeline/text.npz")
    arrays = cache.read(PROMPTS)
    assert sorted(arrays) == ["clip", "t5"]
    np.testing.assert_allclose(arrays["t5"], want["prompt_embeds"], rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(arrays["clip"], want["pooled_prompt_embeds"], rtol=1e-4, atol=2e-5)
    some = cache.read([PROMPTS[i] for i in (1, 0, 1)])
    np.testing.assert_array_equal(some["t5"], arrays["t5"][[1, 0, 1]])

    # A complete cache does not need the program.
    no_program = [sys.executable, "-c", "raise SystemExit(1)"]
    again = ensure_encoded(prompts, PIPELINE, ENCODERS, settings, no_program)
    np.testing.assert_array_equal(again.read(PROMPTS)["clip"], arrays["clip"])
    with pytest.raises(ChildProcessError, match=r"the text encoders failed .* are kept in"):
        ensure_encoded(["new"], PIPELINE, ENCODERS, settings, no_program)


def test_the_program_encodes_once_and_prints_the_folder(tmp_path, monkeypatch, capsys):
    file = prompt_file(tmp_path, PROMPTS)
    arguments = program_arguments(tmp_path, file)
    monkeypatch.setattr(sys, "argv", ["encode_prompts.py", *arguments])
    encode_prompts.main()
    folder = folder_of(tmp_path, PROMPTS, dtype="bfloat16")
    assert capsys.readouterr().out.splitlines()[-1] == str(folder)

    arrays = TextCache(folder, PROMPTS).read(PROMPTS)
    want = golden("08_pipeline/text.npz")["prompt_embeds"]
    assert arrays["t5"].dtype == arrays["clip"].dtype == ml_dtypes.bfloat16
    np.testing.assert_allclose(arrays["t5"].astype(np.float32), want, atol=0.1)

    def written():
        files = [file for file in folder.rglob("*") if file.is_file()]
        return {file: file.stat().st_mtime_ns for file in files}

    before = written()
    encode_prompts.main()
    assert written() == before


def test_the_negative_prompt_is_encoded_too(tmp_path, monkeypatch):
    """So that the other programs find the cache complete."""
    model = tmp_path / "model"
    for name in ("tokenizer_2", "text_encoder_2"):
        shutil.copytree(PIPELINE / name, model / name)
    (model / "model_index.json").write_text('{"_class_name": "MadeUpPipeline"}')
    monkeypatch.setitem(FAMILIES, "MadeUpPipeline", "tests.helpers.made_up:MADE_UP")
    words = program_arguments(tmp_path, prompt_file(tmp_path, PROMPTS), model=model)
    monkeypatch.setattr(sys, "argv", ["encode_prompts.py", *words])
    encode_prompts.main()

    pretrained = SimpleNamespace(model=model, transformer="")
    settings = SimpleNamespace(cache=tmp_path, device="cpu", max_tokens=16, dtype="bfloat16")
    no_program = [sys.executable, "-c", "raise SystemExit(1)"]
    cache = embed_prompts(PROMPTS, pretrained, settings, no_program)
    assert cache.prompts == [*PROMPTS, ""]
    assert cache.read([""])["words"].shape[:2] == (1, 16)


def test_prompts_that_are_cut_are_told_at_every_start(tmp_path, monkeypatch, capsys):
    long = "a picture of a tabby cat on a red motorcycle in the rain at night with old silver coins"
    prompts = ["a boat", long, f"{long} and a flower"]
    words = program_arguments(tmp_path, prompt_file(tmp_path, prompts))
    monkeypatch.setattr(sys, "argv", ["encode_prompts.py", *words])
    encode_prompts.main()
    message = (
        "warning: 2 of 3 prompts are longer than 16 tokens (config.prompts.max_tokens) and are cut "
        f"there; the first of them: {long!r}"
    )
    assert capsys.readouterr().err.strip().endswith(message)

    # A program that finds them in the cache says so too; it does not call the encoders.
    pretrained = SimpleNamespace(model=PIPELINE, transformer="")
    settings = SimpleNamespace(cache=tmp_path, device="cpu", max_tokens=16, dtype="bfloat16")
    no_program = [sys.executable, "-c", "raise SystemExit(1)"]
    for _ in range(2):
        embed_prompts(prompts, pretrained, settings, no_program)
        assert capsys.readouterr().out == message + "\n"


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, r"error: .* holds no model_index\.json of diffusers"),
        (
            '{"_class_name": "X"}',
            "error: .* has \"_class_name\" 'X'.* expected .*one of FluxPipeline",
        ),
    ],
)
def test_an_unknown_pipeline_is_refused(tmp_path, monkeypatch, index, message):
    if index is not None:
        (tmp_path / "model_index.json").write_text(index)
    arguments = program_arguments(tmp_path, prompt_file(tmp_path, ["a"]), model=tmp_path)
    monkeypatch.setattr(sys, "argv", ["encode_prompts.py", *arguments])
    with pytest.raises(SystemExit, match=message):
        encode_prompts.main()


def test_an_interrupted_encoding_continues(tmp_path):
    cache = TextCache(tmp_path, ["a", "b", "c"])
    states = np.arange(3 * 2 * 4, dtype=np.float32).reshape(3, 2, 4)
    assert cache.missing_rows() == [0, 1, 2]
    cache.write(0, {"states": states[:2], "pooled": states[:2, 0]})

    again = TextCache(tmp_path, ["a", "b", "c"])
    assert again.missing_rows() == [2]
    with pytest.raises(OSError, match=r"text embeddings in .* are missing or damaged .* remove th"):
        again.read(["a", "c"])
    again.write(2, {"states": states[2:], "pooled": states[2:, 0]})
    assert again.missing_rows() == []

    complete = TextCache(tmp_path, ["a", "b", "c"])
    assert complete.rows(["c", "a"]).tolist() == [2, 0]
    with pytest.raises(KeyError):
        complete.rows(["d"])
    for arrays in (complete.read(["c", "a"]), complete.read_rows(np.array([2, 0]))):
        assert sorted(arrays) == ["pooled", "states"]
        np.testing.assert_array_equal(arrays["states"], states[[2, 0]])
        np.testing.assert_array_equal(arrays["pooled"], states[[2, 0], 0])


def remove_chunks(folder):
    shutil.rmtree(folder / "t5.zarr" / "c")


def remove_row(folder):
    (folder / "clip.zarr" / "c" / "1" / "0").unlink()


def cut_off_row(folder):
    os.truncate(folder / "t5.zarr" / "c" / "1" / "0" / "0", 100)


def empty_row(folder):
    os.truncate(folder / "clip.zarr" / "c" / "1" / "0", 0)


def change_a_byte(folder):
    file = folder / "t5.zarr" / "c" / "1" / "0" / "0"
    content = bytearray(file.read_bytes())
    content[7] ^= 1
    file.write_bytes(content)


def remove_array(folder):
    shutil.rmtree(folder / "clip.zarr")


def damage_metadata(folder):
    os.truncate(folder / "t5.zarr" / "zarr.json", 60)


def remove_progress(folder):
    (folder / "progress.json").unlink()


def damage_progress(folder):
    os.truncate(folder / "progress.json", 20)


def damage_prompts(folder):
    os.truncate(folder / "prompts.json", 5)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """The root of a complete cache of PROMPTS in float32, and its arrays."""
    root = tmp_path_factory.mktemp("encoded")
    arrays = fill(root)
    return root, arrays


def fill(root):
    """Fill the cache of PROMPTS with the real encoders, in this process; return its arrays."""
    settings = SimpleNamespace(cache=root, device="cpu", **FLOAT32)
    cache = open_cache(PROMPTS, PIPELINE, ENCODERS, settings)
    args = SimpleNamespace(model=PIPELINE, folder=None, **vars(settings))
    encode_prompts.encode_missing(cache, ENCODERS, args)
    return cache.read(PROMPTS)


@pytest.mark.parametrize(
    "damage",
    [
        remove_chunks,
        remove_row,
        cut_off_row,
        empty_row,
        change_a_byte,
        remove_array,
        damage_metadata,
        remove_progress,
        damage_progress,
        damage_prompts,
    ],
)
def test_what_is_missing_or_damaged_is_encoded_again(encoded, tmp_path, damage):
    root, arrays = encoded
    shutil.copytree(root, tmp_path / "copy")
    folder = folder_of(tmp_path / "copy", PROMPTS)
    damage(folder)
    again = fill(tmp_path / "copy")
    for name in ("clip", "t5"):
        np.testing.assert_array_equal(again[name], arrays[name])
    assert json.loads((folder / "prompts.json").read_text()) == PROMPTS
    assert TextCache(folder, PROMPTS).missing_rows() == []


def test_rows_that_vanish_while_they_are_used_end_it(encoded, tmp_path):
    root, _ = encoded
    shutil.copytree(root, tmp_path / "copy")
    folder = folder_of(tmp_path / "copy", PROMPTS)
    cache = TextCache(folder, PROMPTS)
    cache.read(PROMPTS)
    for damage in (change_a_byte, cut_off_row, remove_row, remove_progress):
        damage(folder)
        with pytest.raises(OSError, match=rf"^text embeddings in {folder} are missing or damaged"):
            cache.read(PROMPTS)


def test_encoders_survive_a_command_line_argument():
    two = Encoder(("states", "pooled"), "r", tokenizer="tokenizer", model="text_encoder")
    assert encoders_from_json(encoders_to_json([*ENCODERS, two])) == [*ENCODERS, two]


def test_rows_of_zeros_are_stored(tmp_path):
    cache = TextCache(tmp_path, ["a"])
    cache.write(0, {"states": np.zeros((1, 2, 3), np.float32)})
    assert cache.missing_rows() == []
    assert not cache.read(["a"])["states"].any()


def test_a_program_that_encodes_nothing_is_not_believed(tmp_path):
    settings = SimpleNamespace(cache=tmp_path, device="cpu", **FLOAT32)
    idle = [sys.executable, "-c", ""]
    with pytest.raises(OSError, match=r"still lacks the embeddings of 1 prompts .* such as 'a'"):
        ensure_encoded(["a"], PIPELINE, ENCODERS, settings, idle)


@pytest.mark.slow
def test_two_processes_that_fill_one_cache_do_not_mix(tmp_path):
    prompts = [f"a prompt about number {i}" for i in range(48)]
    file = prompt_file(tmp_path, prompts)

    def start(root):
        words = [sys.executable, str(SCRIPT), *program_arguments(root, file)]
        return subprocess.Popen(words, stdout=subprocess.DEVNULL)

    processes = [start(tmp_path / name) for name in ("both", "both", "alone")]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    together, alone = (
        TextCache(folder_of(tmp_path / name, prompts, dtype="bfloat16"), prompts).read(prompts)
        for name in ("both", "alone")
    )
    for name in ("t5", "clip"):
        np.testing.assert_array_equal(together[name], alone[name])


def test_the_folder_depends_on_prompts_and_encoders(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(PIPELINE, model)
    first = folder_of(tmp_path, ["a"], model)
    assert first == folder_of(tmp_path, ["a"])
    assert first != folder_of(tmp_path, ["b"], model)
    assert first != folder_of(tmp_path, ["a"], model, max_tokens=8)
    assert first != folder_of(tmp_path, ["a"], model, dtype="bfloat16")
    assert first != folder_of(tmp_path, ["a"], model, encoders=ENCODERS[:1])

    weights = model / "text_encoder_2" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert first != folder_of(tmp_path, ["a"], model)

    shutil.rmtree(model / "tokenizer_2")
    message = r"tokenizer_2 is missing; expected a pipeline folder of diffusers with tokenizer_2/"
    with pytest.raises(FileNotFoundError, match=message):
        folder_of(tmp_path, ["a"], model)
