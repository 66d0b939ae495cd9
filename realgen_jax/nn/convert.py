"""Convert between published checkpoints and our arrays, strictly by a family's table.

Torch weights are [out, in, *window]; ours are [*window, in, out], with a leading layer axis in
stacked blocks. Our fused projections have a separate axis for their parts; torch's are one matrix.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from realgen_jax.files import write_tensors, write_whole
from realgen_jax.hosts import fetch, process_index, put
from realgen_jax.nn.tensors import STEM, Tensors

Sharding = Callable[[str, tuple[int, ...]], Any]  # (path, shape) -> jax sharding, device or None
SUFFIXES = {"kernel": ".weight", "bias": ".bias", "scale": ".weight"}


@dataclass(frozen=True)
class Part:
    """A torch module, or the share [start/of, stop/of) of its outputs.

    In module names of stacked blocks, "{}" stands for the layer; `first` is torch's number of the
    first layer.
    """

    module: str
    start: int = 0
    stop: int = 1
    of: int = 1
    first: int = 0


@dataclass(frozen=True)
class Cut:
    """A tensor of which our array holds a part.

    shape: the tensor's. cut(tensor) -> our array. restore(our array) -> a whole tensor.
    """

    shape: tuple[int, ...]
    cut: Callable[[np.ndarray], np.ndarray]
    restore: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Table:
    """How a checkpoint's tensors fill our arrays.

    rows: our module -> the torch modules that fill it, concatenated along the output axis.
    fused: path suffix of an array with a separate axis for the parts of a fused projection -> that
        axis, counted from the end. In the file, that axis and the next one are joined.
    suffixes: kind of our array -> the suffix after the module in torch's key.
    bare: arrays that are stored as a tensor without a suffix, in torch's layout.
    windows: our modules that store a convolution as a matmul over patches -> (height, width); the
        kernel's input is then ordered (channel, row, column).
    cuts: arrays that hold a part of a tensor without a suffix.
    """

    rows: Mapping[str, tuple[Part, ...]]
    fused: Mapping[str, int] = field(default_factory=dict)
    suffixes: Mapping[str, str] = field(default_factory=lambda: SUFFIXES)
    bare: frozenset[str] = frozenset()
    windows: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    cuts: Mapping[str, Cut] = field(default_factory=dict)


def table_rows(
    short: Mapping[str, str | tuple[str | Part, ...]], first: int = 0
) -> dict[str, tuple[Part, ...]]:
    """Expand the short form of rows: a string is a whole module; a single string needs no tuple."""
    rows = {}
    for ours, theirs in short.items():
        parts = theirs if isinstance(theirs, tuple) else (theirs,)
        rows[ours] = tuple(
            Part(part, first=first) if isinstance(part, str) else part for part in parts
        )
    return rows


@cache
def abstract(cls: type[nnx.Module], config: Any) -> tuple[nnx.GraphDef, nnx.State]:
    """Return a module's graph and its state as ShapeDtypeStructs; nothing is allocated."""
    return nnx.split(nnx.eval_shape(lambda: cls(config, nnx.Rngs(0))))


def leaves(state: nnx.State) -> dict[str, Any]:
    """Return {dotted path: array} of a state, in the state's own order."""
    flat = nnx.to_flat_state(state)
    return {".".join(map(str, path)): variable.get_value() for path, variable in flat}


def with_shardings(state: nnx.State, sharding: Sharding) -> nnx.State:
    """Return an abstract state with shardings attached to every array."""
    flat = []
    for (leaf, array), (path, variable) in zip(
        leaves(state).items(), nnx.to_flat_state(state), strict=True
    ):
        where = sharding(leaf, array.shape)
        struct = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where)
        flat.append((path, variable.replace(struct)))
    return nnx.from_flat_state(flat)


@dataclass(frozen=True)
class _Source:
    """The tensors that fill one array of ours."""

    parts: tuple[Part, ...]
    suffix: str
    fused: int | None
    bare: bool
    window: tuple[int, int] | None
    cut: Cut | None = None

    @property
    def stacked(self) -> bool:
        return "{}" in self.parts[0].module

    def keys(self, layer: int) -> list[tuple[str, Part]]:
        """The tensors of one layer, in the order of our output axis."""
        keys = []
        for part in self.parts:
            keys.append((part.module.format(layer + part.first) + self.suffix, part))
        return keys

    def joined(self, array: np.ndarray) -> np.ndarray:
        """A view of our array with a fused projection's parts side by side, as torch has them."""
        if self.fused is None:
            return array
        axis = self.fused + array.ndim
        return array.reshape(*array.shape[:axis], -1, *array.shape[axis + 2 :])


