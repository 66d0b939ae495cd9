"""OmniAID on CLIP and DINOv3, and Effort, against goldens and against plain towers with dense weights."""

import argparse
import copy
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.helpers.goldens import GOLDENS, golden

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch.nn import functional as F  # noqa: E402

from reward_bridge.preprocess import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD  # noqa: E402
from reward_bridge.rewards import make_reward  # noqa: E402
from reward_bridge.rewards.omniaid import MixtureDetector, Sizes, use_experts  # noqa: E402

STATISTICS = {"omniaid": (CLIP_MEAN, CLIP_STD), "omniaid_dino": (IMAGENET_MEAN, IMAGENET_STD)}
PUBLISHED = {
    "encoder.layers": "encoder_layers",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
    "model.": "",
}
PROJECTIONS = (
    "q_proj.weight",
    "k_proj.weight",
    "v_proj.weight",
    "out_proj.weight",
    "o_proj.weight",
)
WIDTH, SIZE, PATCH = 32, 48, 16
HEADS = {"heads": 4}


def photographs(height, width):
    """Eight crops of photographs, uint8 [8, 3, height, width]; where higher than wide, Pillow 13 resizes otherwise."""
    return torch.from_numpy(golden("photographs.npz")["pixels"][::8, :, :height, :width].copy())


def make_tower(kind, size=SIZE, patch=PATCH, **options):
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    sizes |= {"image_size": size, "patch_size": patch, **options}
    if kind == "omniaid_dino":
        tower = transformers.DINOv3ViTModel(
            transformers.DINOv3ViTConfig(**sizes, num_register_tokens=3)
        )
    else:
        tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes))
    with torch.no_grad():
        for (
            parameter
        ) in tower.parameters():  # as initialised, biases and layer scales would hide mistakes
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 9
            parameter.add_(0.3 * fan_in**-0.5 * torch.randn(parameter.shape))
    return tower.eval().requires_grad_(False)


def make_case(kind, experts=4, outputs=3, rank=3, lora=False, extractor=True, **options):
    """A random detector: its parts, and `state`, the same under the published names."""
    torch.manual_seed(1)
    case = SimpleNamespace(kind=kind, tower=make_tower(kind, **options), outputs=outputs)
    case.extractor = make_tower(kind, **options) if extractor else None
    case.router = [torch.randn(s) for s in ((16, WIDTH), (16,), (outputs, 16), (outputs,))]
    case.head = [0.3 * torch.randn(2, WIDTH), torch.randn(2)]
    case.state, case.experts = {}, {}
    for key, value in case.tower.state_dict().items():
        name = key
        for ours, theirs in PUBLISHED.items():
            name = name.replace(ours, theirs)
        if not key.endswith(PROJECTIONS):
            case.state[name] = value
            continue
        base = name.removesuffix(".weight")
        factors = [
            (torch.randn(WIDTH, rank), torch.rand(rank), torch.randn(rank, WIDTH) / 6)
            for _ in range(experts)
        ]
        case.experts[key] = [(u, torch.ones(rank) if lora else s, v) for u, s, v in factors]
        case.state[f"{base}.{'weight_fixed' if lora else 'weight_main'}"] = value
        for e, (u, s, v) in enumerate(factors):
            if lora:
                case.state |= {f"{base}.lora_A_experts.{e}": v, f"{base}.lora_B_experts.{e}": u}
            else:
                case.state |= {
                    f"{base}.{n}_experts.{e}": x for n, x in zip("USV", (u, s, v), strict=True)
                }
        if not lora:
            unneeded = {"U_r": torch.ones(WIDTH, 29), "V_r": torch.ones(29, WIDTH)}
            case.state |= {
                f"{base}.{n}": x
                for n, x in {**unneeded, "weight_original_fnorm": torch.ones(())}.items()
            }
    if extractor:
        state = case.extractor.state_dict()
        case.state |= {
            f"feature_extractor.{key.removeprefix('model.')}": value for key, value in state.items()
        }
    names = ("0.weight", "0.bias", "2.weight", "2.bias")
    case.state |= {
        f"gating_network.network.{n}": x for n, x in zip(names, case.router, strict=True)
    }
    case.state |= dict(zip(("head.weight", "head.bias"), case.head, strict=True))
    return case


