"""Classifier-free guidance (arXiv 2207.12598): one velocity from two passes of the network.

The pass with the negative prompt is called free, the one with the prompt bound:

    v = free + scale (bound - free)

Guidance is part of the velocity, so rollout and update both run it at the same batch size, and the
policy ratio stays exact.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from realgen_jax.models.family import Family

# config.train.cfg_gradient of a guided run.
# both: the gradient goes through both passes (Adv-GRPO, Flow-GRPO, RealGen V2).
# bound: the free pass is taken as constant (RealGen V1).
GRADIENTS = ("both", "bound")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["prompt", "negative", "scale"],
    meta_fields=["gradient"],
)
@dataclass(frozen=True)
class Guided:
    """The conditioning of both passes.

    prompt, negative: a family's conditioning, every leaf [n, ...]. scale: float32 [n]. gradient:
    one of GRADIENTS.
    """

    prompt: Any
    negative: Any
    scale: Array
    gradient: str


def is_guided(family: Family, guidance: float) -> bool:
    """Return whether a velocity takes two passes at this `guidance_scale`.

    At a scale of 1 the free pass has no weight; as in diffusers, a scale below 1 turns guidance off
    too.
    """
    return family.negative_prompt is not None and guidance + family.guidance_offset > 1


def check_gradient(family: Family, guidance: float, gradient: str) -> None:
    """Raise ValueError unless `config.train.cfg_gradient` fits the rollout's guidance."""
    if is_guided(family, guidance):
        if gradient not in GRADIENTS:
            raise ValueError(
                f"config.train.cfg_gradient is {gradient!r}, but config.sample.guidance_scale "
                f"{guidance:g} turns on classifier-free guidance; choose {' or '.join(GRADIENTS)}"
            )
    elif gradient:
        reason = f"{family.pipeline} has no classifier-free guidance"
        if family.negative_prompt is not None:
            reason = f"config.sample.guidance_scale {guidance:g} turns classifier-free guidance off"
        raise ValueError(
            f"config.train.cfg_gradient is {gradient!r}, which has no effect: {reason}; "
            "leave it empty"
        )


def guided_velocity(
    velocity: Callable[..., Array], trainable: Any, x: Array, sigma: Array, cond: Guided
) -> Array:
    """Return the guided velocity, float32 [n, s, c].

    velocity: (trainable, x [n, s, c], sigma float32 [n], cond) -> [n, s, c], one pass.
    """
    if cond.gradient == "both":
        free, bound = _one_pass(velocity, trainable, x, sigma, cond)
    else:
        free, bound = _two_passes(velocity, trainable, x, sigma, cond)

    # Keep the compiler from fusing the combination with its neighbours: they differ between the
    # programs of rollout and update, which must agree to the bit.
    free, bound = jax.lax.optimization_barrier((free, bound))
    return free + cond.scale[:, None, None] * (bound - free)


def _one_pass(
    velocity: Callable[..., Array], trainable: Any, x: Array, sigma: Array, cond: Guided
) -> tuple[Array, Array]:
    """Both velocities from one pass over 2n rows, free_0, bound_0, free_1, bound_1, ...

    The two rows of an image are neighbours, so they are on the same device. With all free rows
    first, devices would have to exchange rows.
    """

    def interleave(free: Array, bound: Array) -> Array:
        pairs = jnp.stack([free, bound], axis=1)
        return pairs.reshape(-1, *pairs.shape[2:])

    rows = jax.tree.map(interleave, cond.negative, cond.prompt)
    both = velocity(trainable, interleave(x, x), interleave(sigma, sigma), rows)
    pairs = both.reshape(-1, 2, *both.shape[1:])
    return pairs[:, 0], pairs[:, 1]


def _two_passes(
    velocity: Callable[..., Array], trainable: Any, x: Array, sigma: Array, cond: Guided
) -> tuple[Array, Array]:
    """Both velocities from two passes over n rows; the free one has no backward pass."""
    constant = jax.lax.stop_gradient((trainable, x))
    free = velocity(*constant, sigma, cond.negative)
    bound = velocity(trainable, x, sigma, cond.prompt)
    return jax.lax.stop_gradient(free), bound
