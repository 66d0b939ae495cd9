"""The trainable part: LoRA adapters or all weights. No other code distinguishes the two.

Both classes have the same methods; `model` is the Model that they belong to.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax import Array

from realgen_jax.hosts import process_index, put
from realgen_jax.models.formats import DIFFUSERS, Format
from realgen_jax.nn.convert import abstract, file_state
from realgen_jax.nn.layers import Fixed
from realgen_jax.nn.lora import LoraConfig, factors, with_lora
from realgen_jax.nn.lora_files import LoraFile, open_lora, read_lora, renamed
from realgen_jax.nn.names import Shares, all_names, projections
from realgen_jax.sharding import replicated


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

    def load(self, model: Any, path: str | Path, key: Array) -> nnx.State:
        """Load a state to start from. key: of the random numbers for what the file lacks."""

    def check_file(self, path: str | Path, form: Format = DIFFUSERS) -> None:
        """Raise ValueError or FileNotFoundError for a file that `load` can take for no model.

        form: the `form` of the models' family.
        """

    def check_modules(self, model: Any, path: str | Path) -> None:
        """Raise ValueError for a file that does not fit this model, which may be abstract."""

    def save(self, model: Any, folder: Path, state: nnx.State) -> None:
        """Write files in the family's format. All processes must call this; the first writes."""


@dataclass(frozen=True)
class Lora:
    """Float32 adapters on projections of the network; the weights are frozen.

    targets: paths of the projections; None stands for the family's.
    """

    config: LoraConfig
    targets: tuple[str, ...] | None = None
    entry = "lora"

    @property
    def rank(self) -> int:
        return self.config.rank

    def bind(self, model: Any, state: nnx.State) -> nnx.Module:
        graph, _ = _with_adapters(model.family, model.config, self)
        return nnx.merge(graph, model.params, state)

    def abstract(self, model: Any) -> nnx.State:
        _, adapters = _with_adapters(model.family, model.config, self)
        everywhere = replicated(model.mesh)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), adapters
        )

    def init(self, model: Any, key: Array) -> nnx.State:
        @jax.jit
        def create(key: Array) -> nnx.State:
            network = _network(model.family, model.config, self, key)
            return nnx.state(network, nnx.LoRAParam)

        return self.placed(model, create(key))

    def load(self, model: Any, path: str | Path, key: Array) -> nnx.State:
        """Load adapters to train on, at the strength that they have in the file.

        Modules and ranks that the file lacks start as new ones do, with B zero; with A zero too
        they would have no gradient. Raises the errors of `check_file` and `check_modules`.
        """
        self.check_file(path, model.family.form)
        self.check_modules(model, path)
        file = _open_for(model, path)
        start = _zeros(model, self)
        modules = len(factors(start, model.family.table(model.config))) // 2
        if len(file.pairs) < modules or set(file.ranks.values()) != {self.rank}:
            start = self.init(model, key)
        scale = self.config.alpha / self.config.rank
        adapters = read_lora(file, start, model.family.table(model.config), scale)
        return self.placed(model, adapters)

    def check_file(self, path: str | Path, form: Format = DIFFUSERS) -> None:
        """Raise ValueError if a LoRA file has a larger rank; only its header is read."""
        file = open_lora(path, form.merge)
        rank = max(file.ranks.values())
        if rank > self.config.rank:
            raise ValueError(
                f"{path} has rank {rank}, but config.train.lora_rank is {self.config.rank}; "
                f"expected {rank} or more to go on from this LoRA"
            )
        if file.encoder:
            raise ValueError(
                f"{path} holds adapters of a text encoder ({file.encoder}), which are not trained; "
                "go on from the transformer's part alone, which scripts/export.py writes"
            )

    def check_modules(self, model: Any, path: str | Path) -> None:
        """Raise ValueError if the file holds modules that are not trained."""
        file = renamed(
            open_lora(path, model.family.form.merge), _module_names(model.family, model.config)
        )
        targets = self.targets or model.family.lora_targets(model.config)
        places = _projection_paths(model)
        others = [module for module in file.pairs if places[module] not in targets]
        if others:
            raise ValueError(
                f"{path} holds {min(others)} ({len(others)} such modules), which is not trained; "
                f"{model.family.form.merge_read}"
            )

    def save(self, model: Any, folder: Path, state: nnx.State) -> None:
        if process_index() == 0:
            model.family.form.save_adapters(model, folder, state, self.config)

    def placed(self, model: Any, state: nnx.State) -> nnx.State:
        """The same values on every device of the mesh."""
        everywhere = replicated(model.mesh)
        return jax.tree.map(lambda leaf: put(np.asarray(leaf), everywhere), state)


