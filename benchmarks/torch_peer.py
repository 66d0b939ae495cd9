"""A training step in PyTorch, diffusers and peft: the other side of benchmarks/peers.py.

It is written as the references are, RealGen for FLUX and Adv-GRPO for SD3: a Python loop over the
schedule, one call of diffusers' transformer for each step, guidance as one call with the negative
prompt's rows first, and the base model by switching peft's adapters off. The references' defects
are left out, so that both sides compute the same numbers. Nothing slow is added: embeddings,
schedule, noise and positions are computed in advance. Everything is float32.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import peft
import torch
from einops import rearrange
from torch import Tensor
from torch_families import TorchFamily


@dataclass
class TorchModel:
    """The models of a pipeline."""

    family: TorchFamily
    transformer: Any  # a PeftModel
    vae: Any
    side: int  # tokens down and across


@dataclass(frozen=True)
class TorchCond:
    """The conditioning of n pictures.

    rows: tensors [n, ...], or with guidance [2n, ...], the negative prompt's rows first. scale: of
    classifier-free guidance, or None. detached: whether the gradient leaves out the negative
    prompt's half.
    """

    rows: tuple[Tensor, ...]
    scale: float | None
    detached: bool = False

    def repeat(self, times: int) -> "TorchCond":
        """Every picture `times` times in a row."""
        return replace(self, rows=tuple(a.repeat_interleave(times, dim=0) for a in self.rows))


def load(
    family: TorchFamily,
    folder: Path,
    adapters: dict[str, np.ndarray],
    rank: int,
    alpha: float,
    side: int,
    compiled: bool,
) -> TorchModel:
    """Load a pipeline folder, with new adapters on the modules of `adapters`.

    `side`: tokens down and across.
    """
    transformer = family.transformer.from_pretrained(
        folder / "transformer", torch_dtype=torch.float32
    )
    modules = sorted({name.removesuffix(".lora_A").removesuffix(".lora_B") for name in adapters})
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules)
    transformer = peft.get_peft_model(transformer.requires_grad_(False), config)

    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    vae.requires_grad_(False)
    if compiled:
        transformer.base_model.model.compile()
        vae.decoder.compile()
    return TorchModel(family, transformer.train(), vae.eval(), side)


def set_adapters(model: TorchModel, adapters: dict[str, np.ndarray]) -> None:
    """Set the LoRA factors, which are under peft's names.

    Raises ValueError if peft does not know a factor.
    """
    state = {
        f"base_model.model.{name}.weight": torch.from_numpy(array.copy())
        for name, array in adapters.items()
    }
    unexpected = peft.set_peft_model_state_dict(model.transformer, state).unexpected_keys
    if unexpected:
        raise ValueError(f"peft does not know {unexpected[0]}")


def get_adapters(model: TorchModel) -> dict[str, np.ndarray]:
    """The LoRA factors, as for `set_adapters`."""
    adapters = {}
    for name, factor in peft.get_peft_model_state_dict(model.transformer).items():
        adapters[name.removeprefix("base_model.model.").removesuffix(".weight")] = factor.numpy()
    return adapters


# -- Latents: tokens [..., side^2, c] as ours, or [..., c, 2 side, 2 side] if the family takes them.


def unpack(tokens: Tensor, side: int) -> Tensor:
    """Tokens [..., side^2, 4c] -> latents [..., c, 2 side, 2 side]."""
    shape = "... (h w) (c dy dx) -> ... c (h dy) (w dx)"
    return rearrange(tokens, shape, h=side, dy=2, dx=2).contiguous()


def from_tokens(model: TorchModel, tokens: Tensor) -> Tensor:
    """Tokens in the family's form."""
    return tokens if model.family.tokens else unpack(tokens, model.side)


def to_tokens(model: TorchModel, x: Tensor) -> Tensor:
    """Inverts `from_tokens`."""
    if model.family.tokens:
        return x
    return rearrange(x, "... c (h dy) (w dx) -> ... (h w) (c dy dx)", dy=2, dx=2)


def decode(model: TorchModel, x: Tensor) -> Tensor:
    """Decode latents in the family's form to uint8 [n, 3, H, W]."""
    latents = unpack(x, model.side) if model.family.tokens else x
    config = model.vae.config
    images = model.vae.decode(
        latents / config.scaling_factor + config.shift_factor, return_dict=False
    )[0]
    return (255 * (images / 2 + 0.5).clamp(0, 1)).round().to(torch.uint8)


# -- Steps.


def velocity(model: TorchModel, x: Tensor, sigma: Tensor, cond: TorchCond) -> Tensor:
    """The velocity at one noise level, like x."""
    if cond.scale is None:
        return one_pass(model, x, sigma, cond)
    free, bound = one_pass(model, torch.cat([x, x]), sigma, cond).chunk(2)
    if cond.detached:
        free = free.detach()
    return free + cond.scale * (bound - free)


