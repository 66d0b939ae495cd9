"""GRPO with the numbers of a test."""

from typing import Any

from realgen_jax.objectives.grpo import Grpo, LossConfig, guard_loss, velocity_kl
from realgen_jax.objectives.reference import Reference


def grpo(
    *,
    loss: Any = guard_loss,
    kl: Any = velocity_kl,
    beta: float = 4e-4,
    clip: float = 2e-6,
    adv_clip: float = 5.0,
    guard_bias: str = "sample",
    sde_type: str = "sde",
    noise_level: float = 0.9,
    window: int = 3,
    bounds: tuple[int, int] = (0, 6),
    branches: int = 1,
) -> Grpo:
    """The objective; by default GRPO-Guard as RealGen trains it."""
    config = LossConfig(clip, adv_clip, guard_bias)
    return Grpo(loss, kl, config, Reference(beta), sde_type, noise_level, window, bounds, branches)