def with_lora_file(model: Any, path: str | Path) -> tuple[Any, nnx.State]:
    """Return the model with the adapters of any LoRA file on the modules that it covers.

    This is for sampling. Raises the errors of `read_any_lora`.
    """
    trainable, adapters = read_any_lora(model, path)
    model = model.with_trainable(trainable)
    return model, trainable.placed(model, adapters)


def read_any_lora(model: Any, path: str | Path) -> tuple[Lora, nnx.State]:
    """Return the adapters of any LoRA file on the host, and the Lora that they are of.

    Ranks may differ, and any projection may be covered. A text encoder's part is left out, with a
    warning. The model may be abstract. Raises the errors of `open_lora` and `read_lora`.
    """
    file = _open_for(model, path)
    if file.encoder:
        logging.warning(
            "%s also holds adapters of a text encoder (%s), which are left out", path, file.encoder
        )
    places = _projection_paths(model)
    covered = {places[module] for module in file.pairs}
    targets = tuple(target for target in dict.fromkeys(places.values()) if target in covered)

    # What the file lacks is zero.
    rank = max(file.ranks.values())
    trainable = Lora(LoraConfig(rank, float(rank)), targets)
    table = model.family.table(model.config)
    return trainable, read_lora(file, _zeros(model, trainable), table, scale=1.0)


def _zeros(model: Any, lora: Lora) -> nnx.State:
    """Adapters that are zero, on the host."""
    _, like = _with_adapters(model.family, model.config, lora)
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), like)


def _open_for(model: Any, path: str | Path) -> LoraFile:
    """A LoRA file under diffusers' names. Raises the errors of `open_lora` and `renamed`."""
    names = _module_names(model.family, model.config)
    return renamed(open_lora(path, model.family.form.merge), names)


@cache
def _module_names(family: Any, config: Any) -> Mapping[str, Shares]:
    """{a module's flat name in any naming of the family: what it holds of diffusers' modules}."""
    state = file_state(family.Module, config)
    return all_names(state, family.table(config), family.other_tables(config))


def _projection_paths(model: Any) -> dict[str, str]:
    """{torch module, by its published name: path of the projection that holds it}."""
    state = file_state(model.family.Module, model.config)
    table = model.family.table(model.config)
    paths = {}
    for target, _, own_pieces, _ in projections(state, table, table):
        for piece in own_pieces:
            paths[piece.module] = target
    return paths


@dataclass(frozen=True)
class AllWeights:
    """All weights of the network, with float32 master copies sharded like the frozen weights.

    Arrays of the model that are no weights (nn.layers.Fixed) are not among them.
    """

    rank = 0
    entry = "model"

    def bind(self, model: Any, state: nnx.State) -> nnx.Module:
        graph, _ = abstract(model.family.Module, model.config)
        return nnx.merge(graph, self._whole(model, state))

    def abstract(self, model: Any) -> nnx.State:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding),
            nnx.filter_state(model.params, nnx.Param),
        )

    def init(self, model: Any, key: Array) -> nnx.State:
        weights = nnx.filter_state(model.params, nnx.Param)
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), weights)

    def load(self, model: Any, path: str | Path, key: Array) -> nnx.State:
        self.check_file(path, model.family.form)

    def check_file(self, path: str | Path, form: Format = DIFFUSERS) -> None:
        raise ValueError(
            f"{form.start} is set, but config.train.lora=False trains all weights and has no "
            f"adapters; name {form.weights}"
        )

    def check_modules(self, model: Any, path: str | Path) -> None:
        self.check_file(path, model.family.form)

    def save(self, model: Any, folder: Path, state: nnx.State) -> None:
        model.family.form.save_weights(model, folder, self._whole(model, state))

    def _whole(self, model: Any, state: nnx.State) -> nnx.State:
        """The weights, and what is no weight."""
        return nnx.merge_state(state, nnx.filter_state(model.params, Fixed))


def _network(family: Any, config: Any, lora: Lora, key: Array) -> nnx.Module:
    """The family's network with adapters on the targets."""
    rows = family.table(config).rows
    paths = lora.targets or family.lora_targets(config)
    targets = {path: len(rows[path]) for path in paths}
    return with_lora(family.Module(config, nnx.Rngs(0)), targets, lora.config, key)


@cache
def _with_adapters(family: Any, config: Any, lora: Lora) -> tuple[nnx.GraphDef, nnx.State]:
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