def one_pass(model: TorchModel, x: Tensor, sigma: Tensor, cond: TorchCond) -> Tensor:
    """The transformer's output, without guidance."""
    inputs = model.family.inputs(x, sigma.expand(len(x)), cond.rows, model.side)
    return model.transformer(**inputs, return_dict=False)[0]


def sde(v: Tensor, x: Tensor, sigmas: Tensor, i: int, noise_level: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a step of Flow-GRPO's sde_step_with_logprob."""
    sigma = sigmas[i]
    dt = sigmas[i + 1] - sigma
    s = noise_level * torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigmas[1], sigma)))
    mean = x * (1 + s**2 / (2 * sigma) * dt) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, s * torch.sqrt(-dt)


def cps(v: Tensor, x: Tensor, sigmas: Tensor, i: int, noise_level: float) -> tuple[Tensor, Tensor]:
    """The same of coefficients-preserving sampling."""
    sigma, after = sigmas[i], sigmas[i + 1]
    std = after * np.sin(noise_level * np.pi / 2)
    clean = x - sigma * v
    noise = x + (1 - sigma) * v
    return (1 - after) * clean + torch.sqrt(after**2 - std**2) * noise, std


STEPS = {"sde": sde, "cps": cps}


def log_prob(x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-probability of x_next, mean over a picture's elements: [n]."""
    squares = (x_next.detach() - mean) ** 2
    logp = -squares / (2 * std**2) - torch.log(std) - 0.5 * np.log(2 * np.pi)
    return logp.flatten(1).mean(dim=1)


@torch.no_grad()
def sample(model: TorchModel, x: Tensor, sigmas: Tensor, cond: TorchCond) -> Tensor:
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
    cond: TorchCond,
    start: int,
    config: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return pictures and the window's record: x, x_next and mean [w, n, ...], logp [w, n].

    config: config.sample.
    """
    record: dict[str, list[Tensor]] = {"x": [], "x_next": [], "mean": [], "logp": []}
    for i in range(len(sigmas) - 1):
        # The window begins: repeat each slot for its branches.
        if i == start:
            x = x.repeat_interleave(config.branches, dim=0)
            cond = cond.repeat(config.branches)
        v = velocity(model, x, sigmas[i], cond)
        if start <= i < start + len(noise):
            mean, std = STEPS[config.sde_type](v, x, sigmas, i, config.noise_level)
            x_next = mean + std * noise[i - start]
            values = (x, x_next, mean, log_prob(x_next, mean, std))
            for name, value in zip(record, values, strict=True):
                record[name].append(value)
            x = x_next
        else:
            x = x + (sigmas[i + 1] - sigmas[i]) * v
    return decode(model, x), {name: torch.stack(values) for name, values in record.items()}


# -- The update.


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
    cond: TorchCond,
    start: int,
    advantages: Tensor,
    config: Any,
) -> dict[str, float]:
    """One optimizer step over the window, with KL to the base model if config.train.beta > 0.

    Changes the weights and `ema`. Returns the metrics.
    """
    train = config.train
    window = len(record["logp"])
    cond = cond.repeat(config.sample.branches)
    metrics: dict[str, float] = {}
    for j in range(window):
        # Replay the step.
        i = start + j
        x, mean_old = record["x"][j], record["mean"][j]
        v = velocity(model, x, sigmas[i], cond)
        mean, std = STEPS[config.sample.sde_type](v, x, sigmas, i, config.sample.noise_level)
        log_ratio = log_prob(record["x_next"][j], mean, std) - record["logp"][j]

        # GRPO's loss; GRPO-Guard scales the ratio and the step.
        dt = sigmas[i] - sigmas[i + 1]
        if train.loss == "guard":
            bias = ((mean - mean_old) ** 2).flatten(1).mean(dim=1) / (2 * std**2)
            log_ratio = std * (log_ratio + bias)
        ratio = torch.exp(log_ratio)
        a = advantages.clamp(-train.adv_clip_max, train.adv_clip_max)
        bounded = ratio.clamp(1 - train.clip_range, 1 + train.clip_range)
        policy_loss = torch.maximum(-a * ratio, -a * bounded).mean()
        if train.loss == "guard":
            policy_loss = policy_loss / dt
        losses = {"policy_loss": policy_loss}
        loss = policy_loss

        # KL to the base model.
        if train.beta > 0:
            with torch.no_grad(), model.transformer.disable_adapter():
                v_ref = velocity(model, x, sigmas[i], cond)
            losses["kl_loss"] = ((v - v_ref) ** 2).mean()
            loss = loss + train.beta * losses["kl_loss"]

        (loss / window).backward()
        for name, value in losses.items():
            metrics[name] = metrics.get(name, 0.0) + float(value.detach()) / window

    # Step and EMA.
    norm = torch.nn.utils.clip_grad_norm_(trained(model), train.max_grad_norm)
    metrics["grad_norm"] = float(norm)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for average, p in zip(ema, trained(model), strict=True):
            average.lerp_(p, 1 - train.ema_decay)
    return metrics
