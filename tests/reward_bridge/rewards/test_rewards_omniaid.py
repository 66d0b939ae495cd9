"""OmniAID on CLIP and DINOv3, against goldens and against plain towers with dense weights."""

import copy

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from reward_bridge.preprocess import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from reward_bridge.rewards import make_reward
from reward_bridge.rewards.mixture import MixtureDetector, Sizes, use_experts
from tests.helpers.goldens import GOLDENS, golden
from tests.helpers.pictures import as_pil, photographs
from tests.helpers.random_detectors import (
    HEADS,
    SIZE,
    make_case,
    normalized,
    save,
)

STATISTICS = {"omniaid": (CLIP_MEAN, CLIP_STD), "omniaid_dino": (IMAGENET_MEAN, IMAGENET_STD)}


def dense_score(case, pixels, top_k=2):
    """One picture by the plain tower, with the experts added into its weights."""
    if case.extractor is None:
        feature = case.tower.embeddings(pixels)[0, 1:].mean(0)
    else:
        feature = case.extractor(pixels).pooler_output[0]
    w1, b1, w2, b2 = case.router
    logits = (w2 @ (w1 @ feature + b1).clamp(min=0) + b2).numpy()
    chosen = np.argsort(-logits)[:top_k]
    gates = dict(zip(chosen, np.exp(logits[chosen]) / np.exp(logits[chosen]).sum(), strict=True))
    tower, dense = copy.deepcopy(case.tower), case.tower.state_dict()
    for key, experts in case.experts.items():
        always = {len(experts) - 1: 1.0} if case.outputs < len(experts) else {}
        low_rank = [
            float(g) * u @ torch.diag(s) @ v
            for e, g in {**gates, **always}.items()
            for u, s, v in [experts[e]]
        ]
        dense[key] = dense[key] + sum(low_rank)
    tower.load_state_dict(dense)
    weight, bias = case.head
    return (weight @ tower(pixels).pooler_output[0] + bias).softmax(0)[0].item()


CASES = {
    "hybrid": ("omniaid", {}, {}),
    "not hybrid": ("omniaid", {"outputs": 4}, {}),
    "top 1, rank 1": ("omniaid", {"rank": 1}, {"top_k": 1}),
    "patch mean": ("omniaid", {"extractor": False}, {"routing": "patch_mean"}),
    "lora": ("omniaid", {"lora": True}, {}),
    "dino": ("omniaid_dino", {}, {"size": SIZE}),
    "dino, gated": (
        "omniaid_dino",
        {"use_gated_mlp": True, "hidden_act": "silu", "mlp_bias": False},
        {"size": SIZE},
    ),
    "dino, lora": ("omniaid_dino", {"lora": True, "key_bias": True}, {"size": SIZE}),
}


@pytest.mark.parametrize("name", CASES)
def test_omniaid_is_the_dense_model_of_each_picture(name, tmp_path):
    kind, sizes, options = CASES[name]
    case, images = make_case(kind, **sizes), photographs(SIZE, SIZE)
    reward = make_reward(
        kind, "cpu", {**save(case.state, tmp_path), **HEADS, "resize_first": 0, **options}
    )
    with torch.inference_mode():
        got, single = (
            reward(images, [""] * 8),
            [reward(image[None], [""]).item() for image in images],
        )
        top_k = options.get("top_k", 2)
        want = [dense_score(case, normalized(p, *STATISTICS[kind]), top_k) for p in as_pil(images)]
    assert got.dtype == torch.float32
    assert np.std(want) > 0.02
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(got, single, rtol=1e-5)
    assert not any(parameter.requires_grad for parameter in reward.model.parameters())


@pytest.mark.parametrize("resize_first", [0, 96])
@pytest.mark.parametrize("kind", ["omniaid", "omniaid_dino"])
def test_omniaid_resizes_as_pil(kind, resize_first, tmp_path):
    case, images = make_case(kind), photographs(53, 61)
    options = {**save(case.state, tmp_path), **HEADS, "resize_first": resize_first}
    reward = make_reward(
        kind, "cpu", {**options, **({"size": SIZE} if kind == "omniaid_dino" else {})}
    )
    want = []
    for picture in as_pil(images):
        for side in (resize_first, SIZE):
            picture = picture.resize((side, side), Image.Resampling.BILINEAR) if side else picture
        want.append(dense_score(case, normalized(picture, *STATISTICS[kind])))
    with torch.inference_mode():
        got = reward(images, [""] * 8)
    np.testing.assert_allclose(got, want, atol=1e-5)


