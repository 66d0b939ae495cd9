"""The one training loop of the build: AdamW, cosine decay, EMA; resumes from its last checkpoint."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

SAVE_EVERY = 250  # steps


def rng(stage: str, step: int) -> np.random.Generator:
    """The random numbers of one step of one stage. They depend on nothing else, so a resumed build repeats none."""
    return np.random.default_rng([*stage.encode(), step])


def kept(file: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array in `file` (.npy), made once; a build that is killed leaves all of it or none."""
    if not file.exists():
        part = file.with_suffix(".part.npy")
        np.save(part, make())
        part.replace(file)
    return np.load(file)


def fit(
    stage: str,
    model: nn.Module,
    loss_fn: Callable[[nn.Module, np.random.Generator], tuple[torch.Tensor, dict[str, float]]],
    work: Path,
    *,
    steps: int,
    lr: float,
    warmup: int = 100,
    weight_decay: float = 0.01,
    ema_decay: float = 0.999,
) -> nn.Module:
    """Train `model` in place for `steps` steps and return it holding its averaged (EMA) weights.

    `loss_fn(model, rng)` draws its own batch from `rng`. Progress is kept in `work/<stage>.pt`; calling again
    continues from there and gives the same weights as an uninterrupted call on the same machine.
    """
    file = work / f"{stage}.pt"
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99))
    ema = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(ema_decay), use_buffers=True
    )
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
        scale = min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.01)
        for group in optimizer.param_groups:
            group["lr"] = lr * scale
        model.train()
        loss, metrics = loss_fn(model, rng(stage, step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        ema.update_parameters(model)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            shown = "  ".join(f"{k} {v:.4f}" for k, v in metrics.items())
            print(
                f"{stage} {step + 1}/{steps}  loss {loss.item():.4f}  {shown}  {time.time() - clock:.0f} s",
                flush=True,
            )
            state = {
                "model": model.state_dict(),
                "ema": ema.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            torch.save(
                {**state, "step": step + 1, "rng": torch.get_rng_state()}, file.with_suffix(".tmp")
            )
            file.with_suffix(".tmp").replace(file)
    model.load_state_dict(ema.module.state_dict())
    return model.eval()
