"""Tiny random OmniAID detectors, as modules and as the authors' files."""

import argparse
from types import SimpleNamespace

import numpy as np
import torch
import transformers

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
WIDTH = 32
SIZE = 48
PATCH = 16
HEADS = {"heads": 4}


def make_tower(kind, size=SIZE, patch=PATCH, **options):
    """A random vision tower of transformers, on DINOv3 or CLIP."""
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
    """Save as the authors' trainer does: wrapped, prefixed by DataParallel, with its arguments.

    Returns the option that names the file.
    """
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


def normalized(picture, mean, std):
    """PIL or float [h, w, 3] -> [1, 3, h, w]."""
    x = (np.asarray(picture, np.float32) / 255 - np.float32(mean)) / np.float32(std)
    return torch.from_numpy(x.transpose(2, 0, 1)[None])