GOLDEN = {
    "omniaid_clip": ("omniaid", HEADS),
    "omniaid_clip_lora": ("omniaid", HEADS),
    "omniaid_v1_server": ("omniaid", {**HEADS, "routing": "patch_mean"}),
    "omniaid_dino": ("omniaid_dino", {"heads": 2, "size": 32}),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_omniaid_matches_the_goldens(name):
    kind, options = GOLDEN[name]
    io = {
        key: torch.from_numpy(value) for key, value in golden(f"10_rewards/{name}/io.npz").items()
    }
    path = GOLDENS / "10_rewards" / name / "model.safetensors"
    model = make_reward(kind, "cpu", {"path": str(path), **options}).model
    with torch.inference_mode():
        features, logits = model.routing_features(io["pixel_values"]), model(io["pixel_values"])
        real, fake = logits.softmax(-1).unbind(-1)
        got = {"routing_features": features, "gating_logits": model.router(features)}
        got |= {
            "final_gates": model.gates(features),
            "logits": logits,
            "prob_fake": fake,
            "prob_real": real,
        }
        if "pixel_values_rect" in io:
            got["logits_rect"] = model(io["pixel_values_rect"])
    got["reward"] = real
    compared = got.keys() & io.keys()
    assert compared & {"logits", "prob_real"}
    for key in compared:
        np.testing.assert_allclose(got[key], io[key], rtol=1e-4, atol=1e-5, err_msg=key)


def test_published_files_would_fit():
    """The numbers of tensors and elements are those of checkpoint_omniaid_dino_v2.pth and
    effort_clip_L14_trainOn_sdv14.pth.
    """
    large = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    }
    dino = transformers.DINOv3ViTConfig(**large, num_register_tokens=4)
    with torch.device("meta"):
        towers = [transformers.DINOv3ViTModel(dino) for _ in range(2)]
        model = MixtureDetector(
            *towers, Sizes(width=1024, experts=6, rank=1, hidden=256, outputs=5, top_k=2)
        )
        clip = transformers.CLIPVisionModel(
            transformers.CLIPVisionConfig(**large, image_size=224, patch_size=14)
        )
        effort = torch.nn.ModuleList([use_experts(clip, 1, 1), torch.nn.Linear(1024, 2)])
    tensors, unneeded = (
        model.state_dict().values(),
        24 * 4,
    )  # U_r, V_r and a norm of every projection are left out
    assert len(tensors) + 3 * unneeded == 2852
    assert sum(x.numel() for x in tensors) + unneeded * (2 * 1024 * 1023 + 1) == 808_835_239
    assert len(effort.state_dict()) == 681
    assert sum(x.numel() for x in effort.state_dict().values()) == 303_378_530


@pytest.mark.parametrize("kind", ["omniaid", "omniaid_dino"])
def test_omniaid_in_bfloat16(kind, tmp_path):
    options = {**save(make_case(kind).state, tmp_path), **HEADS, "resize_first": 0}
    options |= {"size": SIZE} if kind == "omniaid_dino" else {}
    exact, coarse = (
        make_reward(kind, "cpu", {**options, "dtype": dtype}) for dtype in ("float32", "bfloat16")
    )
    with torch.inference_mode():
        want, got = (reward(photographs(SIZE, SIZE), [""] * 8) for reward in (exact, coarse))
    assert got.dtype == torch.float32
    assert coarse.model.head.weight.dtype == torch.float32
    assert next(coarse.model.tower.parameters()).dtype == torch.bfloat16
    assert 0 < (got - want).abs().max() < 0.05
    for name, buffer in exact.model.named_buffers():
        assert torch.equal(dict(coarse.model.named_buffers())[name], buffer)


def test_omniaid_refuses_a_router_that_does_not_fit(tmp_path):
    full, server = make_case("omniaid").state, make_case("omniaid", extractor=False).state
    for message, state, options in (
        (r"has no feature_extractor tower.*omniaid\.routing to 'patch_mean'", server, {}),
        (
            r"has a feature_extractor tower.*routing to 'feature_extractor'",
            full,
            {"routing": "patch_mean"},
        ),
        (
            r"got omniaid\.routing 'mean'; expected 'feature_extractor' or 'patch_mean'",
            full,
            {"routing": "mean"},
        ),
        (r"got omniaid\.top_k 4; expected 1 to 3", full, {"top_k": 4}),
        (
            r"4 experts and a router of 2 outputs; expected 4 or 3",
            make_case("omniaid", outputs=2).state,
            {},
        ),
        (r"no experts", {key: value for key, value in full.items() if "_experts" not in key}, {}),
    ):
        with pytest.raises(ValueError, match=message):
            make_reward("omniaid", "cpu", {**save(state, tmp_path), **HEADS, **options})
    with pytest.raises(
        ValueError, match=r"got omniaid_dino\.size 50; expected a multiple of the patch size 16"
    ):
        make_reward(
            "omniaid_dino",
            "cpu",
            {**save(make_case("omniaid_dino").state, tmp_path), **HEADS, "size": 50},
        )
