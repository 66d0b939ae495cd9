"""Small models for the tests: the golden pipeline, and FLUX of any size."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from realgen_jax.models.flux.family import FLUX, FluxSchedule
from realgen_jax.models.formats import file_config
from realgen_jax.models.loading import load_model
from realgen_jax.models.model import Model
from realgen_jax.models.sources import load_transformer
from realgen_jax.models.trainable import AllWeights, Lora, Trainable
from realgen_jax.nn.export import save_folder, to_torch
from realgen_jax.nn.lora import LoraConfig
from realgen_jax.nn.vae import VaeConfig
from realgen_jax.sharding import make_mesh
from tests.helpers.goldens import PIPELINE

EXACT = {"dtype": jnp.float32, "param_dtype": jnp.float32}


def one_device() -> jax.sharding.Mesh:
    return make_mesh(1, 1, 1, jax.devices()[:1])


def pretrained(model: Path = PIPELINE, **changes: Any) -> ConfigDict:
    """A `config.pretrained` in float32."""
    values = {
        "model": str(model), "family": "FluxPipeline", "transformer": "", "vae": "", "lora": "",
        "dtype": "float32", "param_dtype": "float32", "vae_dtype": "float32", "remat": "full",
        "vae_tile": 0, "quantization": "", "offload": False,
    }  # fmt: skip
    return ConfigDict({**values, **changes})


def golden_model(side: int = 64, trainable: Trainable | None = None) -> Model:
    """The golden pipeline: 1 double and 2 single blocks, 64x64 pictures, float32."""
    return load_model(pretrained(), (side, side), one_device(), trainable)


def flux_model(
    config: Any,
    params: nnx.State,
    side: int,
    trainable: Trainable | None = None,
    mesh: jax.sharding.Mesh | None = None,
    vae: VaeConfig | None = None,
    vae_params: nnx.State | None = None,
) -> Model:
    """FLUX of this size, on side x side tokens."""
    return Model(
        params=params,
        vae_params=vae_params,
        family=FLUX,
        config=config,
        vae=vae or VaeConfig(),
        schedule=FluxSchedule(),
        trainable=trainable or AllWeights(),
        height=side,
        width=side,
        mesh=mesh or one_device(),
    )


def load_flux(path: Path, **overrides: Any) -> tuple[Any, nnx.State]:
    """Config and weights of a FLUX transformer, in float32 unless said otherwise."""
    return load_transformer(FLUX, path, PIPELINE / "transformer", **{**EXACT, **overrides})


def save_flux(folder: Path, config: Any, state: nnx.State, shard_bytes: int = 10**10) -> None:
    """A `transformer/` folder of diffusers."""
    tensors = to_torch(state, FLUX.table(config))
    save_folder(folder, tensors, file_config(FLUX, config), shard_bytes)


def load_adapters(model: Model, path: Path, config: LoraConfig) -> tuple[Model, nnx.State]:
    """A LoRA file to train on, and the model with room for it."""
    model = model.with_trainable(Lora(config))
    return model, model.trainable.load(model, path, jax.random.key(0))


def fresh_adapters(model: Model, config: LoraConfig, key: jax.Array) -> tuple[Model, nnx.State]:
    """New adapters, and the model with room for them."""
    model = model.with_trainable(Lora(config))
    return model, model.trainable.init(model, key)
