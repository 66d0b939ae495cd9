"""Shared by the tests: golden arrays, and the tiny pipeline that several of them were made with."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # torch too, and the programs that tests start

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realgen_jax.flux.convert import load_transformer, load_vae
from realgen_jax.flux.lora import make_velocity

GOLDENS = Path(__file__).parent / "goldens"
PIPELINE = GOLDENS / "08_pipeline" / "pipeline"

jax.config.update("jax_num_cpu_devices", 8)


def pytest_collection_modifyitems(config, items):
    """`slow` tests run only when asked for (`-m slow`)."""
    if not config.getoption("-m"):
        skip = pytest.mark.skip(reason="slow: run by `make test-slow`")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / name, allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def tiny():
    """The golden pipeline (1 double and 2 single blocks, 64x64 pictures) in float32, without LoRA."""
    exact = {"dtype": jnp.float32, "param_dtype": jnp.float32}
    config, params = load_transformer(PIPELINE / "transformer", **exact)
    vae_config, vae_params = load_vae(PIPELINE / "vae")
    velocity = make_velocity(config, None, 4, 4)
    return SimpleNamespace(
        config=config, params=params, velocity=velocity, vae_config=vae_config, vae_params=vae_params
    )


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Compiled programs and embeddings, shared by all runs of train.py and by pytest's workers."""
    root = tmp_path_factory.getbasetemp()
    return (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "cache"
