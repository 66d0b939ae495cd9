"""A vision tower whose attention projections are mixtures of low-rank experts.

A router looks at the picture and weights the experts, with the same gates in every layer. OmniAID
on CLIP and on DINOv3 share all of this module, and Effort uses parts of it. Sizes are read from the
shapes in the weight file.
Source: yunncheng/OmniAID, models/OmniAID.py.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from reward_bridge.preprocess import normalize, resize
from reward_bridge.weights import State, Table, read, rename, torch_dtype

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj", "o_proj")


class MoELinear(nn.Module):
    """y = W x + b + sum_e g_e U_e (S_e * V_e x), all experts in two low-rank matmuls.

    x [n, t, D]; W = weight_main [D, D]; U_e [D, r], S_e [r], V_e [r, D]; gates g [n, E] or [1, E],
    see `set_gates`. The parameters keep their published names. LoRA's B_e (A_e x) is the case of
    S_e = 1. In train mode, a fraction `dropout` of the experts' input is dropped.
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
        # All experts side by side: up [D, E r], scale [E r], down [E r, D].
        up = torch.cat(list(self.U_experts), 1)
        scale = torch.cat(list(self.S_experts))
        down = torch.cat(list(self.V_experts))

        # The gates go into the scale: [n, E r].
        rank = len(scale) // len(self.S_experts)
        scale = (self.gates.repeat_interleave(rank, 1) * scale).to(x.dtype)

        expert_input = x
        if self.training and self.dropout:
            expert_input = F.dropout(x, self.dropout)
        main = F.linear(x, self.weight_main, self.bias)
        return main + F.linear(F.linear(expert_input, down) * scale[:, None], up)


def use_experts(tower: nn.Module, experts: int, rank: int) -> nn.Module:
    """Replace the attention projections in all layers of a vision tower by MoELinear."""
    for module in list(tower.modules()):
        for name in PROJECTIONS:
            linear = getattr(module, name, None)
            if isinstance(linear, nn.Linear):
                mixture = MoELinear(linear.in_features, experts, rank, linear.bias is not None)
                setattr(module, name, mixture)
    return tower


def set_gates(tower: nn.Module, gates: torch.Tensor) -> None:
    """Set the gates [n, E] of the next forward pass in every projection.

    transformers' attention passes only x to a projection, so the gates cannot be an argument.
    """
    for module in tower.modules():
        if isinstance(module, MoELinear):
            module.gates = gates


@dataclass(frozen=True)
class Sizes:
    """Sizes of the experts and of the router, an MLP width -> hidden -> outputs."""

    width: int
    experts: int
    rank: int
    hidden: int
    outputs: int
    top_k: int


