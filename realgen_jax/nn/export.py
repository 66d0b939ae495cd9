"""Write weights as published checkpoints have them, by a family's table (convert.py).

One tensor is made and written at a time, from our arrays or from another checkpoint.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from realgen_jax.files import write_whole
from realgen_jax.hosts import fetch, process_index
from realgen_jax.nn.convert import (
    Piece,
    Source,
    Table,
    check_keys,
    fill_layer,
    leaves,
    pieces,
    source_of,
)
from realgen_jax.nn.stored import write_tensors
from realgen_jax.nn.tensors import STEM, Tensors

READABLE = {"format": "pt"}  # what transformers expects in a header

# (a path of our arrays) -> a function of the layer that returns it with a fused projection's parts
# side by side. It returns the file's whole tensor for an array that holds a part of one.
Reader = Callable[[str], Callable[[int], np.ndarray]]


@dataclass(frozen=True)
class _Place:
    """Where a tensor, or some of its rows, lie in our arrays."""

    leaf: str
    layer: int
    source: Source
    piece: Piece


@dataclass(frozen=True)
class TorchTensors:
    """Tensors in torch's layout: iterate for (key, array), in the order of `shapes`.

    All processes must iterate. shapes: {key: jax.ShapeDtypeStruct}.
    """

    shapes: Mapping[str, jax.ShapeDtypeStruct]
    plan: Mapping[str, tuple[_Place, ...]]
    read: Reader

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        opened: dict[str, Callable[[int], np.ndarray]] = {}
        for key, places in self.plan.items():
            names = {place.leaf for place in places}
            if opened.keys() != names:
                opened = {}  # frees those before the next are fetched
                opened = {leaf: self.read(leaf) for leaf in names}
            array = _gather(places, opened, self.shapes[key].shape)
            yield key, array.astype(self.shapes[key].dtype, copy=False)


def _gather(
    places: tuple[_Place, ...],
    opened: Mapping[str, Callable[[int], np.ndarray]],
    shape: tuple[int, ...],
) -> np.ndarray:
    """A tensor out of the arrays that hold its rows."""
    parts = []
    for place in sorted(places, key=lambda place: place.piece.start):
        array = opened[place.leaf](place.layer)
        if not place.source.bare:
            array = _to_torch(array[..., place.piece.begin : place.piece.end])
        parts.append(array)
    array = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return np.ascontiguousarray(array.reshape(shape))


def _to_torch(array: np.ndarray) -> np.ndarray:
    """[*window, in, out] -> [out, in, *window]."""
    return array.transpose(*range(array.ndim)[:-3:-1], *range(array.ndim - 2))


def _planned(state: nnx.State, table: Table, read: Reader, dtype: Any = None) -> TorchTensors:
    """The tensors of a state, of which shapes are read. Keys of the same arrays are neighbours."""
    values = leaves(state)
    places: dict[str, list[_Place]] = {}
    for leaf, value in values.items():
        source = source_of(leaf, table)
        shape = source.joined_shape(value.shape)
        for layer in range(shape[0] if source.stacked else 1):
            for piece in pieces(source.parts, shape[-1], layer):
                key = piece.module + source.suffix
                places.setdefault(key, []).append(_Place(leaf, layer, source, piece))

    order: dict[tuple[str, ...], list[str]] = {}
    for key, own in places.items():
        names = tuple(dict.fromkeys(place.leaf for place in own))
        order.setdefault(names, []).append(key)
    plan = {key: tuple(places[key]) for keys in order.values() for key in keys}

    shapes = {}
    for key, own in plan.items():
        value = values[own[0].leaf]
        shape = _torch_shape(own[0], value.shape)
        shapes[key] = jax.ShapeDtypeStruct(shape, np.dtype(dtype or value.dtype))
    return TorchTensors(shapes, plan, read)


def _torch_shape(place: _Place, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tensor some of whose rows are in an array of this shape."""
    source = place.source
    if source.cut is not None:
        return source.cut.shape
    shape = source.joined_shape(shape)[1 if source.stacked else 0 :]
    if source.bare:
        return shape
    shape = (place.piece.rows, *shape[-2:-1], *shape[:-2])
    if source.window is None:
        return shape
    return (shape[0], shape[1] // math.prod(source.window), *source.window)


def to_torch(state: nnx.State, table: Table) -> TorchTensors:
    """The tensors of our arrays. Those that share tensors are fetched together, else one by one."""
    values = leaves(state)

    def read(leaf: str) -> Callable[[int], np.ndarray]:
        source = source_of(leaf, table)
        host = source.joined(fetch(values[leaf]))
        if source.cut is not None:
            return lambda layer: source.cut.restore(host)
        return lambda layer: host[layer] if source.stacked else host

    return _planned(state, table, read)


def merged_tensors(
    tensors: Tensors,
    state: nnx.State,
    own: Table,
    table: Table,
    changes: Callable[[str, int], np.ndarray | None],
    dtype: Any,
) -> TorchTensors:
    """The tensors of a checkpoint under the names of `table`, with changes added in float32.

    state: the network's, abstract. own: the table of `tensors`. changes(path, layer): [in, out] of
    one of our projections, or None. dtype: that of the result. Raises the errors of `check_keys`.
    """
    check_keys(tensors, state, own)
    values = leaves(state)

    def read(leaf: str) -> Callable[[int], np.ndarray]:
        source = source_of(leaf, own)
        if source.cut is not None:
            ((key, _),) = source.keys(0)
            return lambda layer: tensors.read(key)
        shape = source.joined_shape(values[leaf].shape)[1 if source.stacked else 0 :]

        @lru_cache(maxsize=1)  # the parts of a fused projection follow one another
        def layer_of(layer: int) -> np.ndarray:
            array = np.empty(shape, np.float32)
            fill_layer(tensors, leaf, array, source, layer)
            target, _, kind = leaf.rpartition(".")
            change = changes(target, layer) if kind == "kernel" else None
            return array if change is None else array + change

        return layer_of

    return _planned(state, table, read, dtype)


def save_folder(
    folder: str | Path,
    tensors: TorchTensors,
    config: Mapping[str, Any],
    shard_bytes: int = 10**10,
    stem: str = STEM,
    header: Mapping[str, str] = READABLE,
) -> None:
    """Write a model folder that `from_pretrained` reads: `config` and the weights.

    stem: the name of the files, a key of LIBRARIES in nn/tensors.py. header: their own entries.

    Every process must call this, since each holds a part of the weights; the first one writes.
    """
    if process_index():
        for _ in tensors:
            pass
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    # Files of at most `shard_bytes`.
    shards: list[dict[str, jax.ShapeDtypeStruct]] = [{}]
    sizes = [0]
    for key, like in tensors.shapes.items():
        size = math.prod(like.shape) * like.dtype.itemsize
        if shards[-1] and sizes[-1] + size > shard_bytes:
            shards.append({})
            sizes.append(0)
        shards[-1][key] = like
        sizes[-1] += size

    # The names that the library looks for, with an index if there are several files.
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = []
        weight_map = {}
        for number, shard in enumerate(shards, start=1):
            names.append(f"{stem}-{number:05}-of-{len(shards):05}.safetensors")
            weight_map |= dict.fromkeys(shard, names[-1])
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        index_file = folder / f"{stem}.safetensors.index.json"
        write_whole(index_file, json.dumps(index, indent=2) + "\n")

    iterator = iter(tensors)
    for name, shard in zip(names, shards, strict=True):
        write_tensors(folder / name, shard, islice(iterator, len(shard)), header)
    write_whole(folder / "config.json", json.dumps(dict(config), indent=2) + "\n")
