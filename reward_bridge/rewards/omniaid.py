"""P(real) by OmniAID (arXiv 2511.08423): a vision tower whose attention projections are mixtures of low-rank experts.

A router looks at the picture and weighs the experts, the same in every layer. Here is what the CLIP and the DINOv3
version share, and the CLIP version. Sizes are read off the file's shapes. Source: yunncheng/OmniAID, models/OmniAID.py.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.initialization import no_init_weights

from reward_bridge.preprocess import CLIP_MEAN, CLIP_STD, normalize, resize
from reward_bridge.weights import Table, find, load_strict, read, rename, torch_dtype

State = dict[str, torch.Tensor]


class MoELinear(nn.Module):
    """y = W x + b + sum_e g_e U_e (S_e * V_e x), with all experts in two thin products.

    x [n, t, D]; W = weight_main [D, D]; U_e [D, r], S_e [r], V_e [r, D]; gates g [n, E] or [1, E], see `set_gates`.
    The parameters keep their published names. LoRA's B_e (A_e x) is the same with S_e = 1. In train mode a share
    `dropout` of what the experts see of x is dropped.
    """

    dropout = 0.0

    def __init__(self, width: int, experts: int, rank: int, bias: bool):
        super().__init__()
        self.weight_main = nn.Parameter(torch.empty(width, width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        self.U_experts = nn.ParameterList(torch.empty(width, rank) for _ in range(experts))
        self.S_experts = nn.ParameterList(torch.empty(rank) for _ in range(experts))
        self.V_experts = nn.ParameterList(torch.empty(rank, width) for _ in range(experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, scale, down = (
            torch.cat([*self.U_experts], 1),
            torch.cat([*self.S_experts]),
            torch.cat([*self.V_experts]),
        )
        rank = len(scale) // len(self.S_experts)
        scale = (self.gates.repeat_interleave(rank, 1) * scale).to(x.dtype)
        seen = F.dropout(x, self.dropout) if self.training and self.dropout else x
        return F.linear(x, self.weight_main, self.bias) + F.linear(
            F.linear(seen, down) * scale[:, None], up
        )


def use_experts(tower: nn.Module, experts: int, rank: int) -> nn.Module:
    """Replace the four attention projections of every layer of a transformers' vision tower by MoELinear."""
    for module in list(tower.modules()):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj", "o_proj"):
            linear = getattr(module, name, None)
            if isinstance(linear, nn.Linear):
                setattr(
                    module,
                    name,
                    MoELinear(linear.in_features, experts, rank, linear.bias is not None),
                )
    return tower


def set_gates(tower: nn.Module, gates: torch.Tensor) -> None:
    """The gates of the next forward, in every projection: transformers' attention passes a projection nothing but x."""
    for module in tower.modules():
        if isinstance(module, MoELinear):
            module.gates = gates


@dataclass(frozen=True)
class Sizes:
    """Of the experts and the router, which is a perceptron width -> hidden -> outputs."""

    width: int
    experts: int
    rank: int
    hidden: int
    outputs: int
    top_k: int


class MixtureDetector(nn.Module):
    """Router, tower of experts, and a linear head on the class token after the last norm.

    The router sees the class token of `feature_extractor`, a frozen tower without experts; where there is none, the
    mean over the patch tokens of the CLIP tower's own embeddings before the first norm.
    """

    def __init__(self, tower: nn.Module, feature_extractor: nn.Module | None, sizes: Sizes):
        super().__init__()
        self.tower = use_experts(tower, sizes.experts, sizes.rank)
        self.feature_extractor = feature_extractor
        self.router = nn.Sequential(
            nn.Linear(sizes.width, sizes.hidden), nn.ReLU(), nn.Linear(sizes.hidden, sizes.outputs)
        )
        self.head = nn.Linear(sizes.width, 2)
        self.sizes = sizes

    def routing_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """[n, 3, h, w] -> [n, D]."""
        if self.feature_extractor is None:
            return self.tower.embeddings(pixels)[:, 1:].mean(1).float()
        return self.feature_extractor(pixels).pooler_output.float()

    def gates(self, features: torch.Tensor) -> torch.Tensor:
        """[n, D] -> [n, E]: softmax over the top k logits, 0 elsewhere.

        With one output fewer than experts (hybrid) the last expert, the one for artefacts, always has gate 1.
        """
        top = self.router(features).topk(self.sizes.top_k)
        gates = features.new_zeros(len(features), self.sizes.experts)
        gates.scatter_(1, top.indices, top.values.softmax(-1))
        if self.sizes.outputs < self.sizes.experts:
            gates[:, -1] = 1
        return gates

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised [n, 3, h, w] -> logits [n, 2], of real and of fake."""
        return self.classify(pixels, self.routing_features(pixels))

    def classify(self, pixels: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """`forward` with the pictures' routing features."""
        set_gates(self.tower, self.gates(features))
        return self.head(self.tower(pixels).pooler_output.float())

    def train(self, mode: bool = True) -> "MixtureDetector":
        """The extractor stays in eval mode: a picture is routed in training as it is in scoring."""
        super().train(mode)
        if self.feature_extractor is not None:
            self.feature_extractor.eval()
        return self


