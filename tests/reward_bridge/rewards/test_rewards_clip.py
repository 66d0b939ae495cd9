"""Rewards on a CLIP, against forward passes written out, picture by picture, with PIL's resize."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from reward_bridge.preprocess import CLIP_MEAN, CLIP_STD
from reward_bridge.rewards import clip as shared
from reward_bridge.rewards import make_reward
from tests.helpers.faults import missing
from tests.helpers.goldens import GOLDENS, golden
from tests.helpers.pictures import pictures
from tests.helpers.tiny_clips import (
    DIM,
    POSITIONS,
    SIDE,
    openai_image,
    openai_state,
    openai_text,
    quick_gelu,
    token_ids,
    write_folder,
    write_tokenizer,
)

PROMPTS = [
    "a cat",
    "dog",
    "a cat",
    "the sea at night",
    "a text that is longer than the model takes",
]
NAMES = ("clip_score", "pickscore", "hpsv2", "longclip", "aesthetic")


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """By reward: its options, and its score of one picture and prompt as the authors compute it."""
    folder = tmp_path_factory.mktemp("clips")
    model, processor = write_folder(folder)

    def pixels(image, **options):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        return processor(picture, return_tensors="pt", **options).pixel_values[0]

    def cosine(image, prompt, **options):
        out = model(input_ids=token_ids(prompt)[None], pixel_values=pixels(image, **options)[None])
        return (out.logits_per_image / model.logit_scale.exp()).item()

    tensor = torch.Generator().manual_seed(1)
    head = torch.nn.Sequential(
        torch.nn.Linear(DIM, 1024),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(1024, 128),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(128, 64),
        torch.nn.Dropout(0.1),
        torch.nn.Linear(64, 16),
        torch.nn.Linear(16, 1),
    ).eval()
    for parameter in head.parameters():
        parameter.data = torch.randn(parameter.shape, generator=tensor) / parameter.shape[-1] ** 0.5
    torch.save(
        {f"layers.{key}": value for key, value in head.state_dict().items()},
        folder / "sac+logos+ava1-l14-linearMSE.pth",
    )

    def aesthetic(image, prompt):
        features = model.get_image_features(pixel_values=pixels(image)[None]).pooler_output
        return head(features / features.norm()).item()

    hps = openai_state(vision=320, text=64)  # a multiple of 80 whose heads are not as many at 64
    torch.save({"epoch": 1, "state_dict": hps}, folder / "HPS_v2.1_compressed.pt")

    def hpsv2(image, prompt):
        image = openai_image(hps, pixels(image), 80, F.gelu)
        return F.cosine_similarity(
            image, openai_text(hps, token_ids(prompt), 64, F.gelu), dim=0
        ).item()

    long = openai_state(vision=128, text=64, seed=1)
    stretched = torch.randn(POSITIONS, 64) / 8
    torch.save({**long, "positional_embedding_res": stretched}, folder / "longclip-L.pt")
    long["positional_embedding"] = torch.cat([long["positional_embedding"][:20], stretched[20:]])

    def longclip(image, prompt):
        text = openai_text(long, token_ids(prompt), 64, quick_gelu)
        return (openai_image(long, pixels(image), 64, quick_gelu) @ text).item() / 100

    path = {"path": str(folder)}
    found = {
        "clip_score": (path, lambda image, prompt: cosine(image, prompt) * 100 / 30),
        "pickscore": (path, lambda image, prompt: cosine(image, prompt) * np.exp(4.5)),
        "hpsv2": (path, hpsv2),
        "longclip": (path, longclip),
        "aesthetic": ({**path, "clip": str(folder)}, aesthetic),
    }
    assert tuple(found) == NAMES
    return SimpleNamespace(
        folder=folder,
        cosine=cosine,
        options={name: options for name, (options, _) in found.items()},
        reference={name: torch.no_grad()(reference) for name, (_, reference) in found.items()},
        rewards={name: make_reward(name, "cpu", options) for name, (options, _) in found.items()},
    )


def score(reward, images, prompts):
    with torch.inference_mode():
        got = reward(images, prompts)
    assert got.shape == (len(images),)
    assert got.dtype == torch.float32
    return got.numpy()


@pytest.mark.parametrize("size", [(SIDE, SIDE), (96, 160), (40, 32)])
@pytest.mark.parametrize("name", NAMES)
def test_score_is_the_authors_one_by_one(cases, name, size):
    images = pictures(5, *size)
    got = score(cases.rewards[name], images, PROMPTS)
    want = [
        cases.reference[name](image, prompt) for image, prompt in zip(images, PROMPTS, strict=True)
    ]
    assert np.std(want) > 1e-2 * np.abs(want).mean()
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.std(want))


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_scores_as_its_pictures_do_alone(cases, name):
    images = pictures(5, 64, 72)
    together = score(cases.rewards[name], images, PROMPTS)
    alone = [score(cases.rewards[name], images[i : i + 1], PROMPTS[i : i + 1])[0] for i in range(5)]
    np.testing.assert_allclose(together, alone, rtol=1e-6, atol=1e-6 * np.abs(together).max())


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_the_weights_not_the_scores(cases, name):
    images, want = pictures(5, SIDE, SIDE), None
    want = score(cases.rewards[name], images, PROMPTS)
    reward = make_reward(name, "cpu", {**cases.options[name], "dtype": "bfloat16"})
    got = score(reward, images, PROMPTS)
    assert {p.dtype for p in reward.model.vision_model.parameters()} == {torch.bfloat16}
    assert 0 < np.abs(got - want).max() < 0.3 * np.std(want)
    assert any(got != torch.from_numpy(got).bfloat16().float().numpy())
    if name == "pickscore":
        assert reward.scale == cases.rewards[name].scale


def test_scales_are_options(cases):
    images = pictures(5, SIDE, SIDE)
    for name, options, factor in (
        ("clip_score", {"scale": 1.0}, 30 / 100),
        ("pickscore", {"divide_by": 26.0}, 1 / 26),
        ("longclip", {"divide_by": 1.0}, 100.0),
    ):
        got = score(make_reward(name, "cpu", {**cases.options[name], **options}), images, PROMPTS)
        np.testing.assert_allclose(
            got, factor * score(cases.rewards[name], images, PROMPTS), rtol=1e-5
        )


def test_clip_score_takes_its_folders_statistics(cases, tmp_path):
    folder = tmp_path / "clip"
    shutil.copytree(cases.folder, folder)
    file = folder / "preprocessor_config.json"
    half = {"image_mean": [0.5, 0.4, 0.5], "image_std": [0.5, 0.6, 0.5]}
    file.write_text(json.dumps(json.loads(file.read_text()) | half))
    images = pictures(2, SIDE, SIDE)
    got = score(
        make_reward("clip_score", "cpu", {"path": str(folder), "scale": 1.0}), images, PROMPTS[:2]
    )
    with torch.no_grad():
        want = [
            cases.cosine(image, prompt, **half)
            for image, prompt in zip(images, PROMPTS[:2], strict=True)
        ]
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_hpsv2_resizes_as_its_package_does_but_for_rounding(cases):
    """The package resizes the float tensor, as torch does, antialiased from torchvision 0.17 on."""
    model, images = cases.rewards["hpsv2"].model, pictures(8, 96, 96)
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    features = {}
    with torch.inference_mode():
        for antialias in (True, False):
            x = F.interpolate(images / 255, (SIDE, SIDE), mode="bicubic", antialias=antialias)
            features[antialias] = model.get_image_features(
                pixel_values=(x - mean) / std
            ).pooler_output
        text = shared.text_features(model, cases.rewards["hpsv2"].tokenizer, ["a cat"] * 8)
    got = score(cases.rewards["hpsv2"], images, ["a cat"] * 8)
    package = {key: F.cosine_similarity(value, text).numpy() for key, value in features.items()}
    assert np.abs(got - package[True]).max() < 2e-2 * got.std()
    assert np.abs(got - package[False]).max() > np.abs(got - package[True]).max()


def test_folders_of_old_versions_load(cases, tmp_path):
    """pytorch_model.bin with position_ids, and a config with the end token's old id."""
    for name in ("config.json", "vocab.json", "merges.txt", "preprocessor_config.json"):
        shutil.copy(cases.folder / name, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = load_file(cases.folder / "model.safetensors")
    state["text_model.embeddings.position_ids"] = torch.arange(POSITIONS)[None]
    torch.save(state, tmp_path / "pytorch_model.bin")
    images = pictures(5, SIDE, SIDE)
    got = score(make_reward("pickscore", "cpu", {"path": str(tmp_path)}), images, PROMPTS)
    np.testing.assert_array_equal(got, score(cases.rewards["pickscore"], images, PROMPTS))


def test_longclip_goldens():
    """RealGen's Long-CLIP on a tiny random model: features, and both of its scores."""
    file, arrays = (
        GOLDENS / "10_rewards" / "longclip" / "model.safetensors",
        golden("10_rewards/longclip/io.npz"),
    )
    reward = make_reward(
        "longclip",
        "cpu",
        {"path": str(file), "tokenizer": str(GOLDENS / "10_rewards" / "clip_tokenizer")},
    )
    with torch.inference_mode():
        image = reward.model.get_image_features(
            pixel_values=torch.from_numpy(arrays["pixel_values"])
        ).pooler_output
        text = reward.model.get_text_features(
            input_ids=torch.from_numpy(arrays["token_ids"]).long()
        ).pooler_output
    for got, name in (
        (image, "image_features"),
        (text, "text_features"),
        ((image * text).sum(1), "eval_score"),
        ((image * text).sum(1) / reward.divide_by, "train_reward"),
    ):
        np.testing.assert_allclose(got, arrays[name], rtol=1e-4, atol=1e-4)


def test_longclip_token_goldens():
    """Four texts as RealGen's Long-CLIP tokenizes them, with the part of OpenAI's tokenizer (MIT)
    that they need.
    """
    tokenizer = transformers.CLIPTokenizer.from_pretrained(
        GOLDENS / "10_rewards" / "clip_tokenizer"
    )
    texts = ["a photo of a cat", "An old man's hat, 1999!", "x " * 300, ""]
    ids = golden("10_rewards/longclip_tokens.npz")["ids"]
    np.testing.assert_array_equal(shared.tokenize(tokenizer, texts, 248), ids)
    curly = shared.clean("An old man\u2019s hat, 1999!")
    np.testing.assert_array_equal(shared.tokenize(tokenizer, [curly], 248), ids[1:2])


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("\u201ca \u2018b\u2019 — c\u201d", "\"a 'b' — c\""),
        ("R&amp;B &lt;3 &amp;quot;x&amp;quot;", 'R&B <3 "x"'),
        ("&rsquo;", "'"),
        ("Ångström, 1999!", "Ångström, 1999!"),
    ],
)
def test_clean_mends_what_transformers_tokenizer_leaves(text, want):
    assert shared.clean(text) == want