def save(state, folder):
    """As their trainer does: wrapped, with the prefix of DataParallel and its command line's arguments."""
    wrapped = {
        "model": {f"module.{key}": value for key, value in state.items()},
        "optimizer": {},
        "epoch": 0,
    }
    torch.save(
        {**wrapped, "args": argparse.Namespace(lr=1e-4, model="OmniAID")},
        folder / "checkpoint-0.pth",
    )
    return {"path": str(folder / "checkpoint-0.pth")}


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


def normalized(picture, mean, std):
    """PIL or float [h, w, 3] -> [1, 3, h, w]."""
    x = (np.asarray(picture, np.float32) / 255 - np.float32(mean)) / np.float32(std)
    return torch.from_numpy(x.transpose(2, 0, 1)[None])


def as_pil(images):
    return [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in images]


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


def test_omniaid_preprocessing_matches_the_golden(tmp_path):
    io = golden("10_rewards/preprocess.npz")
    reward = make_reward(
        "omniaid",
        "cpu",
        {**save(make_case("omniaid", size=336, patch=112).state, tmp_path), **HEADS},
    )
    for name in "ab":
        pixels = reward.pixels(
            torch.from_numpy(io[f"{name}/image_uint8"].transpose(2, 0, 1)[None].copy())
        )
        np.testing.assert_allclose(pixels[0, :, ::6, ::6], io[f"{name}/omniaid_336"], atol=0.02)


def test_published_files_would_fit():
    """As many tensors and elements as checkpoint_omniaid_dino_v2.pth and effort_clip_L14_trainOn_sdv14.pth hold."""
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


def effort_case(rank=1, bases=True):
    """The tower with its residuals added in, and the same under the published names."""
    torch.manual_seed(2)
    tower, head = make_tower("omniaid"), [0.3 * torch.randn(2, WIDTH), torch.randn(2)]
    state, dense = dict(zip(("head.weight", "head.bias"), head, strict=True)), tower.state_dict()
    for key, value in copy.deepcopy(dense).items():
        if not key.endswith(PROJECTIONS):
            state[f"backbone.{key}"] = value
            continue
        base = f"backbone.{key.removesuffix('.weight')}"
        u, s, v = torch.randn(WIDTH, rank), torch.rand(rank), torch.randn(rank, WIDTH) / 4
        dense[key] = value + u @ torch.diag(s) @ v
        state |= {f"{base}.weight_main": value, f"{base}.U_residual": u, f"{base}.S_residual": s}
        state[f"{base}.V_residual"] = v
        if bases:
            state |= {f"{base}.U_r": torch.ones(WIDTH, 31), f"{base}.V_r": torch.ones(31, WIDTH)}
            state[f"{base}.S_r"] = torch.ones(31)
    tower.load_state_dict(dense)
    return tower, head, state


def float_resize(picture, side):
    """Bilinear and antialiased without rounding: PIL resizes single channels of floats so."""
    return np.stack(
        [np.asarray(c.resize((side, side), Image.Resampling.BILINEAR)) for c in channels(picture)],
        -1,
    )


def sample(picture, side):
    """Bilinear between the four pixels around the target's centre, as OpenCV's INTER_LINEAR."""
    step = (picture.width / side, 0, 0, 0, picture.height / side, 0)
    how = ((side, side), Image.Transform.AFFINE, step, Image.Resampling.BILINEAR)
    return np.stack([np.asarray(c.transform(*how)) for c in channels(picture)], -1)


def channels(picture):
    return [Image.fromarray(np.asarray(picture, np.float32)[..., c]) for c in range(3)]


