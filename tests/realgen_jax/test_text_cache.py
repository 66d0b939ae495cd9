import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from realgen_jax.text_cache import TextCache, cache_folder
from tests.helpers.goldens import GOLDENS, PIPELINE, golden

pytest.importorskip("transformers")
SCRIPT = GOLDENS.parents[1] / "scripts" / "encode_prompts.py"
PROMPTS = json.loads((GOLDENS / "08_pipeline" / "prompts.json").read_text())["prompts"]


def encode(tmp_path, prompts, *options):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts) + "\n")
    words = [
        sys.executable,
        SCRIPT,
        "--model",
        PIPELINE,
        "--prompts",
        file,
        "--cache",
        tmp_path,
        "--max_tokens",
        "16",
    ]
    done = subprocess.run([*words, *options], capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


def test_embeddings_match_the_golden_and_are_made_once(tmp_path):
    want = golden("08_pipeline/text.npz")
    folder = encode(tmp_path, PROMPTS, "--dtype", "float32")
    assert folder == str(cache_folder(tmp_path, PIPELINE, PROMPTS, 16, "float32"))
    cache = TextCache(cache_folder(tmp_path, PIPELINE, PROMPTS, 16, "float32"), PROMPTS)
    t5, clip = cache.read(PROMPTS)
    np.testing.assert_allclose(t5, want["prompt_embeds"], rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(clip, want["pooled_prompt_embeds"], rtol=1e-4, atol=2e-5)
    np.testing.assert_array_equal(cache.read([PROMPTS[i] for i in (1, 0, 1)])[0], t5[[1, 0, 1]])
    made = {file: file.stat().st_mtime_ns for file in cache.folder.rglob("*") if file.is_file()}
    encode(tmp_path, PROMPTS, "--dtype", "float32")
    assert made == {
        file: file.stat().st_mtime_ns for file in cache.folder.rglob("*") if file.is_file()
    }
    half = TextCache(cache_folder(tmp_path, PIPELINE, PROMPTS, 16, "bfloat16"), PROMPTS)
    assert half.folder != cache.folder
    assert encode(tmp_path, PROMPTS) == str(half.folder)
    assert half.read(PROMPTS)[0].dtype == ml_dtypes.bfloat16
    np.testing.assert_allclose(half.read(PROMPTS)[0].astype(np.float32), t5, atol=0.1)


def test_an_interrupted_encoding_goes_on(tmp_path):
    cache = TextCache(tmp_path, ["a", "b", "c"])
    rows = np.arange(3 * 2 * 4, dtype=np.float32).reshape(3, 2, 4)
    cache.append(rows[:2], rows[:2, 0])
    again = TextCache(tmp_path, ["a", "b", "c"])
    assert (again.rows_done, again.complete) == (2, False)
    with pytest.raises(
        ValueError, match=r"holds 2 of 3 prompts; run scripts/encode_prompts\.py to the end"
    ):
        again.read(["a"])
    again.append(rows[2:], rows[2:, 0])
    assert again.complete
    np.testing.assert_array_equal(
        TextCache(tmp_path, ["a", "b", "c"]).read(["c", "a"])[0], rows[[2, 0]]
    )


@pytest.mark.slow
def test_two_processes_that_fill_one_cache_do_not_mix(tmp_path):
    prompts = [f"a prompt about number {i}" for i in range(48)]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts) + "\n")

    def words(cache):
        options = {"--model": PIPELINE, "--prompts": file, "--cache": cache, "--max_tokens": 16}
        return [
            sys.executable,
            str(SCRIPT),
            *(str(word) for pair in options.items() for word in pair),
        ]

    both = [subprocess.Popen(words(tmp_path / "both"), stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    subprocess.run(words(tmp_path / "alone"), check=True, stdout=subprocess.DEVNULL)
    together, alone = (
        TextCache(cache_folder(tmp_path / name, PIPELINE, prompts, 16, "bfloat16"), prompts).read(
            prompts
        )
        for name in ("both", "alone")
    )
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_folder_depends_on_prompts_and_encoders(tmp_path):
    import shutil

    model = tmp_path / "model"
    shutil.copytree(PIPELINE, model)
    first = cache_folder(tmp_path, model, ["a"], 16, "float32")
    assert first != cache_folder(tmp_path, model, ["b"], 16, "float32")
    assert first != cache_folder(tmp_path, model, ["a"], 8, "float32")
    assert first == cache_folder(tmp_path, PIPELINE, ["a"], 16, "float32")
    weights = model / "text_encoder_2" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert first != cache_folder(tmp_path, model, ["a"], 16, "float32")
    shutil.rmtree(model / "tokenizer_2")
    with pytest.raises(
        FileNotFoundError, match=r"tokenizer_2 is missing; expected a FluxPipeline folder"
    ):
        cache_folder(tmp_path, model, ["a"], 16, "float32")
