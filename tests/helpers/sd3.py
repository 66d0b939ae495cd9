"""The golden SD3 pipeline: 4 blocks, 2 of them with a second attention, 2 heads of 16 channels."""

from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from realgen_jax.models.loading import load_model
from realgen_jax.models.model import Model
from realgen_jax.models.sd3.family import SD3
from realgen_jax.models.sources import load_transformer
from realgen_jax.models.trainable import Trainable
from tests.helpers.goldens import GOLDENS
from tests.helpers.models import EXACT, one_device, pretrained

SD3_PIPELINE = GOLDENS / "12_sd3" / "pipeline"


def sd3_model(trainable: Trainable | None = None) -> Model:
    """The golden pipeline for 64x64 pictures, float32."""
    chosen = pretrained(SD3_PIPELINE, family="StableDiffusion3Pipeline")
    return load_model(chosen, (64, 64), one_device(), trainable)


def load_sd3(path: Path, height: int, width: int, **overrides: Any) -> tuple[Any, nnx.State]:
    """Config and weights of an SD3 transformer for height x width tokens.

    In float32 unless said otherwise.
    """
    overrides = {**EXACT, "image_size": (height, width), **overrides}
    return load_transformer(SD3, path, path, **overrides)


def diffusers_velocity(network: Any, x: Any, sigma: Any, text: Any, pooled: Any) -> np.ndarray:
    """v = eps - x0 of diffusers' SD3Transformer2DModel, for NCHW latents."""
    import torch

    x, sigma, text, pooled = (torch.tensor(np.asarray(a)) for a in (x, sigma, text, pooled))
    with torch.no_grad():
        return network(x, text, pooled, 1000 * sigma, return_dict=False)[0].numpy()
