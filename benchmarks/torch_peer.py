"""RealGen's training step in PyTorch, diffusers and peft: the other side of benchmarks/peers.py.

It is written as the reference is: a Python loop over the schedule, one call of diffusers'
FluxTransformer2DModel for each step, and the base model by switching peft's adapters off. The
reference's defects are left out, so that both sides compute the same numbers. Nothing slow is
added: embeddings, schedule, noise and positions are computed in advance. Everything is float32.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import peft
import torch
from torch import Tensor


@dataclass
class TorchModel:
    """The models of a FLUX pipeline."""

    transformer: Any  # a PeftModel
    vae: Any
    side: int  # tokens down and across
    positions: Tensor  # of the image tokens, [side^2, 3]


def load(
    folder: Path,
    adapters: dict[str, np.ndarray],
    rank: int,
    alpha: float,
    side: int,
    compiled: bool,
) -> TorchModel:
    """Load a FluxPipeline folder, with LoRA factors under peft's names.

    `side`: tokens down and across. Raises ValueError if peft does not know a factor.
    """
    # The transformer and its adapters.
    transformer = diffusers.FluxTransformer2DModel.from_pretrained(
        folder / "transformer", torch_dtype=torch.float32
    )
    modules = sorted({name.removesuffix(".lora_A").removesuffix(".lora_B") for name in adapters})
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules)
    transformer = peft.get_peft_model(transformer.requires_grad_(False), config)
    state = {
        f"base_model.model.{name}.weight": torch.from_numpy(array.copy())
        for name, array in adapters.items()
    }
    unexpected = peft.set_peft_model_state_dict(transformer, state).unexpected_keys
    if unexpected:
        raise ValueError(f"peft does not know {unexpected[0]}")

    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    vae.requires_grad_(False)
    if compiled:
        transformer.base_model.model.compile()
        vae.decoder.compile()
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    positions = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()
    return TorchModel(transformer.train(), vae.eval(), side, positions)


def velocity(
    model: TorchModel, x: Tensor, sigma: Tensor, cond: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """The transformer's velocity at one noise level: [n, side^2, c]."""
    t5, clip, guidance = cond
    return model.transformer(
        hidden_states=x,
        timestep=sigma.expand(len(x)),
        guidance=guidance,
        pooled_projections=clip,
        encoder_hidden_states=t5,
        txt_ids=torch.zeros(t5.shape[1], 3),
        img_ids=model.positions,
        return_dict=False,
    )[0]


def decode(model: TorchModel, tokens: Tensor) -> Tensor:
    """Decode packed latents [n, side^2, c] to uint8 [n, 3, H, W]."""
    n, _, c = tokens.shape
    latents = tokens.reshape(n, model.side, model.side, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    latents = latents.reshape(n, c // 4, 2 * model.side, 2 * model.side)
    config = model.vae.config
    images = model.vae.decode(
        latents / config.scaling_factor + config.shift_factor, return_dict=False
    )[0]
    return (255 * (images / 2 + 0.5).clamp(0, 1)).round().to(torch.uint8)


def sde_step(
    v: Tensor,
    x: Tensor,
    sigmas: Tensor,
    i: int,
    noise_level: float,
    z: Tensor | None,
    x_next: Tensor | None,
):
    """A step of Flow-GRPO's sde_step_with_logprob.

    Returns x_next (drawn with the noise `z` if it is not given), its log-probability, the mean, the
    noise scale and sqrt(dt).
    """
    sigma = sigmas[i]
    dt = sigmas[i + 1] - sigma
    s = noise_level * torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigmas[1], sigma)))
    mean = x * (1 + s**2 / (2 * sigma) * dt) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
    std = s * torch.sqrt(-dt)
    if x_next is None:
        x_next = mean + std * z
    squares = (x_next.detach() - mean) ** 2
    logp = -squares / (2 * std**2) - torch.log(std) - 0.5 * np.log(2 * np.pi)
    return x_next, logp.mean(dim=(1, 2)), mean, s, torch.sqrt(-dt)


