"""OmniAID that learns along with the generator, as RealGen-V2 trains it.

Head and experts learn; with a file of LoRA experts, only the head does. Sources: yejy53/RealGen,
RealGen_v2/flow_grpo/trainable_scorers.py; yunncheng/OmniAID, models/OmniAID.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from reward_bridge.learners.augment import augment
from reward_bridge.preprocess import normalize, resize
from reward_bridge.rewards.mixture import MixtureDetector, MixtureReward, MoELinear
from reward_bridge.rewards.omniaid import CLIP_TABLE, OmniAID
from reward_bridge.rewards.omniaid_dino import DINO_TABLE, OmniAIDDino
from reward_bridge.weights import State, Table, read, rename

# Per projection: U_r [D, R] and V_r [R, D], the singular vectors of its main weight.
Bases = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Training:
    """How a mixture detector learns: options in addition to those of the frozen reward.

    smoothing: s; the targets are (1 - s, s) for real and (s, 1 - s) for generated pictures.
    lambda_orth: weight of `orthogonality_loss`; unused with LoRA files, whose experts do not
        learn.
    lambda_balance: weight of `balance_loss`. It has no effect on the weights while the router is
        frozen, as it is here.
    dropout: fraction of the experts' input that is dropped in training.
    augment: augment pictures in training (augment.py).
    gradient_checkpointing: recompute activations in the backward pass to save memory.

    Raises ValueError if smoothing or dropout is out of range.
    """

    smoothing: float = 0.05
    lambda_orth: float = 1e-3
    lambda_balance: float = 0.0
    dropout: float = 0.1
    augment: bool = True
    gradient_checkpointing: bool = True

    def __post_init__(self):
        if not 0 <= self.smoothing < 0.5:
            raise ValueError(
                f"got smoothing {self.smoothing}; expected at least 0 and less than 0.5"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"got dropout {self.dropout}; expected at least 0 and less than 1")

    @classmethod
    def read(cls, name: str, options: Mapping[str, Any]) -> "Training":
        """Raises ValueError naming an unknown option of the reward `name`."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(options.keys() - set(known))
        if unknown:
            raise ValueError(
                f"config.reward.options.{name}: unexpected options {', '.join(unknown)}; training "
                f"takes {', '.join(known)}, besides the reward's own"
            )
        return cls(**options)


