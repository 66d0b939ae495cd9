"""OmniAID that learns with the generator, as RealGen-V2 trains it: head and experts, or with LoRA files the head alone.

Sources: yejy53/RealGen, RealGen_v2/flow_grpo/trainable_scorers.py; yunncheng/OmniAID, models/OmniAID.py.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from reward_bridge.learners.augment import augment
from reward_bridge.preprocess import normalize, resize
from reward_bridge.rewards.omniaid import (
    CLIP_TABLE,
    MixtureDetector,
    MixtureReward,
    MoELinear,
    OmniAID,
)
from reward_bridge.rewards.omniaid_dino import DINO_TABLE, OmniAIDDino
from reward_bridge.weights import Table, read, rename

Bases = Mapping[
    str, tuple[torch.Tensor, torch.Tensor]
]  # of a projection by its name: U_r [D, R], V_r [R, D]


class MixtureLearner:
    """Cross entropy against soft labels, half from the real and half from the generated pictures, and two penalties.

    `smoothing` s: the targets are (1 - s, s) and (s, 1 - s). `lambda_orth` and `lambda_balance` weigh the penalties,
    see `orthogonality_loss` (none with LoRA files, whose experts do not learn) and `balance_loss`, which moves nothing
    while the router is frozen, as it is here.
    `dropout`: the share of what the experts see that is dropped in training. `augment`: see augment.py.
    `gradient_checkpointing`: compute activations twice instead of keeping those of all layers.
    """

    def __init__(
        self,
        reward: MixtureReward,
        table: Table,
        smoothing: float,
        lambda_orth: float,
        lambda_balance: float,
        dropout: float,
        augment: bool,
        gradient_checkpointing: bool,
    ):
        for name, value, end in (("smoothing", smoothing, 0.5), ("dropout", dropout, 1.0)):
            if not 0 <= value < end:
                raise ValueError(f"got {name} {value}; expected at least 0 and less than {end}")
        self.reward, self.model = reward, reward.model
        self.smoothing, self.lambda_orth, self.lambda_balance = (
            smoothing,
            lambda_orth,
            lambda_balance,
        )
        self.augment = augment
        published = read(reward.file)
        self.lora = any(".lora_A_experts." in key for key in published)
        self.bases: Bases = {}
        if lambda_orth and not self.lora:
            self.bases = _bases(published, table, reward)
        for name, parameter in self.model.named_parameters():
            learns = name.startswith("head.") or ("_experts." in name and not self.lora)
            parameter.requires_grad_(learns)
        for module in self.model.tower.modules():
            if isinstance(module, MoELinear):
                module.dropout = dropout
        if gradient_checkpointing and not self.lora:
            self.model.tower.activation_checkpointing_enable()

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        side = self.reward.sides[0]
        return resize(images, (side, side), "bilinear")

    def score(self, model: nn.Module, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return model(self.reward.pixels(images)).softmax(-1)[:, 0]

    def loss(
        self,
        model: MixtureDetector,
        real: torch.Tensor,
        generated: torch.Tensor,
        prompts: Sequence[str],
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        images = self.reward.resized(torch.cat([real, generated]))
        pixels = normalize(augment(images) if self.augment else images, *self.reward.statistics)
        features = model.routing_features(pixels)
        # one forward for both: recomputed activations need the gates of the forward they belong to
        logits, routed = model.classify(pixels, features).chunk(2), model.router(features).chunk(2)
        classification = (
            sum(
                soft_cross_entropy(x, r, self.smoothing)
                for x, r in zip(logits, (1, 0), strict=True)
            )
            / 2
        )
        balance = sum(balance_loss(x, model.sizes.top_k) for x in routed) / 2
        orthogonality = (
            orthogonality_loss(model, self.bases) if self.bases else torch.zeros_like(balance)
        )
        loss = classification + self.lambda_orth * orthogonality + self.lambda_balance * balance
        right = [
            (x[:, 0] > x[:, 1]) == is_real for x, is_real in zip(logits, (True, False), strict=True)
        ]
        metrics = {
            "accuracy": (right[0].float().mean() + right[1].float().mean()) / 2,
            "classification_loss": classification.detach(),
            "orthogonality_loss": orthogonality.detach(),
            "balance_loss": balance.detach(),
        }
        return loss, metrics


class OmniAIDLearner(MixtureLearner):
    """On CLIP; the options up to `resize_first` are the frozen reward's. Everything is float32."""

    def __init__(
        self,
        device: str,
        path: str,
        routing: str = "feature_extractor",
        top_k: int = 2,
        heads: int | None = None,
        resize_first: int = 512,
        smoothing: float = 0.05,
        lambda_orth: float = 1e-3,
        lambda_balance: float = 0.0,
        dropout: float = 0.1,
        augment: bool = True,
        gradient_checkpointing: bool = True,
    ):
        reward = OmniAID(device, path, routing, top_k, heads, resize_first)
        super().__init__(
            reward,
            CLIP_TABLE,
            smoothing,
            lambda_orth,
            lambda_balance,
            dropout,
            augment,
            gradient_checkpointing,
        )