class MixtureDetector(nn.Module):
    """A router, a tower of experts, and a linear head on the class token after the last norm.

    The router sees the class token of `feature_extractor`, a frozen tower without experts. If there
    is none, it sees the mean over the patch tokens of the CLIP tower's own embeddings, before the
    first norm.
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
        """Normalised pixels [n, 3, h, w] -> float32 [n, D]."""
        if self.feature_extractor is None:
            return self.tower.embeddings(pixels)[:, 1:].mean(1).float()
        return self.feature_extractor(pixels).pooler_output.float()

    def gates(self, features: torch.Tensor) -> torch.Tensor:
        """[n, D] -> [n, E]: softmax over the top k logits, 0 elsewhere.

        If the router has one output fewer than there are experts (the hybrid variant), the last
        expert, which is for artefacts, always has gate 1.
        """
        top = self.router(features).topk(self.sizes.top_k)
        gates = features.new_zeros(len(features), self.sizes.experts)
        gates.scatter_(1, top.indices, top.values.softmax(-1))
        if self.sizes.outputs < self.sizes.experts:
            gates[:, -1] = 1
        return gates

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised pixels [n, 3, h, w] -> logits [n, 2] of real and of fake."""
        return self.classify(pixels, self.routing_features(pixels))

    def classify(self, pixels: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """`forward`, given the pictures' routing features [n, D]."""
        set_gates(self.tower, self.gates(features))
        return self.head(self.tower(pixels).pooler_output.float())

    def train(self, mode: bool = True) -> "MixtureDetector":
        """Set train mode, except for the extractor: training routes a picture as scoring does."""
        super().train(mode)
        if self.feature_extractor is not None:
            self.feature_extractor.eval()
        return self


class MixtureReward:
    """P(real) = softmax(logits)[0] of a picture.

    The picture is resized to `resize_first` squared (0: not resized), then to `size` squared; its
    aspect ratio is not kept. `statistics` are the mean and the standard deviation for the
    normalisation of pixels.
    """

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
        self.statistics = statistics
        self.dtype = torch_dtype(dtype)

        # Parameters only, since DINOv3's rotary frequencies are a buffer. The router and the head
        # stay in float32.
        for name, parameter in model.named_parameters():
            if not name.startswith(("router.", "head.")):
                parameter.data = parameter.data.to(self.dtype)
        self.model = model.to(device)

    def resized(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [n, 3, h, w] -> uint8 [n, 3, size, size]."""
        for side in self.sides:
            images = resize(images, (side, side), "bilinear")
        return images

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [n, 3, h, w] -> the towers' input, [n, 3, size, size]."""
        return normalize(self.resized(images), *self.statistics, self.dtype)

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return self.model(self.pixels(images)).softmax(-1)[:, 0]


def mixture_table(layers: str, ours: str) -> Table:
    """Rules for the router, the head and the layers of experts, published under `layers`.

    Tensors that are not needed for scoring are dropped.
    """
    return (
        # The orthogonality loss compares the experts with these.
        (r".*\.(U_r|V_r|weight_original_fnorm)", None),
        # A buffer 0, 1, 2, ... of old library versions.
        (r".*\.position_ids", None),
        (rf"{layers}\.(.+)\.weight_fixed", rf"{ours}.\1.weight_main"),
        (rf"{layers}\.(.+)\.lora_A_experts\.(\d+)", rf"{ours}.\1.V_experts.\2"),
        (rf"{layers}\.(.+)\.lora_B_experts\.(\d+)", rf"{ours}.\1.U_experts.\2"),
        (rf"{layers}\.(.+)", rf"{ours}.\1"),
        (r"gating_network\.network\.(.+)", r"router.\1"),
        (r"(head\..+)", r"\1"),
    )


def read_mixture(file: Path, table: Table) -> State:
    """Read a file of SVD experts or of LoRA experts, with MixtureDetector's tensor names."""
    published = read(file)
    state = rename(published, table, file)
    if not any(".lora_A_experts." in key for key in published):
        return state

    # LoRA experts have no scale; use 1.
    scales = {}
    for key, up in state.items():
        if ".U_experts." in key:
            scales[key.replace(".U_experts.", ".S_experts.")] = torch.ones(up.shape[-1])
    return {**state, **scales}


def read_sizes(state: State, top_k: int, option: str, source: Path) -> Sizes:
    """The sizes of a detector, from the shapes of its tensors.

    Raises ValueError if router and experts do not fit, or if `top_k` exceeds the router's outputs.
    """
    first_layer = [
        key for key in state if re.fullmatch(r"tower\.\D+\.0\.\w+\.q_proj\.U_experts\.\d+", key)
    ]
    if not first_layer:
        raise ValueError(f"{source} has no experts; it may be the file of another detector")
    experts = len(first_layer)
    rank = state[first_layer[0]].shape[-1]
    hidden, width = tensor_shape(state, "router.0.weight", source)
    outputs = tensor_shape(state, "router.2.weight", source)[0]

    if outputs not in (experts, experts - 1):
        raise ValueError(
            f"{source} has {experts} experts and a router of {outputs} outputs; expected {experts} "
            f"or {experts - 1} outputs"
        )
    if not 1 <= top_k <= outputs:
        raise ValueError(
            f"got {option}.top_k {top_k}; expected 1 to {outputs}, the outputs of the router in "
            f"{source}"
        )
    return Sizes(width, experts, rank, hidden, outputs, top_k)


def tensor_shape(state: State, key: str, source: Path) -> torch.Size:
    """The shape of a tensor. Raises ValueError if the file lacks it."""
    if key not in state:
        raise ValueError(
            f"{source} lacks {key} (named as in transformers); it may be the file of another "
            "detector"
        )
    return state[key].shape


def count_layers(state: State) -> int:
    """The number of layers of the tower."""
    matches = [re.fullmatch(r"tower\.\D+\.(\d+)\..+", key) for key in state]
    return len({match[1] for match in matches if match})


def head_count(heads: int | None, width: int, option: str) -> int:
    """The number of attention heads; None: width / 64. Raises ValueError if it does not divide."""
    if heads is None:
        heads = width // 64
    if heads < 1 or width % heads:
        raise ValueError(
            f"{heads} heads do not divide the width {width}; set "
            f"config.reward.options.{option}.heads"
        )
    return heads
