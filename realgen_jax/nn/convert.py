"""Convert between published checkpoints and our arrays, strictly by a family's table.

Torch weights are [out, in, *window]; ours are [*window, in, out], with a leading layer axis in
stacked blocks. Our fused projections have a separate axis for their parts; torch's are one matrix.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import jax
import numpy as np
from flax import nnx

from realgen_jax.hosts import put
from realgen_jax.nn.tensors import Tensors

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
class Piece:
    """Rows [start, stop) of a torch module's `rows`, which are our outputs [begin, end)."""

    module: str
    rows: int
    start: int
    stop: int
    begin: int
    end: int


def pieces(parts: Sequence[Part], outputs: int, layer: int = 0) -> list[Piece]:
    """The torch modules that hold the outputs of one of our arrays, in the order of our outputs."""
    unit = outputs // sum(part.stop - part.start for part in parts)
    result = []
    end = 0
    for part in parts:
        begin = end
        end = begin + (part.stop - part.start) * unit
        module = part.module.format(layer + part.first)
        rows = (part.of * unit, part.start * unit, part.stop * unit)
        result.append(Piece(module, *rows, begin, end))
    return result


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
    unused: keys that a file may hold and the network does not read.
    """

    rows: Mapping[str, tuple[Part, ...]]
    fused: Mapping[str, int] = field(default_factory=dict)
    suffixes: Mapping[str, str] = field(default_factory=lambda: SUFFIXES)
    bare: frozenset[str] = frozenset()
    windows: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    cuts: Mapping[str, Cut] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()


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


def file_state(cls: type[nnx.Module], config: Any) -> nnx.State:
    """Return the abstract state as files hold it: without quantisation (nn/quantize.py)."""
    if getattr(config, "quantization", ""):
        config = replace(config, quantization="")
    return abstract(cls, config)[1]


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
class Source:
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

    def joined_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of our array with a fused projection's parts side by side."""
        if self.fused is None:
            return shape
        axis = self.fused + len(shape)
        return (*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])

    def joined(self, array: np.ndarray) -> np.ndarray:
        """A view of our array with a fused projection's parts side by side, as torch has them."""
        return array.reshape(self.joined_shape(array.shape))


def source_of(leaf: str, table: Table) -> Source:
    """The row of the table for one of our arrays."""
    fused = next((axis for end, axis in table.fused.items() if leaf.endswith(end)), None)
    if leaf in table.cuts:
        return Source(table.rows[leaf], "", None, True, None, table.cuts[leaf])
    if leaf in table.bare:
        return Source(table.rows[leaf], "", fused, True, None)

    module, _, kind = leaf.rpartition(".")
    if leaf in table.rows:  # a norm's scale, which is the torch module's only array
        module = leaf
        kind = "scale"
    if module not in table.rows or kind not in table.suffixes:
        raise ValueError(f"no row of the family's table fills {leaf}; add one")
    window = table.windows.get(module) if kind == "kernel" else None
    return Source(table.rows[module], table.suffixes[kind], fused, False, window)


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
    compare_keys(tensors, table_keys(leaves(state), table), table)


def table_keys(wanted: Mapping[str, Any], table: Table) -> set[str]:
    """Return the keys of the tensors that fill these arrays of ours, {path: array}."""
    expected = set()
    for leaf, array in wanted.items():
        source = source_of(leaf, table)
        for layer in range(array.shape[0] if source.stacked else 1):
            expected |= {key for key, _ in source.keys(layer)}
    return expected


def compare_keys(tensors: Tensors, expected: set[str], table: Table) -> None:
    """Raise ValueError unless a checkpoint has exactly the expected keys, and some unused ones."""
    missing = sorted(expected - tensors.keys())
    if missing:
        raise ValueError(
            f"{tensors.path} lacks {_some(missing)}; it is not a complete checkpoint of this model"
        )
    unused = sorted(tensors.keys() - expected - table.unused)
    if unused:
        raise ValueError(
            f"{tensors.path} holds {_some(unused)}, which this model does not have; "
            "is it another model's file?"
        )


def assemble(tensors: Tensors, leaf: str, wanted: jax.ShapeDtypeStruct, table: Table) -> np.ndarray:
    """Return one array of ours on the host, filled tensor by tensor."""
    source = source_of(leaf, table)
    if source.cut is not None:
        return _cut(tensors, leaf, wanted, source)
    host = np.empty(wanted.shape, wanted.dtype)
    joined = source.joined(host)
    for layer, target in enumerate(joined if source.stacked else joined[None]):
        fill_layer(tensors, leaf, target, source, layer)
    return host


def fill_layer(tensors: Tensors, leaf: str, target: np.ndarray, source: Source, layer: int) -> None:
    """Fill one layer of an array, with the parts side by side, from a file's tensors."""
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
            f"{key} in {tensors.path} has shape {shape}; {leaf} {target.shape} needs more outputs"
        )


def _cut(tensors: Tensors, leaf: str, wanted: jax.ShapeDtypeStruct, source: Source) -> np.ndarray:
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


def _some(keys: list[str]) -> str:
    """The first keys of a list, for an error message."""
    text = ", ".join(keys[:3])
    return text if len(keys) <= 3 else f"{text} and {len(keys) - 3} more keys"