def test_published_prompt_characters_are_cleaned_where_the_authors_do(cases):
    for name in ("hpsv2", "longclip"):
        reward, images = cases.rewards[name], pictures(2, SIDE, SIDE)
        same = score(reward, images, ["&#97; cat", "d&amp;#111;g"])
        np.testing.assert_array_equal(same, score(reward, images, ["a cat", "dog"]))


def test_pickscore_takes_its_tokenizer_from_elsewhere(cases, tmp_path):
    """PickScore_v1 has none of its own."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(cases.folder / name, tmp_path)
    with pytest.raises(
        FileNotFoundError,
        match=r"tokenizer\.json or vocab\.json; set .*options\.pickscore\.tokenizer",
    ):
        make_reward("pickscore", "cpu", {"path": str(tmp_path)})
    reward = make_reward(
        "pickscore", "cpu", {"path": str(tmp_path), "tokenizer": str(cases.folder)}
    )
    images = pictures(5, SIDE, SIDE)
    np.testing.assert_array_equal(
        score(reward, images, PROMPTS), score(cases.rewards["pickscore"], images, PROMPTS)
    )


@pytest.mark.parametrize(
    ("name", "option", "missing"),
    [
        ("clip_score", "path", "config.json"),
        ("pickscore", "path", "config.json"),
        ("hpsv2", "path", r"HPS_v2.1_compressed.pt"),
        ("longclip", "path", "longclip-L.pt"),
        ("aesthetic", "path", r"sac\+logos\+ava1-l14-linearMSE.pth"),
        ("aesthetic", "clip", "config.json"),
        ("longclip", "tokenizer", "tokenizer.json or vocab.json"),
        ("hpsv2", "tokenizer", "tokenizer.json or vocab.json"),
    ],
)
def test_what_is_missing_is_named(cases, name, option, missing):
    message = (
        rf"'nowhere' is neither a file nor a folder with {missing}.*; set "
        rf"config\.reward\.options\.{name}\.{option}"
    )
    with pytest.raises(FileNotFoundError, match=message):
        make_reward(name, "cpu", {**cases.options[name], option: "nowhere"})


def test_incomplete_folders_are_named(cases, tmp_path):
    shutil.copy(cases.folder / "config.json", tmp_path)
    with pytest.raises(
        FileNotFoundError,
        match=r"model\.safetensors or pytorch_model\.bin; set .*\.pickscore\.path",
    ):
        make_reward("pickscore", "cpu", {"path": str(tmp_path)})
    shutil.copy(cases.folder / "model.safetensors", tmp_path)
    shutil.copy(cases.folder / "vocab.json", tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"tokenizer\.json or merges\.txt; set .*\.clip_score\.path"
    ):
        make_reward("clip_score", "cpu", {"path": str(tmp_path)})
    shutil.copy(cases.folder / "merges.txt", tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"or processor_config\.json; set .*\.clip_score\.path"
    ):
        make_reward("clip_score", "cpu", {"path": str(tmp_path)})


def test_folders_in_shards_and_of_transformers_5_are_read(cases, tmp_path):
    whole = make_reward("clip_score", "cpu", {"path": str(cases.folder)})
    write_tokenizer(tmp_path)
    whole.model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    settings = json.loads((cases.folder / "preprocessor_config.json").read_text())
    settings |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    processor = {"processor_class": "CLIPProcessor", "image_processor": settings}
    (tmp_path / "processor_config.json").write_text(json.dumps(processor))

    reward = make_reward("clip_score", "cpu", {"path": str(tmp_path)})
    assert (tuple(reward.mean), tuple(reward.std)) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    for key, value in whole.model.state_dict().items():
        assert torch.equal(reward.model.state_dict()[key], value)
    shard = next(tmp_path.glob("model-00002-*"))
    with missing(shard), pytest.raises(FileNotFoundError, match=rf"such as {shard.name}"):
        make_reward("clip_score", "cpu", {"path": str(tmp_path)})

    # The file that the option names, not another one of its folder.
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors does not fit CLIPModel"):
        make_reward("clip_score", "cpu", {"path": str(tmp_path / "other.safetensors")})


def test_a_tokenizer_of_another_model_is_named(cases, tmp_path):
    write_tokenizer(tmp_path)
    file = tmp_path / "vocab.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "é": 54}))
    with pytest.raises(
        ValueError,
        match=r"a tokenizer of 55 tokens, but the CLIP knows 54; set .*\.longclip\.tokenizer",
    ):
        make_reward("longclip", "cpu", {**cases.options["longclip"], "tokenizer": str(tmp_path)})


BROKEN = {
    "too many": (
        lambda s: s | {"visual.extra": torch.ones(1)},
        r"keys that do not belong to this model, such as 'visual\.e",
    ),
    "missing": (
        lambda s: {k: v for k, v in s.items() if k != "visual.ln_post.bias"},
        "1 keys missing, such as 'vision",
    ),
    "no vision": (
        lambda s: {k: v for k, v in s.items() if "visual" not in k},
        "not a complete CLIP .* lacks 'vision_model",
    ),
    "shape": (
        lambda s: s | {"visual.proj": s["visual.proj"].T},
        r"visual_projection\.weight has shape",
    ),
}


@pytest.mark.parametrize("broken", list(BROKEN))
@pytest.mark.parametrize("name", ["hpsv2", "longclip"])
def test_weights_that_do_not_fit_are_named(cases, tmp_path, name, broken):
    change, message = BROKEN[broken]
    file = {"hpsv2": "HPS_v2.1_compressed.pt", "longclip": "longclip-L.pt"}[name]
    state = torch.load(cases.folder / file, weights_only=True)
    torch.save(change(state["state_dict"] if name == "hpsv2" else state), tmp_path / file)
    with pytest.raises(ValueError, match=rf"{file}.*{message}"):
        make_reward(name, "cpu", {"path": str(tmp_path), "tokenizer": str(cases.folder)})


def test_other_models_weights_are_named(cases, tmp_path):
    plain = torch.load(cases.folder / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"]
    torch.save(plain, tmp_path / "longclip-L.pt")
    with pytest.raises(
        ValueError,
        match=r"lacks .*positional_embedding_res, so it is not a Long-CLIP; set .*longclip-L\.pt",
    ):
        make_reward("longclip", "cpu", {"path": str(tmp_path)})
    head = torch.load(cases.folder / "sac+logos+ava1-l14-linearMSE.pth", weights_only=True)
    head["layers.0.weight"] = torch.ones(1024, DIM + 1)
    torch.save(head, tmp_path / "head.pth")
    with pytest.raises(
        ValueError, match=r"head\.pth .*0\.weight has shape \(1024, 17\), expected \(1024, 16\)"
    ):
        make_reward(
            "aesthetic", "cpu", {**cases.options["aesthetic"], "path": str(tmp_path / "head.pth")}
        )
    state = load_file(cases.folder / "model.safetensors")
    shutil.copy(cases.folder / "config.json", tmp_path)
    save_file(
        {key: value for key, value in state.items() if key != "logit_scale"},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(
        ValueError, match=r"does not fit CLIPModel: 1 keys missing, such as 'logit_scale'"
    ):
        make_reward("clip_score", "cpu", {"path": str(tmp_path)})
