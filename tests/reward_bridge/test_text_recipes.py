"""Text encoders of SD3 and Z-Image against recorded ones of diffusers and transformers."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Model

from reward_bridge.encoders import load, prepare
from tests.helpers.goldens import golden
from tests.helpers.text import SD3, SD3_ENCODERS, ZIMAGE, ZIMAGE_ENCODERS, fill, golden_prompts

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
SD3_PROMPTS = golden_prompts(SD3)
ZIMAGE_PROMPTS = golden_prompts(ZIMAGE)


def zimage_tokens(prompts, max_tokens, model=ZIMAGE):
    return prepare(model, ZIMAGE_ENCODERS[0]).tokens(prompts, max_tokens)


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    """The arrays of the golden prompts and "", through the cache."""
    root = tmp_path_factory.mktemp("sd3")
    return fill(root, SD3, SD3_ENCODERS, SD3_PROMPTS, 16).read(SD3_PROMPTS)


@pytest.mark.parametrize(
    ("encoder", "name"), list(zip(SD3_ENCODERS, ("clip_l", "clip_g", "t5"), strict=True))
)
def test_sd3s_tokens_are_diffusers(encoder, name):
    tokens = prepare(SD3, encoder).tokens(SD3_PROMPTS, 16)
    want = golden("12_sd3/text.npz")[f"{name}_input_ids"]
    np.testing.assert_array_equal(tokens.ids.numpy(), want)


@pytest.mark.parametrize("name", ["clip_l", "clip_g", "t5"])
def test_sd3s_states_are_diffusers(sd3, name):
    want = golden("12_sd3/text.npz")[f"{name}_hidden"]
    np.testing.assert_allclose(sd3[name], want, **CLOSE)


def test_sd3s_arrays_join_to_what_the_pipeline_is_given(sd3):
    want = golden("12_sd3/text.npz")
    clip = np.concatenate([sd3["clip_l"], sd3["clip_g"]], axis=-1)
    rest = sd3["t5"].shape[-1] - clip.shape[-1]
    text = np.concatenate([np.pad(clip, ((0, 0), (0, 0), (0, rest))), sd3["t5"]], axis=1)
    pooled = np.concatenate([sd3["clip_l_pooled"], sd3["clip_g_pooled"]], axis=-1)
    for name, got in {"prompt_embeds": text, "pooled_prompt_embeds": pooled}.items():
        np.testing.assert_allclose(got[:-1], want[name], **CLOSE)
        np.testing.assert_allclose(got[-1:], want[f"negative_{name}"], **CLOSE)


def test_zimages_tokens_and_states_are_diffusers(tmp_path):
    want = golden("13_zimage/text.npz")
    tokens = zimage_tokens(ZIMAGE_PROMPTS, 96)
    assert tokens.lengths.tolist() == want["cap_lens"].tolist() == [44, 68, 18]
    np.testing.assert_array_equal(tokens.ids.numpy(), want["input_ids"])

    arrays = fill(tmp_path, ZIMAGE, ZIMAGE_ENCODERS, ZIMAGE_PROMPTS, 96).read(ZIMAGE_PROMPTS)
    assert arrays["caption"].shape == (3, 96, 24)
    assert arrays["length"].dtype == np.int32
    np.testing.assert_array_equal(arrays["length"], want["cap_lens"])
    np.testing.assert_allclose(arrays["caption"][:, :68], want["cap_feats"], **CLOSE)
    for row, length in enumerate(arrays["length"]):
        assert not arrays["caption"][row, length:].any()
        assert arrays["caption"][row, :length].any(axis=-1).all()


def test_chats_are_as_long_as_the_longest_up_to_32(tmp_path):
    short = [ZIMAGE_PROMPTS[0], ZIMAGE_PROMPTS[2]]
    assert zimage_tokens(short, 512).ids.shape == (2, 64)
    assert zimage_tokens(short[1:], 512).ids.shape == (1, 32)

    # The template counts: the prompts alone have 26, 50 and 0 tokens.
    tokens = zimage_tokens(ZIMAGE_PROMPTS, 40)
    assert tokens.cut == (0, 1)
    assert tokens.lengths.tolist() == [40, 40, 18]
    assert tokens.ids.shape == (3, 64)

    # Qwen3 is causal, so what is kept of a prompt that was cut is what it was before.
    arrays = fill(tmp_path, ZIMAGE, ZIMAGE_ENCODERS, ZIMAGE_PROMPTS, 40).read(ZIMAGE_PROMPTS)
    want = golden("13_zimage/text.npz")["cap_feats"]
    np.testing.assert_allclose(arrays["caption"][:, :40], want[:, :40], **CLOSE)
    assert not arrays["caption"][:, 40:].any()


@pytest.mark.parametrize(
    ("model", "encoders"), [(SD3, SD3_ENCODERS), (ZIMAGE, ZIMAGE_ENCODERS)], ids=["sd3", "zimage"]
)
def test_a_prompt_alone_is_what_it_is_among_others(tmp_path, model, encoders):
    prompts = golden_prompts(model)
    together = fill(tmp_path, model, encoders, prompts, 96).read(prompts)
    for row, prompt in enumerate(prompts):
        alone = fill(tmp_path, model, encoders, [prompt], 96).read([prompt])
        for name, array in alone.items():
            want = together[name][row]
            if name == "caption":
                want = want[: array.shape[1]]
            np.testing.assert_allclose(array[0], want, **CLOSE)


def test_bfloat16_is_kept_and_lengths_are_integers(tmp_path):
    arrays = fill(tmp_path, ZIMAGE, ZIMAGE_ENCODERS, ZIMAGE_PROMPTS, 96, "bfloat16").read_rows(
        np.arange(3)
    )
    assert (arrays["caption"].dtype.name, arrays["length"].dtype.name) == ("bfloat16", "int32")
    want = golden("13_zimage/text.npz")["cap_feats"]
    np.testing.assert_allclose(arrays["caption"][:, :68].astype(np.float32), want, atol=0.1)


@torch.inference_mode()
def test_qwens_last_layer_is_not_run():
    prepared = prepare(ZIMAGE, ZIMAGE_ENCODERS[0])
    qwen = load(prepared, torch.float32, "cpu")
    assert len(qwen.layers) == 2

    tokens = prepared.tokens(ZIMAGE_PROMPTS, 96)
    caption, _ = prepared.recipe.arrays(qwen, tokens.ids, tokens.lengths)
    whole = Qwen3Model.from_pretrained(ZIMAGE / "text_encoder", dtype=torch.float32)
    want = whole(tokens.ids[:, :68], output_hidden_states=True).hidden_states[-2]
    for row, length in enumerate(tokens.lengths):
        torch.testing.assert_close(caption[row, :length], want[row, :length], rtol=0, atol=0)


def test_a_whole_language_model_gives_the_same(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(ZIMAGE, model)
    file = model / "text_encoder" / "model.safetensors"
    state = {f"model.{key}": value for key, value in load_file(file).items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, file, {"format": "pt"})
    config = model / "text_encoder" / "config.json"
    entries = json.loads(config.read_text())
    config.write_text(json.dumps(entries | {"architectures": ["Qwen3ForCausalLM"]}))

    want = fill(tmp_path, ZIMAGE, ZIMAGE_ENCODERS, ZIMAGE_PROMPTS, 96).read(ZIMAGE_PROMPTS)
    got = fill(tmp_path, model, ZIMAGE_ENCODERS, ZIMAGE_PROMPTS, 96).read(ZIMAGE_PROMPTS)
    np.testing.assert_array_equal(got["caption"], want["caption"])
