"""Text encoders and tokenizers that are incomplete, or another model's, are refused by name."""

import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from tests.helpers.goldens import PIPELINE

pytest.importorskip("torch")

import torch
from safetensors.torch import load_file, save_file

from realgen_jax.models.flux.family import FLUX
from realgen_jax.models.prompts import embed_prompts
from realgen_jax.text_cache import open_cache
from realgen_scripts import encode_prompts
from tests.helpers.text import settings

T5 = "text_encoder_2/model.safetensors"
CLIP = "text_encoder/model.safetensors"
LAYER = "encoder.block.0.layer.1.DenseReluDense.wo.weight"


@pytest.fixture
def model(tmp_path):
    """A copy of the golden pipeline's text encoders, to damage."""
    folder = tmp_path / "model"
    for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.copytree(PIPELINE / name, folder / name)
    shutil.copy(PIPELINE / "model_index.json", folder)
    return folder


def edit(file, change):
    """Change the tensors of a file."""
    state = load_file(file)
    change(state)
    save_file(state, file, {"format": "pt"})


def encode(model, root, monkeypatch, prompts=("a photo of a cat", "a red boat")):
    """Run the program in this process; return the embeddings."""
    file = root / "prompts.txt"
    file.write_text("\n".join(prompts) + "\n")
    chosen = settings(root / "cache", 16)
    words = ["--model", model, "--prompts", file]
    for name, value in vars(chosen).items():
        words += [f"--{name}", value]
    monkeypatch.setattr(sys, "argv", ["encode_prompts.py", *map(str, words)])
    encode_prompts.main()
    return open_cache(prompts, model, FLUX.encoders, chosen).read(prompts)


def quantize(state):
    """Scaled float8, as ComfyUI's files of T5 have it."""
    scale = state[LAYER].float().abs().max() / 448
    state[LAYER] = (state[LAYER].float() / scale).to(torch.float8_e4m3fn)
    state[LAYER.replace("weight", "scale_weight")] = scale.reshape(1)


def to_integers(state):
    state[LAYER] = state[LAYER].mul(100).to(torch.int8)


def lose_tensor(state):
    del state[LAYER]


def lose_embedding(state):
    del state["shared.weight"]


def add_tensor(state):
    state["encoder.block.99.layer.0.SelfAttention.q.weight"] = torch.zeros(2, 2)


def reshape_tensor(state):
    state[LAYER] = state[LAYER].T[:3].contiguous()


def spoil_tensor(state):
    state[LAYER] = torch.full_like(state[LAYER], torch.nan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (quantize, r"text_encoder_2/model\.safetensors holds quantized weights \(.*scale_weight\)"),
        (to_integers, rf"holds quantized weights \({LAYER}\), which are not read"),
        (lose_tensor, rf"does not fit T5EncoderModel .*'missing_keys': \['{LAYER}'\]"),
        (lose_embedding, r"does not fit T5EncoderModel .*'missing_keys': .*shared\.weight"),
        (add_tensor, r"does not fit T5EncoderModel .*'unexpected_keys': .*block\.99"),
        (reshape_tensor, rf"does not fit T5EncoderModel .*'mismatched_keys': .*{LAYER}"),
        (spoil_tensor, r"the text encoder of t5 gave NaN or infinity .* 'a photo of a cat'"),
    ],
)
def test_weights_that_do_not_fit_are_refused(model, tmp_path, monkeypatch, change, message):
    edit(model / T5, change)
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as refusal:
        encode(model, tmp_path, monkeypatch)
    assert len(str(refusal.value).splitlines()) == 1
    assert not list((tmp_path / "cache").rglob("*.zarr"))


def test_files_that_hold_more_than_the_encoders_give_the_same(model, tmp_path, monkeypatch):
    """A whole T5, a whole CLIP of an old version, and a tensor that is stored twice."""
    want = encode(model, tmp_path, monkeypatch)

    def whole_t5(state):
        state["decoder.block.0.layer.0.SelfAttention.q.weight"] = torch.zeros(2, 2)
        state["lm_head.weight"] = torch.zeros(2, 2)
        state["encoder.embed_tokens.weight"] = state["shared.weight"].clone()

    def whole_clip(state):
        state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        state["text_projection.weight"] = torch.zeros(2, 2)
        state["vision_model.embeddings.class_embedding"] = torch.zeros(2)
        state["logit_scale"] = torch.zeros(())

    edit(model / T5, whole_t5)
    edit(model / CLIP, whole_clip)
    arrays = encode(model, tmp_path, monkeypatch)
    for name in ("t5", "clip"):
        np.testing.assert_array_equal(arrays[name], want[name])