class MixtureReward:
    """softmax(logits)[0] of a picture resized to `resize_first` squared, then to `size` squared, aspect not kept."""

    def __init__(
        self,
        device: str,
        model: MixtureDetector,
        size: int,
        resize_first: int,
        statistics: tuple[tuple[float, ...], tuple[float, ...]],
        dtype: str,
    ):
        self.sides = [side for side in (resize_first, size) if side]
        self.statistics, self.dtype = statistics, torch_dtype(dtype)
        for (
            name,
            parameter,
        ) in model.named_parameters():  # parameters only: DINOv3's rotary frequencies are a buffer
            if not name.startswith(("router.", "head.")):  # the choice of experts stays in float32
                parameter.data = parameter.data.to(self.dtype)
        self.model = model.to(device)

    def resized(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [n, 3, h, w] -> uint8 [n, 3, size, size]."""
        for side in self.sides:
            images = resize(images, (side, side), "bilinear")
        return images

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [n, 3, h, w] -> what the towers take."""
        return normalize(self.resized(images), *self.statistics, self.dtype)

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return self.model(self.pixels(images)).softmax(-1)[:, 0]


class OmniAID(MixtureReward):
    """P(real) by OmniAID on CLIP ViT-L/14 at 336 px, from a published .pth file or one that their code trained.

    `routing`: what the router was trained on, "feature_extractor" (published files) or "patch_mean" (RealGen V1's
    reward server). `resize_first`: 512 for v1 weights (RealGen's), 0 for v2 weights, which were trained without.
    `top_k`: 2, but 1 for the GenImage weights. `heads`: the width / 64 where None.
    """

    def __init__(
        self,
        device: str,
        path: str,
        routing: str = "feature_extractor",
        top_k: int = 2,
        heads: int | None = None,
        resize_first: int = 512,
        dtype: str = "float32",
    ):
        file = find(
            path, "omniaid.path", "checkpoint_omniaid_v1.pth", "ckpt/checkpoint_omniaid_v1.pth"
        )
        state = read_mixture(file, CLIP_TABLE)
        check_routing(routing, state, file)
        config = clip_config(state, heads, "omniaid", file)
        sizes = read_sizes(state, top_k, "omniaid", file)
        with no_init_weights():  # all of them are about to be loaded
            extractor = CLIPVisionModel(config) if routing == "feature_extractor" else None
            model = MixtureDetector(CLIPVisionModel(config), extractor, sizes)
        self.file = file
        load_strict(model, state, file)
        super().__init__(
            device, model, config.image_size, resize_first, (CLIP_MEAN, CLIP_STD), dtype
        )


def mixture_table(layers: str, ours: str) -> Table:
    """Rules for the layers of experts, published under `layers`, for router and head, and for what no score needs."""
    return (
        (
            r".*\.(U_r|V_r|weight_original_fnorm)",
            None,
        ),  # the orthogonality loss compares experts with these
        (r".*\.position_ids", None),  # 0, 1, 2, ...: a buffer of old library versions
        (rf"{layers}\.(.+)\.weight_fixed", rf"{ours}.\1.weight_main"),
        (rf"{layers}\.(.+)\.lora_A_experts\.(\d+)", rf"{ours}.\1.V_experts.\2"),
        (rf"{layers}\.(.+)\.lora_B_experts\.(\d+)", rf"{ours}.\1.U_experts.\2"),
        (rf"{layers}\.(.+)", rf"{ours}.\1"),
        (r"gating_network\.network\.(.+)", r"router.\1"),
        (r"(head\..+)", r"\1"),
    )


CLIP_TABLE: Table = (
    *mixture_table("encoder_layers", "tower.encoder.layers"),
    (r"(embeddings\..+)", r"tower.\1"),
    (r"ln_pre\.(.+)", r"tower.pre_layrnorm.\1"),
    (r"ln_post\.(.+)", r"tower.post_layernorm.\1"),
    (r"(feature_extractor\..+)", r"\1"),
)


def read_mixture(file: Path, table: Table) -> State:
    """The tensors of a file of SVD experts, or of LoRA experts (known by their keys), under MixtureDetector's names."""
    published = read(file)
    state = rename(published, table, file)
    if any(".lora_A_experts." in key for key in published):
        ups = [key for key in state if ".U_experts." in key]
        state |= {
            key.replace(".U_experts.", ".S_experts."): torch.ones(state[key].shape[-1])
            for key in ups
        }
    return state


def check_routing(routing: str, state: Mapping[str, torch.Tensor], source: Path) -> None:
    """Which feature the router expects cannot be seen from its weights: a wrong one gives scores, but wrong ones."""
    has = (
        "feature_extractor"
        if any(key.startswith("feature_extractor.") for key in state)
        else "patch_mean"
    )
    if routing not in ("feature_extractor", "patch_mean"):
        raise ValueError(f"got routing {routing!r}; expected 'feature_extractor' or 'patch_mean'")
    if routing != has:
        raise ValueError(
            f"{source} has {'a' if has == 'feature_extractor' else 'no'} feature_extractor tower, but routing is "
            f"{routing!r}; set config.reward.options.omniaid.routing to {has!r} if its router was trained so"
        )


def shape(state: Mapping[str, torch.Tensor], key: str, source: Path) -> torch.Size:
    if key not in state:
        raise ValueError(
            f"{source} lacks {key} (as transformers names it); is it the file of another detector?"
        )
    return state[key].shape


def layers(state: Mapping[str, torch.Tensor]) -> int:
    return len(
        {match[1] for key in state if (match := re.fullmatch(r"tower\.\D+\.(\d+)\..+", key))}
    )


def head_count(heads: int | None, width: int, option: str) -> int:
    heads = width // 64 if heads is None else heads
    if heads < 1 or width % heads:
        raise ValueError(
            f"{heads} heads do not divide the width {width}; set config.reward.options.{option}.heads"
        )
    return heads


def read_sizes(state: Mapping[str, torch.Tensor], top_k: int, option: str, source: Path) -> Sizes:
    """Raises ValueError where router and experts do not fit, or `top_k` exceeds the router's outputs."""
    first = [
        key for key in state if re.fullmatch(r"tower\.\D+\.0\.\w+\.q_proj\.U_experts\.\d+", key)
    ]
    if not first:
        raise ValueError(f"{source} has no experts; is it the file of another detector?")
    hidden, width = shape(state, "router.0.weight", source)
    outputs, experts = shape(state, "router.2.weight", source)[0], len(first)
    if outputs not in (experts, experts - 1):
        raise ValueError(
            f"{source} has {experts} experts and a router of {outputs} outputs; expected as many, or one fewer"
        )
    if not 1 <= top_k <= outputs:
        raise ValueError(
            f"got {option}.top_k {top_k}; expected 1 to {outputs}, the outputs of the router in {source}"
        )
    return Sizes(width, experts, state[first[0]].shape[-1], hidden, outputs, top_k)


def clip_config(
    state: Mapping[str, torch.Tensor], heads: int | None, option: str, source: Path
) -> CLIPVisionConfig:
    """Of the tower in `state`; quick-GELU and eps 1e-5 as in OpenAI's, transformers' defaults."""
    width, _, patch, _ = shape(state, "tower.embeddings.patch_embedding.weight", source)
    positions = shape(state, "tower.embeddings.position_embedding.weight", source)[0]
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=shape(state, "tower.encoder.layers.0.mlp.fc1.weight", source)[0],
        num_hidden_layers=layers(state),
        num_attention_heads=head_count(heads, width, option),
        image_size=math.isqrt(positions - 1) * patch,
        patch_size=patch,
    )