def _source(leaf: str, table: Table) -> _Source:
    """The row of the table for one of our arrays."""
    fused = next((axis for end, axis in table.fused.items() if leaf.endswith(end)), None)
    if leaf in table.cuts:
        return _Source(table.rows[leaf], "", None, True, None, table.cuts[leaf])
    if leaf in table.bare:
        return _Source(table.rows[leaf], "", fused, True, None)

    module, _, kind = leaf.rpartition(".")
    if leaf in table.rows:  # a norm's scale, which is the torch module's only array
        module = leaf
        kind = "scale"
    if module not in table.rows or kind not in table.suffixes:
        raise ValueError(f"no row of the family's table fills {leaf}; add one")
    window = table.windows.get(module) if kind == "kernel" else None
    return _Source(table.rows[module], table.suffixes[kind], fused, False, window)


def load(
    tensors: Tensors,
    state: nnx.State,
    table: Table,
    sharding: Sharding = lambda leaf, shape: None,
) -> nnx.State:
    """Fill an abstract state from a checkpoint.

    Every key is used and every array is filled exactly once. `sharding(path, shape)` says where an
    array goes (None: the default device). Arrays are assembled on the host and placed one at a
    time, so the extra host memory is one (stacked) array and one tensor.

    Raises ValueError naming the first keys that are missing, unused or of another shape.
    """
    check_keys(tensors, state, table)
    return fill(tensors, state, table, sharding)


def fill(
    tensors: Tensors,
    state: nnx.State,
    table: Table,
    sharding: Sharding = lambda leaf, shape: None,
) -> nnx.State:
    """Fill an abstract state, which may be a part of the model's, as `load` does."""
    wanted = leaves(state)
    placed = []
    for leaf, (path, variable) in zip(wanted, nnx.to_flat_state(state), strict=True):
        host = assemble(tensors, leaf, wanted[leaf], table)
        placed.append((path, variable.replace(put(host, sharding(leaf, host.shape)))))
    return nnx.from_flat_state(placed)


def check_keys(tensors: Tensors, state: nnx.State, table: Table) -> None:
    """Raise ValueError unless every key has one place in an abstract state, and vice versa."""
    compare_keys(tensors, table_keys(leaves(state), table))


def table_keys(wanted: Mapping[str, Any], table: Table) -> set[str]:
    """Return the keys of the tensors that fill these arrays of ours, {path: array}."""
    expected = set()
    for leaf, array in wanted.items():
        source = _source(leaf, table)
        for layer in range(array.shape[0] if source.stacked else 1):
            expected |= {key for key, _ in source.keys(layer)}
    return expected


def compare_keys(tensors: Tensors, expected: set[str]) -> None:
    """Raise ValueError unless a checkpoint has exactly the expected keys."""
    missing = sorted(expected - tensors.keys())
    if missing:
        raise ValueError(
            f"{tensors.path} lacks {_some(missing)}; it is not a complete checkpoint of this model"
        )
    unused = sorted(tensors.keys() - expected)
    if unused:
        raise ValueError(
            f"{tensors.path} holds {_some(unused)}, which this model does not have; "
            "is it another model's file?"
        )


def assemble(tensors: Tensors, leaf: str, wanted: jax.ShapeDtypeStruct, table: Table) -> np.ndarray:
    """Return one array of ours on the host, filled tensor by tensor."""
    source = _source(leaf, table)
    if source.cut is not None:
        return _cut(tensors, leaf, wanted, source)
    host = np.empty(wanted.shape, wanted.dtype)
    joined = source.joined(host)
    for layer, target in enumerate(joined if source.stacked else joined[None]):
        end = 0
        for key, part in source.keys(layer):
            # The share of the tensor's outputs that belongs here.
            shape = tensors.shape(key)
            start = shape[0] * part.start // part.of
            stop = shape[0] * part.stop // part.of
            weight = tensors.read(key, start, stop)
            if not source.bare:
                weight = _to_ours(weight, target.ndim)

            # Beside the parts before it, along the output axis.
            begin = end
            end = begin + weight.shape[-1]
            if weight.shape != target[..., begin:end].shape:
                raise ValueError(
                    f"{key} in {tensors.path} has shape {shape}, "
                    f"which does not fit {leaf} {target.shape}"
                )
            target[..., begin:end] = weight
        if end != target.shape[-1]:
            raise ValueError(
                f"{key} in {tensors.path} has shape {shape}; {leaf} {target.shape} "
                "needs more outputs"
            )
    return host


