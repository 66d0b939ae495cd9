"""The trainable part: LoRA adapters or all weights. No other code distinguishes the two.

Both classes have the same methods; `model` is the Model that they belong to.
"""

from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from realgen_jax.hosts import process_index, put
from realgen_jax.nn.convert import abstract, save_folder
from realgen_jax.nn.lora import (
    LoraConfig,
    read_lora,
    read_lora_config,
    save_lora,
    with_lora,
)
from realgen_jax.sharding import replicated

NOT_SIZES = ("dtype", "param_dtype", "remat")  # Config fields that are not in config.json


class Trainable(Protocol):
    """The trained part of a model.

    rank: rank of the adapters; 0 if there are none. entry: the flag of scripts/evaluate.py that
    accepts the output of `save`.
    """

    rank: int
    entry: str

    def bind(self, model: Any, state: nnx.State) -> nnx.Module:
        """Return the network with `state` inserted."""

    def abstract(self, model: Any) -> nnx.State:
        """The state as jax.ShapeDtypeStructs with their shardings."""

    def init(self, model: Any, key: Array) -> nnx.State:
        """Return the initial state. It depends on the key but not on the mesh."""

    def load(self, model: Any, path: str | Path) -> nnx.State:
        """Load a state to start from."""

    def check_file(self, path: str | Path) -> None:
        """Raise ValueError or FileNotFoundError if `load` could not take this file."""

    def save(self, model: Any, folder: Path, state: nnx.State) -> None:
        """Write files that diffusers can load. All processes must call this; the first writes."""


@dataclass(frozen=True)
class Lora:
    """Float32 adapters on the family's target projections; the weights are frozen."""

    config: LoraConfig
    entry = "lora"

    @property
    def rank(self) -> int:
        return self.config.rank

    def bind(self, model: Any, state: nnx.State) -> nnx.Module:
        graph, _ = _with_adapters(model.family, model.config, self.config)
        return nnx.merge(graph, model.params, state)

    def abstract(self, model: Any) -> nnx.State:
        _, adapters = _with_adapters(model.family, model.config, self.config)
        everywhere = replicated(model.mesh)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), adapters
        )

    def init(self, model: Any, key: Array) -> nnx.State:
        @jax.jit
        def create(key: Array) -> nnx.State:
            network = _network(model.family, model.config, self.config, key)
            return nnx.state(network, nnx.LoRAParam)

        return self._placed(model, create(key))

    def load(self, model: Any, path: str | Path) -> nnx.State:
        """Load adapters. Raises ValueError for another rank or alpha, and as `read_lora` does."""
        self.check_file(path)
        _, like = _with_adapters(model.family, model.config, self.config)
        table = model.family.table(model.config)
        return self._placed(model, read_lora(path, like, table))

    def check_file(self, path: str | Path) -> None:
        """Raise ValueError if a LoRA file has another rank or alpha; only its header is read."""
        found = read_lora_config(path)
        if (found.rank, found.alpha) != (self.config.rank, self.config.alpha):
            raise ValueError(
                f"{path} has rank {found.rank} and alpha {found.alpha:g}, but config.train has "
                f"lora_rank {self.config.rank} and lora_alpha {self.config.alpha:g}; "
                "set them to the file's"
            )

    def save(self, model: Any, folder: Path, state: nnx.State) -> None:
        if process_index() == 0:
            save_lora(folder, state, self.config, model.family.table(model.config))

    def _placed(self, model: Any, state: nnx.State) -> nnx.State:
        """The same host values on every device of the mesh."""
        everywhere = replicated(model.mesh)
        return jax.tree.map(lambda leaf: put(np.asarray(leaf), everywhere), state)


@dataclass(frozen=True)
class AllWeights:
    """All transformer weights, with float32 master copies sharded like the frozen weights."""

    rank = 0
    entry = "model"

    def bind(self, model: Any, state: nnx.State) -> nnx.Module:
        graph, _ = abstract(model.family.Module, model.config)
        return nnx.merge(graph, state)

    def abstract(self, model: Any) -> nnx.State:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding),
            model.params,
        )

    def init(self, model: Any, key: Array) -> nnx.State:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model.params)

    def load(self, model: Any, path: str | Path) -> nnx.State:
        raise ValueError(
            "config.pretrained.lora is set, but config.train.lora=False trains all weights and has "
            "no adapters; name a transformer with config.pretrained.transformer"
        )

    def check_file(self, path: str | Path) -> None:
        self.load(None, path)

    def save(self, model: Any, folder: Path, state: nnx.State) -> None:
        config = file_config(model.family, model.config)
        table = model.family.table(model.config)
        save_folder(Path(folder) / "transformer", state, table, config)


def file_config(family: Any, config: Any) -> dict[str, Any]:
    """The transformer's config.json as diffusers writes it."""
    entries = {"_class_name": family.transformer, **family.config_entries}
    for name, value in asdict(config).items():
        if name not in NOT_SIZES:
            entries[name] = value
    return entries


def _network(family: Any, config: Any, lora: LoraConfig, key: Array) -> nnx.Module:
    """The family's network with adapters on its targets."""
    network = family.Module(config, nnx.Rngs(0))
    return with_lora(network, family.lora_targets, lora, key)


@cache
def _with_adapters(family: Any, config: Any, lora: LoraConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """The graph of the network with adapters, and the adapters' abstract state."""

    def build() -> nnx.Module:
        return _network(family, config, lora, jax.random.key(0))

    network = nnx.eval_shape(build)
    return nnx.split(network)[0], nnx.state(network, nnx.LoRAParam)


def make_trainable(train: Any) -> Lora | AllWeights:
    """Return the Trainable of `config.train`. Raises ValueError for invalid LoRA settings."""
    if train.lora:
        return Lora(LoraConfig(train.lora_rank, train.lora_alpha, train.lora_init))
    return AllWeights()