def lose_vocabulary(model):
    for name in ("tokenizer.json", "spiece.model"):
        (model / "tokenizer_2" / name).unlink()


def lose_clip_vocabulary(model):
    for name in ("vocab.json", "merges.txt"):
        (model / "tokenizer" / name).unlink()


def damage_tokenizer(model):
    (model / "tokenizer_2" / "tokenizer.json").write_text("{")


def swap_tokenizers(model):
    shutil.rmtree(model / "tokenizer")
    shutil.copytree(model / "tokenizer_2", model / "tokenizer")


def lose_config(model):
    (model / "text_encoder" / "config.json").unlink()


def lose_weights(model):
    (model / "text_encoder" / "model.safetensors").unlink()


def cut_off_weights(model):
    file = model / T5
    file.write_bytes(file.read_bytes()[:-10])


def name_absent_shards(model):
    (model / T5).unlink()
    index = {"weight_map": {LAYER: "model-00001-of-00002.safetensors"}}
    (model / f"{T5}.index.json").write_text(json.dumps(index))


def stand_in_config(model):
    """A config of bitsandbytes, whose weights are quantized."""
    file = model / "text_encoder_2" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_vocabulary, r"the tokenizer in .*tokenizer_2 has \d+ tokens, and T5EncoderModel has"),
        (lose_clip_vocabulary, r"the tokenizer in .*tokenizer has 2 tokens, and CLIPTextModel has"),
        (
            swap_tokenizers,
            r"the tokenizer in .*tokenizer has 156 tokens, and CLIPTextModel has 664",
        ),
        (damage_tokenizer, r"tokenizer_2 cannot be read \(JSONDecodeError: .*Download it again"),
        (lose_config, r"text_encoder/config\.json is missing; expected a text encoder of"),
        (lose_weights, r"text_encoder holds no weights; expected model\.safetensors"),
        (
            cut_off_weights,
            r"text_encoder_2/model\.safetensors cannot be read .*incomplete download",
        ),
        (name_absent_shards, r"text_encoder_2 lacks 1 of the 1 files that .* names"),
        (stand_in_config, r"text_encoder_2/model\.safetensors holds quantized weights, which"),
    ],
)
def test_incomplete_folders_are_refused(model, tmp_path, monkeypatch, damage, message):
    damage(model)
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as refusal:
        encode(model, tmp_path, monkeypatch)
    assert len(str(refusal.value).splitlines()) == 1
    assert not list((tmp_path / "cache").rglob("*.zarr"))


def test_more_tokens_than_the_model_reads_are_refused(tmp_path, monkeypatch):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n")
    words = [f"--model={PIPELINE}", f"--prompts={file}", "--max_tokens=513"]
    monkeypatch.setattr(sys, "argv", ["encode_prompts.py", *words])
    message = (
        r"^error: config\.prompts\.max_tokens is 513; expected at most 512, as many as FLUX\.1-"
    )
    with pytest.raises(SystemExit, match=message):
        encode_prompts.main()

    pretrained = SimpleNamespace(model=PIPELINE, transformer="")
    chosen = SimpleNamespace(cache=tmp_path, device="cpu", max_tokens=513, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"max_tokens is 513; expected at most 512"):
        embed_prompts(["a cat"], pretrained, chosen, [])


def test_a_prompt_without_a_known_word_is_refused(model, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"tokenizer_2 knows no word of the prompt '猫'"):
        encode(model, tmp_path, monkeypatch, prompts=("a cat", "猫"))
    assert not list((tmp_path / "cache").rglob("*.zarr"))


def test_a_damaged_list_of_prompts_is_named(tmp_path, monkeypatch):
    (tmp_path / "prompts.json").write_text("[")
    words = ["encode_prompts.py", f"--model={PIPELINE}", f"--folder={tmp_path}"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match=r"error: .*prompts\.json is damaged \(.*remove the fold"):
        encode_prompts.main()


@pytest.mark.parametrize("text", ["[", '[{"arrays": ["t5"]}]', '[{"array": "t5"}]', "[1]", "3"])
def test_encoders_that_are_none_are_refused(text, monkeypatch):
    words = ["encode_prompts.py", f"--model={PIPELINE}", "--folder=x", f"--encoders={text}"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match=r"error: .* does not name text encoders"):
        encode_prompts.main()