def _cut(tensors: Tensors, leaf: str, wanted: jax.ShapeDtypeStruct, source: _Source) -> np.ndarray:
    """The array that is a part of one tensor."""
    ((key, _),) = source.keys(0)
    shape = tensors.shape(key)
    if shape != source.cut.shape:
        raise ValueError(
            f"{key} in {tensors.path} has shape {shape}; {leaf} {wanted.shape} is a part of a "
            f"tensor {source.cut.shape}"
        )
    return source.cut.cut(tensors.read(key, 0, shape[0])).astype(wanted.dtype)


def _to_ours(weight: np.ndarray, ndim: int) -> np.ndarray:
    """[out, in, *window] -> [*window, in, out]; a convolution stored as a matmul is flattened."""
    if weight.ndim == 4 and ndim == 2:
        weight = weight.reshape(len(weight), -1)
    if weight.ndim == 1:
        return weight
    return weight.transpose(*range(2, weight.ndim), 1, 0)


def _to_torch(array: np.ndarray, window: tuple[int, int] | None) -> np.ndarray:
    """[*window, in, out] -> [out, in, *window]."""
    if array.ndim == 1:
        return np.ascontiguousarray(array)
    weight = array.transpose(array.ndim - 1, array.ndim - 2, *range(array.ndim - 2))
    if window is not None:
        weight = weight.reshape(len(weight), -1, *window)
    return np.ascontiguousarray(weight)


def _some(keys: list[str]) -> str:
    """The first keys of a list, for an error message."""
    text = ", ".join(keys[:3])
    return text if len(keys) <= 3 else f"{text} and {len(keys) - 3} more keys"


def to_torch(state: nnx.State, table: Table) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (key, array in torch's layout) for every tensor, fetching one of our arrays at a time.

    All processes must iterate.
    """
    for leaf, value in leaves(state).items():
        source = _source(leaf, table)
        host = source.joined(fetch(value))
        if source.cut is not None:
            ((key, _),) = source.keys(0)
            yield key, source.cut.restore(host)
            continue
        for layer, array in enumerate(host if source.stacked else host[None]):
            pieces = np.split(array, len(source.parts), axis=-1)
            for (key, _), piece in zip(source.keys(layer), pieces, strict=True):
                yield key, piece if source.bare else _to_torch(piece, source.window)


def save_folder(
    folder: str | Path,
    state: nnx.State,
    table: Table,
    config: Mapping[str, Any],
    shard_bytes: int = 10**10,
    stem: str = STEM,
) -> None:
    """Write a model folder that `from_pretrained` reads: `config` and the weights.

    Every process must call this, since each holds a part of the weights; the first one writes.
    """
    if process_index():
        for _ in to_torch(state, table):
            pass
        return
    write_folder(folder, to_torch(state, table), config, {"format": "pt"}, shard_bytes, stem)


def write_folder(
    folder: str | Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    config: Mapping[str, Any],
    header: Mapping[str, str],
    shard_bytes: int = 10**10,
    stem: str = STEM,
) -> None:
    """Write `config` and tensors, in safetensors files with this header.

    stem: the name of the files, a key of LIBRARIES in nn/tensors.py.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    # Files of at most `shard_bytes`.
    shards: list[dict[str, np.ndarray]] = [{}]
    for key, array in tensors:
        size = sum(tensor.nbytes for tensor in shards[-1].values())
        if shards[-1] and size + array.nbytes > shard_bytes:
            shards.append({})
        shards[-1][key] = array

    # The names that the library looks for, with an index if there are several files.
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = []
        weight_map = {}
        total = 0
        for number, shard in enumerate(shards, start=1):
            names.append(f"{stem}-{number:05}-of-{len(shards):05}.safetensors")
            weight_map |= dict.fromkeys(shard, names[-1])
            total += sum(tensor.nbytes for tensor in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        index_file = folder / f"{stem}.safetensors.index.json"
        write_whole(index_file, json.dumps(index, indent=2) + "\n")

    for name, shard in zip(names, shards, strict=True):
        write_tensors(folder / name, shard, header)
    write_whole(folder / "config.json", json.dumps(dict(config), indent=2) + "\n")
