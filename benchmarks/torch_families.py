"""What differs between the model families on the PyTorch side of benchmarks/peers.py."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import diffusers
import torch
from torch import Tensor


@dataclass(frozen=True)
class TorchFamily:
    """A model family in diffusers.

    transformer: its class. tokens: whether its latents are tokens [n, s, c], or else
    [n, c, height, width]. inputs(x, sigma [n], rows, side): the arguments of a forward pass. rows:
    the leaves of our family's Cond, in their order. side: tokens down and across.
    """

    transformer: type
    tokens: bool
    inputs: Callable[[Tensor, Tensor, tuple[Tensor, ...], int], dict[str, Tensor]]


@cache
def flux_positions(side: int) -> Tensor:
    """Positions of the image tokens, [side^2, 3]."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()


def flux_inputs(x: Tensor, sigma: Tensor, rows: tuple[Tensor, ...], side: int) -> dict[str, Tensor]:
    """The arguments of FluxTransformer2DModel."""
    t5, clip, guidance = rows
    return {
        "hidden_states": x,
        "timestep": sigma,
        "guidance": guidance,
        "pooled_projections": clip,
        "encoder_hidden_states": t5,
        "txt_ids": torch.zeros(t5.shape[1], 3),
        "img_ids": flux_positions(side),
    }


def sd3_inputs(x: Tensor, sigma: Tensor, rows: tuple[Tensor, ...], side: int) -> dict[str, Tensor]:
    """The arguments of SD3Transformer2DModel."""
    text, pooled = rows
    return {
        "hidden_states": x,
        "timestep": 1000 * sigma,
        "encoder_hidden_states": text,
        "pooled_projections": pooled,
    }


# By "_class_name" in model_index.json.
TORCH_FAMILIES = {
    "FluxPipeline": TorchFamily(diffusers.FluxTransformer2DModel, True, flux_inputs),
    "StableDiffusion3Pipeline": TorchFamily(diffusers.SD3Transformer2DModel, False, sd3_inputs),
}