PREPARE = {
    "imagenet": (float_resize, (IMAGENET_MEAN, IMAGENET_STD)),
    "none": (
        lambda picture, side: picture.resize((side, side), Image.Resampling.BILINEAR),
        ((0, 0, 0), (1, 1, 1)),
    ),
    "clip": (sample, (CLIP_MEAN, CLIP_STD)),
}


@pytest.mark.parametrize("normalize", PREPARE)
def test_effort_is_the_dense_model_of_each_picture(normalize, tmp_path):
    (tower, (weight, bias), state), images = effort_case(), photographs(53, 61)
    reward = make_reward(
        "effort", "cpu", {**save(state, tmp_path), **HEADS, "normalize": normalize}
    )
    prepare, statistics = PREPARE[normalize]
    want = []
    with torch.inference_mode():
        for picture in as_pil(images):
            feature = tower(normalized(prepare(picture, SIZE), *statistics)).pooler_output[0]
            want.append(F.softmax(weight @ feature + bias, 0)[0].item())
        got, single = (
            reward(images, [""] * 8),
            [reward(image[None], [""]).item() for image in images],
        )
    assert np.std(want) > 0.005
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(got, single, rtol=1e-5)


def test_effort_reads_files_without_the_main_bases(tmp_path):
    images = photographs(64, 64)
    scores = []
    for bases in (True, False):
        reward = make_reward("effort", "cpu", {**save(effort_case(2, bases)[2], tmp_path), **HEADS})
        scores.append(reward(images, [""] * 8))
    assert torch.equal(*scores)
    with pytest.raises(
        ValueError, match=r"got effort\.normalize 'vit'; expected one of imagenet, clip, none"
    ):
        make_reward("effort", "cpu", {"path": "x", "normalize": "vit"})


@pytest.mark.parametrize("kind", ["omniaid", "omniaid_dino", "effort"])
def test_files_that_do_not_fit_are_refused(kind, tmp_path):
    state = effort_case()[2] if kind == "effort" else make_case(kind).state
    layer = {
        "omniaid": "encoder_layers.1",
        "omniaid_dino": "layer.1",
        "effort": "backbone.encoder.layers.1",
    }[kind]
    norm = f"{layer}.{'norm2' if kind == 'omniaid_dino' else 'layer_norm2'}.weight"
    options = {**HEADS, "size": SIZE} if kind == "omniaid_dino" else HEADS

    def refused(message, change=None, drop=(), **more):
        changed = {
            key: value for key, value in {**state, **(change or {})}.items() if key not in drop
        }
        with pytest.raises(ValueError, match=message):
            make_reward(kind, "cpu", {**save(changed, tmp_path), **options, **more})

    refused(r"1 keys missing, such as 'tower\..*norm2\.weight'", drop=[norm])
    refused(r"1 keys too many, such as 'tower\..*9'", {f"{layer}.mlp.9": torch.ones(1)})
    refused(r"1 keys that are not of this model, such as 'text\.x'", {"text.x": torch.ones(1)})
    refused(r"norm2\.weight has shape \(7,\), the model \(32,\)", {norm: torch.ones(7)})
    refused(
        r"lacks tower\.embeddings\.patch_embedding.*another detector",
        drop=[k for k in state if "patch_emb" in k],
    )
    refused(
        rf"5 heads do not divide the width 32; set config\.reward\.options\.{kind}\.heads", heads=5
    )
    refused(r"got dtype 'half'", dtype="half")
    with pytest.raises(FileNotFoundError, match=rf"set config\.reward\.options\.{kind}\.path"):
        make_reward(kind, "cpu", {"path": str(tmp_path)})


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
            r"got routing 'mean'; expected 'feature_extractor' or 'patch_mean'",
            full,
            {"routing": "mean"},
        ),
        (r"got omniaid\.top_k 4; expected 1 to 3", full, {"top_k": 4}),
        (r"4 experts and a router of 2 outputs", make_case("omniaid", outputs=2).state, {}),
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
