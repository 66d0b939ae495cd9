"""The golden Z-Image pipeline: 2 blocks, a refiner of each kind, 2 heads of 24 channels."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from realgen_jax.models.loading import load_model
from realgen_jax.models.model import Model
from realgen_jax.models.sources import load_transformer
from realgen_jax.models.trainable import Trainable
from realgen_jax.models.zimage.family import Z_IMAGE
from realgen_jax.models.zimage.transformer import Cond
from realgen_jax.nn.tokens import pack, unpack
from tests.helpers.goldens import GOLDENS
from tests.helpers.models import EXACT, one_device, pretrained

ZIMAGE = GOLDENS / "13_zimage" / "pipeline"


def zimage_model(trainable: Trainable | None = None) -> Model:
    """The golden pipeline for 64x64 pictures, float32."""
    return load_model(
        pretrained(ZIMAGE, family="ZImagePipeline"), (64, 64), one_device(), trainable
    )


def load_zimage(path: Path = ZIMAGE / "transformer", **overrides: Any) -> tuple[Any, nnx.State]:
    """Config and weights of a Z-Image transformer, in float32 unless said otherwise."""
    return load_transformer(Z_IMAGE, path, path, **{**EXACT, **overrides})


def tokens(latents: Any) -> jax.Array:
    """NCHW latents, as goldens and diffusers have them -> our tokens."""
    return pack(jnp.moveaxis(jnp.asarray(latents), 1, -1))


def latents(tokens: jax.Array, height: int, width: int) -> jax.Array:
    """Our tokens -> NCHW latents."""
    return jnp.moveaxis(unpack(tokens, height, width), -1, 1)


def captions(caption: Any, length: Any) -> Cond:
    """The conditioning, from arrays of any kind."""
    return Cond(jnp.asarray(caption), jnp.asarray(np.asarray(length), jnp.int32))


def diffusers_velocity(network: Any, x: Any, sigma: Any, caption: Any, length: Any) -> np.ndarray:
    """v = eps - x0 of diffusers' ZImageTransformer2DModel, for NCHW latents."""
    import torch

    as_torch = [torch.tensor(np.asarray(array)) for array in (x, sigma, caption)]
    images, noise, states = as_torch
    with torch.no_grad():
        pictures = network(
            list(images.unsqueeze(2)),
            1 - noise,
            [row[:end] for row, end in zip(states, np.asarray(length).tolist(), strict=True)],
            return_dict=False,
        )[0]
    return -torch.stack(pictures).squeeze(2).numpy()
