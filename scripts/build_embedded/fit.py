"""The training loop of every stage: AdamW, cosine decay, EMA; it resumes from a checkpoint."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

SAVE_EVERY = 250  # steps

# loss_fn(model, rng) -> (loss, metrics)
LossFn = Callable[[nn.Module, np.random.Generator], tuple[torch.Tensor, dict[str, float]]]


def rng(stage: str, step: int) -> np.random.Generator:
    """Return the random generator of one step of one stage.

    It depends on nothing else, so a resumed build draws the same numbers.
    """
    return np.random.default_rng([*stage.encode(), step])


def kept(file: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Return the array in `file` (.npy), made once. A killed build leaves all of it or nothing."""
    if not file.exists():
        part = file.with_suffix(".part.npy")
        np.save(part, make())
        part.replace(file)
    return np.load(file)


def fit(
    stage: str,
    model: nn.Module,
    loss_fn: LossFn,
    work: Path,
    *,
    steps: int,
    lr: float,
    warmup: int = 100,
    weight_decay: float = 0.01,
    ema_decay: float = 0.999,
) -> nn.Module:
    """Train `model` in place and return it with its averaged (EMA) weights.

    `loss_fn(model, rng)` draws its own batch from `rng`. Progress is kept in `work/<stage>.pt`.
    Calling again continues from there, and gives the same weights as an uninterrupted call on the
    same machine.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99))
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(ema_decay)
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average, use_buffers=True)

    # Resume.
    file = work / f"{stage}.pt"
    start = 0
    if file.exists():
        saved = torch.load(file, weights_only=True)
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
        torch.set_rng_state(saved["rng"])

    clock = time.time()
    for step in range(start, steps):
        if step == 0:
            torch.manual_seed(0)

        # Linear warm-up, then cosine decay to a hundredth.
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.01
        scale = min((step + 1) / warmup, cosine)
        for group in optimizer.param_groups:
            group["lr"] = lr * scale

        # One step.
        model.train()
        loss, metrics = loss_fn(model, rng(stage, step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        ema.update_parameters(model)

        # Report and save.
        done = step + 1
        if done % SAVE_EVERY == 0 or done == steps:
            values = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            seconds = time.time() - clock
            progress = f"{stage} {done}/{steps}  loss {loss.item():.4f}"
            print(f"{progress}  {values}  {seconds:.0f} s", flush=True)
            save(file, model, ema, optimizer, done)

    model.load_state_dict(ema.module.state_dict())
    return model.eval()


def save(
    file: Path, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> None:
    """Write a checkpoint. A killed build leaves the old one or the new one."""
    state = {
        "model": model.state_dict(),
        "ema": ema.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "rng": torch.get_rng_state(),
    }
    part = file.with_suffix(".tmp")
    torch.save(state, part)
    part.replace(file)