@torch.no_grad()
def sample(model: TorchModel, x: Tensor, sigmas: Tensor, cond: tuple) -> Tensor:
    """ODE sampling of a batch, decoded."""
    for i in range(len(sigmas) - 1):
        x = x + (sigmas[i + 1] - sigmas[i]) * velocity(model, x, sigmas[i], cond)
    return decode(model, x)


@torch.no_grad()
def rollout(
    model: TorchModel,
    x: Tensor,
    noise: Tensor,
    sigmas: Tensor,
    cond: tuple,
    start: int,
    branches: int,
    noise_level: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return pictures and the window's record: x, x_next and mean [w, n, s, c], logp [w, n]."""
    record: dict[str, list[Tensor]] = {"x": [], "x_next": [], "mean": [], "logp": []}
    for i in range(len(sigmas) - 1):
        # The window begins: repeat each slot for its branches.
        if i == start:
            x, *cond = (a.repeat_interleave(branches, dim=0) for a in (x, *cond))
        v = velocity(model, x, sigmas[i], cond)
        if start <= i < start + len(noise):
            x_next, logp, mean, _, _ = sde_step(
                v, x, sigmas, i, noise_level, noise[i - start], None
            )
            for name, value in zip(record, (x, x_next, mean, logp), strict=True):
                record[name].append(value)
            x = x_next
        else:
            x = x + (sigmas[i + 1] - sigmas[i]) * v
    return decode(model, x), {name: torch.stack(values) for name, values in record.items()}


def trained(model: TorchModel) -> list[torch.nn.Parameter]:
    """The adapters' factors."""
    return [p for p in model.transformer.parameters() if p.requires_grad]


def make_optimizer(model: TorchModel, train: Any) -> torch.optim.Optimizer:
    """AdamW with the settings of config.train."""
    betas = (train.adam_beta1, train.adam_beta2)
    return torch.optim.AdamW(
        trained(model),
        train.learning_rate,
        betas,
        eps=train.adam_epsilon,
        weight_decay=train.adam_weight_decay,
    )


def update(
    model: TorchModel,
    optimizer: torch.optim.Optimizer,
    ema: list[Tensor],
    record: dict[str, Tensor],
    sigmas: Tensor,
    cond: tuple,
    start: int,
    noise_level: float,
    advantages: Tensor,
    train: Any,
) -> dict[str, float]:
    """One optimizer step of GRPO-Guard over the window, with KL to the base model.

    Changes the weights and `ema`. Returns the metrics.
    """
    window, n = record["logp"].shape
    cond = [a.repeat_interleave(n // len(a), dim=0) for a in cond]
    metrics = {"policy_loss": 0.0, "kl_loss": 0.0}
    for j in range(window):
        # Replay the step.
        i = start + j
        x = record["x"][j]
        v = velocity(model, x, sigmas[i], cond)
        _, logp, mean, s, root_dt = sde_step(
            v, x, sigmas, i, noise_level, None, record["x_next"][j]
        )

        # GRPO-Guard's ratio and loss.
        scale = s * root_dt
        bias = ((mean - record["mean"][j]) ** 2).mean(dim=(1, 2)) / (2 * scale**2)
        ratio = torch.exp(scale * (logp - record["logp"][j] + bias))
        a = advantages.clamp(-train.adv_clip_max, train.adv_clip_max)
        bounded = ratio.clamp(1 - train.clip_range, 1 + train.clip_range)
        policy_loss = torch.maximum(-a * ratio, -a * bounded).mean() / root_dt**2

        # KL to the base model.
        with torch.no_grad(), model.transformer.disable_adapter():
            v_ref = velocity(model, x, sigmas[i], cond)
        kl_loss = ((v - v_ref) ** 2).mean()

        ((policy_loss + train.beta * kl_loss) / window).backward()
        metrics["policy_loss"] += float(policy_loss.detach()) / window
        metrics["kl_loss"] += float(kl_loss.detach()) / window

    # Step and EMA.
    norm = torch.nn.utils.clip_grad_norm_(trained(model), train.max_grad_norm)
    metrics["grad_norm"] = float(norm)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for average, p in zip(ema, trained(model), strict=True):
            average.lerp_(p, 1 - train.ema_decay)
    return metrics
