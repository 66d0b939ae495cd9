"""The golden language models, and random ones of any size."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from realgen_jax.models.language import LanguageModel, load_language_model
from realgen_jax.models.qwen.family import QWEN3
from realgen_jax.models.qwen.transformer import Qwen3, Qwen3Config
from realgen_jax.models.trainable import Lora, Trainable
from realgen_jax.nn.convert import abstract, leaves
from realgen_jax.nn.lora import LoraConfig
from realgen_jax.rewriter.generate import Tokens
from realgen_jax.sharding import batch_sharding, param_sharding
from tests.helpers.goldens import GOLDENS, golden
from tests.helpers.models import one_device

RECORDED = GOLDENS / "15_rewriter"
TIED = RECORDED / "qwen3_tied"
UNTIED = RECORDED / "qwen3_untied"
ADAPTER = RECORDED / "adapter"
LORA = Lora(LoraConfig(rank=4, alpha=8.0, init="kaiming"))
# With fewer than 64 channels, XLA's CPU compiler makes other loops of a product in every program.
SMALL = Qwen3Config(
    vocab_size=192,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=128,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
)


def settings(folder: Path = TIED, **changes: Any) -> SimpleNamespace:
    """A `config.rewriter` in float32."""
    values = {"path": str(folder), "dtype": "float32", "param_dtype": "float32", "remat": "full"}
    return SimpleNamespace(**{**values, **changes})


def golden_language(
    folder: Path = TIED, trainable: Trainable | None = None, mesh: Any = None
) -> LanguageModel:
    """A model of two layers."""
    return load_language_model(settings(folder), mesh or one_device(), trainable)


def random_language(
    config: Qwen3Config, mesh: Any = None, trainable: Trainable | None = None, std: float = 0.2
) -> LanguageModel:
    """Random weights, the same on every mesh; norms around 1."""
    mesh = mesh or one_device()
    sharding = param_sharding(mesh, QWEN3.rules)
    state = abstract(Qwen3, config)[1]
    drawn = {}
    for number, (name, leaf) in enumerate(leaves(state).items()):
        values = np.random.default_rng(number).normal(size=leaf.shape)
        width = leaf.shape[-2] if name.endswith("kernel") else 1
        values = values / width**0.5 if name.endswith("kernel") else std * values
        drawn[name] = values + ("norm" in name)
    flat = iter(drawn.items())

    def place(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name, values = next(flat)
        return jax.device_put(jnp.asarray(values, leaf.dtype), sharding(name, leaf.shape))

    params = jax.tree.map(place, state)
    return LanguageModel(params, QWEN3, config, trainable or LORA, mesh)


def random_adapters(model: LanguageModel, scale: float = 0.05) -> Any:
    """Adapters that are not zero, the same on every mesh."""

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        noise = np.random.default_rng(leaf.size).normal(size=leaf.shape)
        is_a = leaf.shape[-1] == model.trainable.rank
        values = noise / leaf.shape[-3] ** 0.5 if is_a else scale * noise
        return jax.device_put(values.astype(np.float32), leaf.sharding)

    return jax.tree.map(draw, model.trainable.abstract(model))


def prompts(vocabulary: int, lengths: tuple[int, ...], width: int) -> tuple[np.ndarray, ...]:
    """Random prompts of these lengths, padded on the left with 0: ids and mask [n, width]."""
    rng = np.random.default_rng(len(lengths))
    ids = rng.integers(2, vocabulary, (len(lengths), width)).astype(np.int32)
    mask = np.arange(width) >= width - np.array(lengths)[:, None]
    return np.where(mask, ids, 0).astype(np.int32), mask


def row_keys(n: int, seed: int = 0) -> jax.Array:
    """A key for each row that depends on its number alone."""
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(n))


def golden_tokens(sampled: np.ndarray | None = None) -> Tokens:
    """The six rows of grpo.npz."""
    case = golden("15_rewriter/grpo.npz")
    mask = case["completion_mask"].astype(bool)
    logp = np.zeros(mask.shape, np.float32) if sampled is None else sampled
    return Tokens(
        jnp.asarray(case["ids"], jnp.int32),
        jnp.asarray(case["mask"].astype(bool)),
        jnp.asarray(mask),
        jnp.asarray(logp),
        int(case["prompt_length"]),
    )


def on_rows(tree: Any, mesh: Any, axis: int = 0) -> Any:
    """Arrays with their rows over data and fsdp."""
    return jax.device_put(tree, batch_sharding(mesh, axis))


def changed_folder(folder: Path, source: Path = TIED, tensors: Any = None, **config: Any) -> Path:
    """A copy of a golden folder with other entries in config.json (None: removed) or other tensors.

    tensors: a function of the file's tensors.
    """
    target = folder / "model"
    shutil.copytree(source, target)
    entries = json.loads((target / "config.json").read_text()) | config
    entries = {name: value for name, value in entries.items() if value != "removed"}
    (target / "config.json").write_text(json.dumps(entries))
    if tensors is not None:
        arrays = load_file(target / "model.safetensors")
        tensors(arrays)
        save_file(arrays, target / "model.safetensors", {"format": "pt"})
    return target
