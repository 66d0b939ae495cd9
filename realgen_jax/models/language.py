"""A language model of any family on a mesh, from a Hugging Face folder."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from realgen_jax.models.language_family import LANGUAGES, LanguageFamily, get_language
from realgen_jax.models.trainable import AllWeights, Trainable, with_lora_file
from realgen_jax.nn.convert import abstract, check_keys, load, with_shardings
from realgen_jax.nn.tensors import Tensors, has_weights, read_json
from realgen_jax.sharding import BATCH_AXES, constrain, param_sharding

STEM = "model"  # the name of the files of weights
LAYERS = "layers."  # what the paths of the blocks' arrays begin with
CHUNK = 4096  # rows of the embedding that are compared with the head's at a time

# (ids [n], positions [n], cache, place [], attended [n, m]) -> hidden states [n, D], cache
Step = Callable[[Array, Array, Any, Array, Array], tuple[Array, Any]]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["params"],
    meta_fields=["family", "config", "trainable", "mesh", "folder"],
)
@dataclass(frozen=True)
class LanguageModel:
    """A pytree of the frozen weights, so that jitted functions can take it as an argument.

    Shapes: n rows, t tokens, D hidden channels, V tokens in the vocabulary. params: in an abstract
    model they are jax.ShapeDtypeStructs. folder: where it was loaded from. In all methods,
    `trainable` is the trained state; None means the base model.

    Raises ValueError if the mesh axis `tensor` does not divide the numbers of heads.
    """

    params: nnx.State
    family: LanguageFamily
    config: Any
    trainable: Trainable
    mesh: Mesh
    folder: str = ""

    def __post_init__(self):
        parts = self.mesh.shape["tensor"]
        for name in ("num_attention_heads", "num_key_value_heads"):
            heads = getattr(self.config, name)
            if heads % parts:
                raise ValueError(
                    f"{name} {heads} of the language model is not divisible by mesh axis "
                    f"tensor={parts}; attention is split by whole heads"
                )

    def hidden(self, trainable: Any, ids: Array, mask: Array) -> Array:
        """Hidden states after the last norm, [n, t, D], of ids int32 [n, t].

        mask: bool [n, t], the real tokens, which are consecutive in every row. A row's states do
        not depend on its padding; those of the padding mean nothing. Positions count from the first
        real token.
        """
        network = self._network(trainable)
        start = _start(mask)
        hidden = network(_rolled(ids, start), self.mesh)
        return _rolled(hidden, -start)

    def logits(self, trainable: Any, hidden: Array) -> Array:
        """Hidden states [n, ..., D] -> logits, float32 [n, ..., V]."""
        return self._network(trainable).logits(hidden, self.mesh)

    def prefill(
        self, trainable: Any, ids: Array, mask: Array, places: int
    ) -> tuple[Array, tuple[tuple[Array, Array], ...]]:
        """Hidden states [n, D] of each row's last token, and a cache for `step`.

        ids int32 [n, l], padded on the left; mask bool [n, l]. The cache has `places` places, of
        which the first l are filled: keys and values of each layer, [n, k, places, d].
        """
        network = self._network(trainable)
        start = _start(mask)
        hidden, cache = network.prefill(_rolled(ids, start), self.mesh)
        last = _rolled(hidden, -start)[:, -1]

        # Back to the right, where each row's next token has the same place.
        def place(array: Array) -> Array:
            array = jnp.swapaxes(_rolled(array, -start), 1, 2)
            room = ((0, 0), (0, 0), (0, places - ids.shape[1]), (0, 0))
            return constrain(jnp.pad(array, room), self.mesh, BATCH_AXES, "tensor")

        keys, values = cache
        layers = range(self.config.num_hidden_layers)
        return last, tuple((place(keys[i]), place(values[i])) for i in layers)

    def decoder(self, trainable: Any) -> tuple[Step, Callable[[Array], Array]]:
        """Return (step, logits) for a loop over tokens, to be called before the loop begins.

        They hold a copy of the weights that is not split over fsdp, so that no step gathers them.
        """
        network = self._network(trainable)
        blocks = network.blocks()
        if self.mesh.shape["fsdp"] > 1:
            blocks = [self._gathered(block, LAYERS) for block in blocks]
            network = self._gathered(network)

        def step(
            ids: Array, positions: Array, cache: Any, place: Array, attended: Array
        ) -> tuple[Array, Any]:
            return network.step(blocks, ids, positions, cache, place, attended, self.mesh)

        return step, partial(network.logits, mesh=self.mesh)

    def with_trainable(self, trainable: Trainable) -> "LanguageModel":
        """Return a model with the same weights and a different trainable part."""
        return replace(self, trainable=trainable)

    def _network(self, trainable: Any) -> nnx.Module:
        if trainable is None:
            graph, _ = abstract(self.family.Module, self.config)
            return nnx.merge(graph, self.params)
        return self.trainable.bind(self, trainable)

    def _gathered(self, module: nnx.Module, prefix: str = "") -> nnx.Module:
        """A module with its weights in the compute dtype, split over `tensor` alone.

        prefix: LAYERS for a block, whose arrays have no layer axis. The stack of layers itself is
        left as it is. Weights are converted where they are stored, so that no float32 moves.
        """
        graph, state = nnx.split(module)
        whole = []
        for path, variable in nnx.to_flat_state(state):
            name = ".".join(map(str, path))
            specs = [spec for rule, spec in self.family.rules if re.fullmatch(rule, prefix + name)]
            if specs and not name.startswith(LAYERS):
                spec = specs[0][1:] if prefix else specs[0]
                array = variable.get_value().astype(self.config.dtype)
                array = constrain(array, self.mesh, *spec)
                array = constrain(array, self.mesh, *map(_over_tensor, spec))
                variable = variable.replace(array)
            whole.append((path, variable))
        return nnx.merge(graph, nnx.from_flat_state(whole))


def _over_tensor(axes: str | tuple[str, ...] | None) -> str | None:
    """The mesh axis `tensor` if an array's axis is split over it."""
    return "tensor" if axes and "tensor" in axes else None