class OmniAIDDinoLearner(MixtureLearner):
    """On DINOv3; the options up to `resize_first` are the frozen reward's. Everything is float32.

    In train mode the rotary coordinates are rescaled at random, as DINOv3 was trained and RealGen-V2 does.
    """

    def __init__(
        self,
        device: str,
        path: str,
        size: int = 448,
        top_k: int = 2,
        heads: int | None = None,
        rope_theta: float = 100.0,
        eps: float = 1e-5,
        resize_first: int = 512,
        smoothing: float = 0.05,
        lambda_orth: float = 1e-3,
        lambda_balance: float = 0.0,
        dropout: float = 0.1,
        augment: bool = True,
        gradient_checkpointing: bool = True,
    ):
        reward = OmniAIDDino(device, path, size, top_k, heads, rope_theta, eps, resize_first)
        super().__init__(
            reward,
            DINO_TABLE,
            smoothing,
            lambda_orth,
            lambda_balance,
            dropout,
            augment,
            gradient_checkpointing,
        )


def soft_cross_entropy(logits: torch.Tensor, is_real: bool, smoothing: float) -> torch.Tensor:
    """Logits [n, 2] of real and of fake -> [], against 1 - `smoothing` for the right one."""
    target = logits.new_tensor(
        [1 - smoothing, smoothing] if is_real else [smoothing, 1 - smoothing]
    )
    return F.cross_entropy(logits, target.expand_as(logits))


def balance_loss(router_logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """[n, N] -> []: N times the sum over experts of (share of pictures routed there) * (mean probability)."""
    chosen = torch.zeros_like(router_logits).scatter(1, router_logits.topk(top_k).indices, 1.0)
    return router_logits.shape[1] * (chosen.mean(0) * router_logits.softmax(-1).mean(0)).sum()


def orthogonality_loss(model: MixtureDetector, bases: Bases) -> torch.Tensor:
    """How far the experts' directions overlap with the main weight's and with one another's: mean over projections."""
    overlaps = []
    for name, (up, down) in bases.items():
        linear = model.get_submodule(name)
        pairs = len(linear.U_experts) * (len(linear.U_experts) + 1) / 2
        overlap = _overlap(up, [*linear.U_experts]) + _overlap(
            down.T, [v.T for v in linear.V_experts]
        )
        overlaps.append(overlap / pairs)
    return torch.stack(overlaps).mean()


def _overlap(main: torch.Tensor, experts: list[torch.Tensor]) -> torch.Tensor:
    """[D, R] and E times [D, r] -> []: sum over all pairs A, B of them of |A^T B|, the experts' columns normalised."""
    count, rank = len(experts), experts[0].shape[1]
    x = F.normalize(torch.cat(experts, 1), dim=0)
    with_main = torch.linalg.vector_norm((main.T @ x).unflatten(1, (count, rank)), dim=(0, 2))
    among = torch.linalg.vector_norm((x.T @ x).reshape(count, rank, count, rank), dim=(1, 3))
    return with_main.sum() + among.triu(1).sum()


def _bases(published: Mapping[str, torch.Tensor], table: Table, reward: MixtureReward) -> Bases:
    """The main weights' singular vectors, which the frozen reward leaves out of its model."""
    found = {key: value for key, value in published.items() if key.endswith((".U_r", ".V_r"))}
    found = rename(found, [rule for rule in table if rule[1]], reward.file)
    device, bases = reward.model.head.weight.device, {}
    for name, module in reward.model.named_modules():
        if isinstance(module, MoELinear):
            if f"{name}.U_r" not in found or f"{name}.V_r" not in found:
                raise ValueError(
                    f"{reward.file} lacks U_r or V_r of {name}, which the orthogonality loss needs; use a file that "
                    "has them, or set lambda_orth to 0"
                )
            bases[name] = tuple(
                found[f"{name}.{part}"].float().to(device) for part in ("U_r", "V_r")
            )
    return bases
