"""Weights of a transformer whose kernels are quantised (nn/quantize.py), from and to files.

They are quantised while they are read, one stacked array at a time, or read as scripts/quantize.py
wrote them: codes and scales under the paths and in the layout of our arrays, everything else as in
the model's own files.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from realgen_jax.hosts import put
from realgen_jax.nn.convert import (
    Sharding,
    Table,
    abstract,
    assemble,
    compare_keys,
    file_state,
    leaves,
    table_keys,
)
from realgen_jax.nn.export import save_folder, to_torch
from realgen_jax.nn.quantize import BLOCK, quantize
from realgen_jax.nn.stored import QUANTIZATION
from realgen_jax.nn.tensors import QUANT_METHOD, Tensors

SCALE = "_scale"  # after the path of a kernel: its scales


def format_of(config: Any) -> str:
    """How a transformer's kernels are quantised; "" for a family that cannot."""
    return getattr(config, "quantization", "")


def check_quantized(
    tensors: Tensors, cls: type[nnx.Module], config: Any, table: Table
) -> tuple[nnx.State, nnx.State]:
    """Raise ValueError unless the tensors fill the network cls(config), quantised or not.

    Returns its abstract states, without quantisation and with the config's.
    """
    name = format_of(config)
    state = abstract(cls, config)[1]
    dense = file_state(cls, config)
    stored = tensors.quantization()
    if stored not in ("", name):
        raise ValueError(
            f"{tensors.path} holds weights in {stored}, but config.pretrained.quantization is "
            f"{name!r}; expected {stored!r}"
        )

    # A quantised folder has the kernels' own names in place of the tensors that they came from.
    kernels = _kernels(state) if stored else set()
    plain = {leaf: array for leaf, array in leaves(dense).items() if leaf not in kernels}
    own = kernels | {leaf + SCALE for leaf in kernels}
    compare_keys(tensors, table_keys(plain, table) | own, table)
    return dense, state


def load_quantized(
    tensors: Tensors,
    cls: type[nnx.Module],
    config: Any,
    table: Table,
    sharding: Sharding = lambda leaf, shape: None,
) -> nnx.State:
    """Return the state of the network cls(config), quantised or not.

    Every key is used and every array is filled exactly once. `sharding(path, shape)` says where an
    array goes (None: the default device). Arrays are assembled, and quantised, on the host and
    placed one at a time, so the extra host memory is one stacked array and its codes.

    Raises ValueError naming the first keys that are missing, unused or of another shape.
    """
    dense, state = check_quantized(tensors, cls, config, table)
    placed = {}
    for leaf, host in _arrays(tensors, dense, state, table, format_of(config), leaves(dense)):
        placed[leaf] = put(host, sharding(leaf, host.shape))

    flat = []
    for leaf, (path, variable) in zip(leaves(state), nnx.to_flat_state(state), strict=True):
        flat.append((path, variable.replace(placed[leaf])))
    return nnx.from_flat_state(flat)


def save_quantized(
    folder: str | Path,
    tensors: Tensors,
    cls: type[nnx.Module],
    config: Any,
    tables: tuple[Table, Table],
    entries: Mapping[str, Any],
) -> None:
    """Write a folder that `load_quantized` reads bit for bit.

    tables: of the tensors, and of the folder's names. entries: what its config.json would hold
    without quantisation.
    """
    name = format_of(config)
    dense, state = check_quantized(tensors, cls, config, tables[0])
    wanted = leaves(state)
    kernels = _kernels(state)

    # Everything else, which is small, under the model's names.
    flat = []
    for (leaf, like), (path, variable) in zip(
        leaves(dense).items(), nnx.to_flat_state(dense), strict=True
    ):
        if leaf not in kernels:
            host = assemble(tensors, leaf, like, tables[0])
            flat.append((path, variable.replace(host)))
    plain = to_torch(nnx.from_flat_state(flat), tables[1])

    # Then the kernels, one at a time.
    own = {leaf: wanted[leaf] for leaf in wanted if leaf.removesuffix(SCALE) in kernels}

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        yield from plain
        yield from _arrays(tensors, dense, state, tables[0], name, kernels)

    quantization = {"quant_method": QUANT_METHOD, "format": name, "block": BLOCK}
    config_file = {**entries, "quantization_config": quantization}
    written = _Tensors({**plain.shapes, **own}, arrays)
    save_folder(folder, written, config_file, header={QUANTIZATION: name})


@dataclass(frozen=True)
class _Tensors:
    """What `save_folder` writes, in the order of `shapes`."""

    shapes: Mapping[str, jax.ShapeDtypeStruct]
    arrays: Callable[[], Iterator[tuple[str, np.ndarray]]]

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        return self.arrays()


def _kernels(state: nnx.State) -> set[str]:
    """The paths of the quantised kernels."""
    paths = leaves(state).keys()
    return {path for path in paths if path + SCALE in paths}


def _arrays(
    tensors: Tensors,
    dense: nnx.State,
    state: nnx.State,
    table: Table,
    name: str,
    chosen: Collection[str],
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (path, array on the host) of the chosen arrays, quantising one kernel at a time."""
    wanted = leaves(state)
    kernels = _kernels(state)
    for leaf, like in leaves(dense).items():
        if leaf not in chosen:
            continue
        if leaf not in kernels:
            yield leaf, assemble(tensors, leaf, like, table)
            continue
        shapes = wanted[leaf], wanted[leaf + SCALE]
        if tensors.quantization():
            for path, shape in zip((leaf, leaf + SCALE), shapes, strict=True):
                yield path, _stored(tensors, path, shape)
            continue
        codes, scales = quantize(assemble(tensors, leaf, like, table), name, *shapes)
        yield leaf, codes
        yield leaf + SCALE, scales


def _stored(tensors: Tensors, path: str, wanted: jax.ShapeDtypeStruct) -> np.ndarray:
    """An array of a quantised folder."""
    array = tensors.read(path)
    if array.shape != wanted.shape or array.dtype != wanted.dtype:
        raise ValueError(
            f"{path} in {tensors.path} is {array.dtype} {array.shape}; expected {wanted.dtype} "
            f"{wanted.shape}"
        )
    return array
