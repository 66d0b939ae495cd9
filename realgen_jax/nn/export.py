"""Write our arrays as published checkpoints have them, by a family's table (convert.py)."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from realgen_jax.files import write_tensors, write_whole
from realgen_jax.hosts import fetch, process_index
from realgen_jax.nn.convert import Table, leaves, source_of
from realgen_jax.nn.tensors import STEM


def _to_torch(array: np.ndarray, window: tuple[int, int] | None) -> np.ndarray:
    """[*window, in, out] -> [out, in, *window]."""
    if array.ndim == 1:
        return np.ascontiguousarray(array)
    weight = array.transpose(array.ndim - 1, array.ndim - 2, *range(array.ndim - 2))
    if window is not None:
        weight = weight.reshape(len(weight), -1, *window)
    return np.ascontiguousarray(weight)


def to_torch(state: nnx.State, table: Table) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (key, array in torch's layout) for every tensor, fetching one of our arrays at a time.

    All processes must iterate.
    """
    for leaf, value in leaves(state).items():
        source = source_of(leaf, table)
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

    stem: the name of the files, a key of LIBRARIES in nn/tensors.py.

    Every process must call this, since each holds a part of the weights; the first one writes.
    """
    if process_index():
        for _ in to_torch(state, table):
            pass
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    # Files of at most `shard_bytes`.
    shards: list[dict[str, np.ndarray]] = [{}]
    for key, array in to_torch(state, table):
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
        write_tensors(folder / name, shard, {"format": "pt"})
    write_whole(folder / "config.json", json.dumps(dict(config), indent=2) + "\n")