class MixtureLearner:
    """Cross entropy with smoothed labels, and two penalties."""

    def __init__(self, reward: MixtureReward, table: Table, training: Training):
        self.reward = reward
        self.model = reward.model
        self.training = training

        published = read(reward.file)
        has_lora = any(".lora_A_experts." in key for key in published)
        self.bases: Bases = {}
        if training.lambda_orth and not has_lora:
            self.bases = _read_bases(published, table, reward)

        for name, parameter in self.model.named_parameters():
            is_expert = "_experts." in name
            parameter.requires_grad_(name.startswith("head.") or (is_expert and not has_lora))
        for module in self.model.tower.modules():
            if isinstance(module, MoELinear):
                module.dropout = training.dropout
        if training.gradient_checkpointing and not has_lora:
            self.model.tower.activation_checkpointing_enable()

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [n, 3, h, w] -> uint8 [n, 3, s, s], the reward's first size."""
        side = self.reward.sides[0]
        return resize(images, (side, side), "bilinear")

    def score(self, model: nn.Module, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """P(real) of uint8 pictures [n, 3, s, s]: float32 [n]."""
        return model(self.reward.pixels(images)).softmax(-1)[:, 0]

    def loss(
        self,
        model: MixtureDetector,
        real: torch.Tensor,
        generated: torch.Tensor,
        prompts: Sequence[str],
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Classification + lambda_orth * orthogonality + lambda_balance * balance, of m pairs."""
        images = self.reward.resized(torch.cat([real, generated]))
        if self.training.augment:
            images = augment(images)
        pixels = normalize(images, *self.reward.statistics)

        # One forward pass for both, since recomputed activations need the gates of their own pass.
        features = model.routing_features(pixels)
        real_logits, generated_logits = model.classify(pixels, features).chunk(2)
        real_routing, generated_routing = model.router(features).chunk(2)

        smoothing = self.training.smoothing
        real_loss = soft_cross_entropy(real_logits, True, smoothing)
        generated_loss = soft_cross_entropy(generated_logits, False, smoothing)
        classification = (real_loss + generated_loss) / 2

        top_k = model.sizes.top_k
        balance = (balance_loss(real_routing, top_k) + balance_loss(generated_routing, top_k)) / 2
        orthogonality = torch.zeros_like(balance)
        if self.bases:
            orthogonality = orthogonality_loss(model, self.bases)
        loss = (
            classification
            + self.training.lambda_orth * orthogonality
            + self.training.lambda_balance * balance
        )

        real_right = (real_logits[:, 0] > real_logits[:, 1]).float().mean()
        generated_right = (generated_logits[:, 0] <= generated_logits[:, 1]).float().mean()
        metrics = {
            "accuracy": (real_right + generated_right) / 2,
            "classification_loss": classification.detach(),
            "orthogonality_loss": orthogonality.detach(),
            "balance_loss": balance.detach(),
        }
        return loss, metrics


class OmniAIDLearner(MixtureLearner):
    """On CLIP. The named options are the frozen reward's, the others those of `Training`.

    Everything is float32.
    """

    def __init__(
        self,
        device: str,
        path: str,
        routing: str = "feature_extractor",
        top_k: int = 2,
        heads: int | None = None,
        resize_first: int = 512,
        **training: Any,
    ):
        settings = Training.read("omniaid", training)
        reward = OmniAID(device, path, routing, top_k, heads, resize_first)
        super().__init__(reward, CLIP_TABLE, settings)


class OmniAIDDinoLearner(MixtureLearner):
    """On DINOv3. The named options are the frozen reward's, the others those of `Training`.

    Everything is float32. In train mode the rotary coordinates are rescaled at random, as in
    DINOv3's training and in RealGen-V2.
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
        **training: Any,
    ):
        settings = Training.read("omniaid_dino", training)
        reward = OmniAIDDino(device, path, size, top_k, heads, rope_theta, eps, resize_first)
        super().__init__(reward, DINO_TABLE, settings)


def soft_cross_entropy(logits: torch.Tensor, is_real: bool, smoothing: float) -> torch.Tensor:
    """Mean cross entropy [] of logits [n, 2] (real, fake) against a smoothed label."""
    label = [1 - smoothing, smoothing] if is_real else [smoothing, 1 - smoothing]
    return F.cross_entropy(logits, logits.new_tensor(label).expand_as(logits))


def balance_loss(router_logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Penalty [] on an uneven use of the experts, of router logits [n, N].

    N times the sum over experts of (fraction of pictures routed there) * (mean probability).
    """
    chosen = torch.zeros_like(router_logits).scatter(1, router_logits.topk(top_k).indices, 1.0)
    return router_logits.shape[1] * (chosen.mean(0) * router_logits.softmax(-1).mean(0)).sum()


def orthogonality_loss(model: MixtureDetector, bases: Bases) -> torch.Tensor:
    """Overlap [] of the experts' directions with those of the main weight and of other experts.

    Mean over pairs and over projections.
    """
    overlaps = []
    for name, (up, down) in bases.items():
        linear = model.get_submodule(name)
        experts = len(linear.U_experts)
        pairs = experts * (experts + 1) / 2
        up_overlap = _overlap(up, list(linear.U_experts))
        down_overlap = _overlap(down.T, [v.T for v in linear.V_experts])
        overlaps.append((up_overlap + down_overlap) / pairs)
    return torch.stack(overlaps).mean()


def _overlap(main: torch.Tensor, experts: list[torch.Tensor]) -> torch.Tensor:
    """Sum [] of |A^T B| over all pairs A, B of the main directions [D, R] and E experts' [D, r].

    The experts' columns are normalised.
    """
    count = len(experts)
    rank = experts[0].shape[1]
    x = F.normalize(torch.cat(experts, 1), dim=0)
    with_main = torch.linalg.vector_norm((main.T @ x).unflatten(1, (count, rank)), dim=(0, 2))
    among = torch.linalg.vector_norm((x.T @ x).reshape(count, rank, count, rank), dim=(1, 3))
    return with_main.sum() + among.triu(1).sum()


def _read_bases(published: State, table: Table, reward: MixtureReward) -> Bases:
    """The main weights' singular vectors, which the frozen reward leaves out of its model."""
    vectors = {key: value for key, value in published.items() if key.endswith((".U_r", ".V_r"))}
    kept_rules = [rule for rule in table if rule[1]]  # the table's first rule drops them
    vectors = rename(vectors, kept_rules, reward.file)

    device = reward.model.head.weight.device
    bases = {}
    for name, module in reward.model.named_modules():
        if not isinstance(module, MoELinear):
            continue
        up = vectors.get(f"{name}.U_r")
        down = vectors.get(f"{name}.V_r")
        if up is None or down is None:
            raise ValueError(
                f"{reward.file} lacks U_r or V_r of {name}, which the orthogonality loss needs; "
                "use a file that has them, or set lambda_orth to 0"
            )
        bases[name] = (up.float().to(device), down.float().to(device))
    return bases