def _start(mask: Array) -> Array:
    """The place of each row's first real token, int32 [n]."""
    return jnp.argmax(mask, axis=1).astype(jnp.int32)


def _rolled(array: Array, shift: Array) -> Array:
    """Move each row of an array [n, t, ...] by its shift, int32 [n], towards the beginning."""
    tokens = array.shape[1]
    places = (jnp.arange(tokens) + shift[:, None]) % tokens
    places = places.reshape(*places.shape, *(1,) * (array.ndim - 2))
    return jnp.take_along_axis(array, places, axis=1)


def load_language_model(
    settings: Any, mesh: Mesh, trainable: Trainable | None = None
) -> LanguageModel:
    """Load the model in the Hugging Face folder `settings.path`.

    settings: config.rewriter, of which path, dtype, param_dtype and remat are read. Raises
    FileNotFoundError for missing files and ValueError for files of another model. Where names,
    shapes and config.json are enough to tell, this happens before any weight is read.
    """
    folder = Path(settings.path)
    if not _on_disk(settings):
        raise FileNotFoundError(missing_language_model(settings))
    model = abstract_language_model(settings, mesh, trainable)
    tensors = _tensors(folder, model.family, model.config)
    _check_tied(Tensors(folder, STEM), model.family, model.config)

    sharding = param_sharding(mesh, model.family.rules)
    params = load(tensors, model.params, model.family.table(model.config), sharding)
    return replace(model, params=params)


def load_with_adapter(
    path: str | Path, adapter: str, dtype: str, mesh: Mesh
) -> tuple[LanguageModel, nnx.State | None]:
    """Load a model to sample from, and the adapters of a peft folder, or None for "".

    dtype: of weights and computation. Raises the errors of `load_language_model` and
    `with_lora_file`.
    """
    settings = SimpleNamespace(path=str(path), dtype=dtype, param_dtype=dtype, remat="none")
    model = load_language_model(settings, mesh)
    return with_lora_file(model, adapter) if adapter else (model, None)


def abstract_language_model(
    settings: Any, mesh: Any, trainable: Trainable | None = None
) -> LanguageModel:
    """Return the model without weights; its leaves are jax.ShapeDtypeStructs with shardings.

    Without a folder, the sizes are those of Qwen3-4B-Instruct-2507. `mesh` may be an AbstractMesh.
    Raises the errors of `load_language_model`; weights may be absent, but those that are there must
    have the model's names.
    """
    overrides = {
        "dtype": jnp.dtype(settings.dtype),
        "param_dtype": jnp.dtype(settings.param_dtype),
        "remat": settings.remat,
    }
    folder = Path(settings.path)
    if _on_disk(settings):
        family = find_language(folder)
        config = family.read_config(folder, **overrides)
    else:
        family = get_language(next(iter(LANGUAGES)))
        config = family.Config(**overrides)

    state = abstract(family.Module, config)[1]
    if _on_disk(settings) and has_weights(folder, STEM):
        check_keys(_tensors(folder, family, config), state, family.table(config))
    return LanguageModel(
        params=with_shardings(state, param_sharding(mesh, family.rules)),
        family=family,
        config=config,
        trainable=trainable or AllWeights(),
        mesh=mesh,
        folder=str(settings.path),
    )


def find_language(folder: Path) -> LanguageFamily:
    """Return the family of a Hugging Face folder, by "model_type" in its config.json."""
    file = folder / "config.json"
    name = read_json(file).get("model_type")
    if name not in LANGUAGES:
        raise ValueError(
            f"{file} has model_type {name!r}; expected {' or '.join(map(repr, LANGUAGES))}"
        )
    return get_language(name)


def missing_language_model(settings: Any) -> str:
    """Say what to do about a missing folder."""
    family = get_language(next(iter(LANGUAGES)))
    if not settings.path:
        return "config.rewriter.path is empty; expected a Hugging Face folder. " + family.download
    return (
        f"config.rewriter.path is {str(settings.path)!r}, which holds no config.json; expected a "
        f"Hugging Face folder. For {family.published} {family.download}"
    )


def _on_disk(settings: Any) -> bool:
    return bool(settings.path) and (Path(settings.path) / "config.json").exists()


def _tensors(folder: Path, family: LanguageFamily, config: Any) -> Tensors:
    """The folder's tensors. Those of a tied model may hold the head, which is not read."""
    tensors = Tensors(folder, STEM)
    return tensors.without(family.tied[1]) if config.tie_word_embeddings else tensors


def _check_tied(tensors: Tensors, family: LanguageFamily, config: Any) -> None:
    """Raise ValueError if a tied model's file holds a head that is not its embedding."""
    embedding, head = family.tied
    if not config.tie_word_embeddings or head not in tensors.keys():  # noqa: SIM118
        return
    problem = (
        f"{head} in {tensors.path} differs from {embedding}, but config.json has "
        "tie_word_embeddings true; expected the same array, or none"
    )
    shape = tensors.shape(embedding)
    if tensors.shape(head) != shape:
        raise ValueError(problem)
    for start in range(0, shape[0], CHUNK):
        stop = min(start + CHUNK, shape[0])
        if (
            tensors.read(head, start, stop).tobytes()
            != tensors.read(embedding, start, stop).tobytes()
        ):
            raise ValueError(problem)
