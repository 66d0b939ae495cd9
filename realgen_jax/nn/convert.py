"""Published checkpoints <-> our arrays: one strict function reads the tables in `tables.py`.

Torch weights are [out, in, *window]; ours are [*window, in, out], with the layers of a stacked block in front. Where
ours keep the parts of a fused projection on an axis of their own, torch's are one matrix.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which safetensors then returns)
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from realgen_jax.hosts import fetch, process_index, put
from realgen_jax.models.flux.tables import (
    BFL,
    BFL_VAE_EDITS,
    DIFFUSERS,
    PARTS_AXIS,
    Part,
    Table,
    table,
)
from realgen_jax.models.flux.transformer import FluxConfig, FluxTransformer
from realgen_jax.nn.vae import Autoencoder, VaeConfig

Sharding = Callable[
    [str, tuple[int, ...]], Any
]  # (dotted path, shape) -> a jax sharding, a device or None
_STEM = "diffusion_pytorch_model"
_SUFFIXES = {"kernel": ".weight", "bias": ".bias", "scale": ".weight"}
_BFL_SUFFIXES = {**_SUFFIXES, "scale": ".scale"}


class Tensors:
    """The tensors of one safetensors file, or of a folder with one file or an index of several."""

    def __init__(self, path: Path):
        self.path = path
        self._file_of: dict[str, Any] = {}
        for file in _files(path):
            try:
                opened = safe_open(file, framework="np")
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{file} is missing") from error
            except SafetensorError as error:
                message = f"{file} is not a complete safetensors file ({error}); download it again"
                raise ValueError(message) from error
            self._file_of |= dict.fromkeys(opened.keys(), opened)

    def keys(self) -> set[str]:
        return set(self._file_of)

    def metadata(self) -> dict[str, str]:
        return next(iter(self._file_of.values())).metadata() or {}

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._file_of[key].get_slice(key).get_shape())

    def read(self, key: str, start: int | None = None, stop: int | None = None) -> np.ndarray:
        """A tensor, or its rows [start, stop). Nothing else is read from the disk."""
        if start is None:
            return self._file_of[key].get_tensor(key)
        return self._file_of[key].get_slice(key)[start:stop]


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    single, index = path / f"{_STEM}.safetensors", path / f"{_STEM}.safetensors.index.json"
    if single.exists():
        return [single]
    if index.exists():
        return [
            path / name
            for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))
        ]
    raise FileNotFoundError(
        f"{path} holds neither {single.name} nor {index.name}; expected a folder of diffusers"
    )


def abstract(cls: type[nnx.Module], config: Any) -> tuple[nnx.GraphDef, nnx.State]:
    """A module's graph and its state of ShapeDtypeStructs; nothing is allocated."""
    return nnx.split(nnx.eval_shape(lambda: cls(config, nnx.Rngs(0))))


def leaves(state: nnx.State) -> dict[str, Any]:
    """{dotted path: array} of a state, in the state's own order."""
    return {
        ".".join(map(str, path)): variable.get_value()
        for path, variable in nnx.to_flat_state(state)
    }


def vae_table(config: VaeConfig, layout: str) -> Table:
    """The autoencoder's table for "diffusers" (each module maps to itself) or "bfl"."""
    last = len(config.block_out_channels) - 1

    def bfl_name(name: str) -> str:
        name = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{last - int(m[1])}", name)
        for ours, theirs in BFL_VAE_EDITS:
            name = name.replace(ours, theirs)
        return name

    modules = {path.rpartition(".")[0] for path in leaves(abstract(Autoencoder, config)[1])}
    return table(
        {module: module if layout == "diffusers" else bfl_name(module) for module in modules}
    )


@dataclass(frozen=True)
class _Source:
    """Where one array of ours comes from: `parts` side by side along the output axis, once for each layer."""

    parts: tuple[Part, ...]
    suffix: str
    stacked: bool

    def keys(self, layer: int) -> list[tuple[str, Part]]:
        return [(part.module.format(layer) + self.suffix, part) for part in self.parts]


def _source(leaf: str, rows: Table, suffixes: Mapping[str, str]) -> _Source:
    module, _, kind = leaf.rpartition(".")
    if leaf in rows:  # a norm's scale, which is the torch module's only array
        module, kind = leaf, "scale"
    if module not in rows or kind not in suffixes:
        raise ValueError(f"no row of the table fills {leaf}; add one to realgen_jax/flux/tables.py")
    return _Source(rows[module], suffixes[kind], "{}" in rows[module][0].module)


def load(
    tensors: Tensors,
    state: nnx.State,
    rows: Table,
    suffixes: Mapping[str, str] = _SUFFIXES,
    sharding: Sharding = lambda leaf, shape: None,
) -> nnx.State:
    """Fill an abstract state: every key is used and every array filled exactly once, or a ValueError names the first
    that is not. `sharding(path, shape)` says where an array goes (None: the default device).

    Arrays are put together on the host one by one, each placed before the next is begun: host memory beyond the placed
    arrays is one (stacked) array and one tensor.
    """
    wanted = leaves(state)
    sources = {leaf: _source(leaf, rows, suffixes) for leaf in wanted}
    expected = {
        key
        for leaf, source in sources.items()
        for layer in range(wanted[leaf].shape[0] if source.stacked else 1)
        for key, _ in source.keys(layer)
    }
    if missing := sorted(expected - tensors.keys()):
        raise ValueError(
            f"{tensors.path} lacks {_some(missing)}; it is not a complete checkpoint of this model"
        )
    if extra := sorted(tensors.keys() - expected):
        raise ValueError(
            f"{tensors.path} holds {_some(extra)}, which this model has no use for: another model's file?"
        )
    placed = []
    for leaf, (path, variable) in zip(wanted, nnx.to_flat_state(state), strict=True):
        host = _assemble(tensors, leaf, wanted[leaf], sources[leaf])
        placed.append((path, variable.replace(put(host, sharding(leaf, host.shape)))))
    return nnx.from_flat_state(placed)


def _joined(leaf: str, array: np.ndarray) -> np.ndarray:
    """The array with a fused projection's parts side by side, as torch has them; a view."""
    axis = next((axis for end, axis in PARTS_AXIS.items() if leaf.endswith(end)), None)
    if axis is None:
        return array
    axis += array.ndim
    return array.reshape(*array.shape[:axis], -1, *array.shape[axis + 2 :])


def _assemble(
    tensors: Tensors, leaf: str, wanted: jax.ShapeDtypeStruct, source: _Source
) -> np.ndarray:
    """One array on the host, filled tensor by tensor."""
    host = np.empty(wanted.shape, wanted.dtype)
    joined = _joined(leaf, host)
    for layer, target in enumerate(joined if source.stacked else joined[None]):
        end = 0
        for key, part in source.keys(layer):
            shape = tensors.shape(key)
            start, stop = (shape[0] * share // part.of for share in (part.start, part.stop))
            begin, end = end, end + stop - start
            weight = _ours(tensors.read(key, start, stop), target.ndim)
            if weight.shape != target[..., begin:end].shape:
                raise ValueError(
                    f"{key} in {tensors.path} has shape {shape}, which does not fit {leaf} {target.shape}"
                )
            target[..., begin:end] = weight
        if end != target.shape[-1]:
            raise ValueError(
                f"{key} in {tensors.path} has shape {shape}; {leaf} {target.shape} needs more outputs"
            )
    return host


def _ours(weight: np.ndarray, ndim: int) -> np.ndarray:
    """[out, in, *window] -> [*window, in, out]. A 1x1 convolution that is a plain product here loses its window."""
    if weight.ndim == 4 and ndim == 2:
        weight = weight[:, :, 0, 0]
    return weight.transpose(*range(2, weight.ndim), 1, 0) if weight.ndim > 1 else weight


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more keys" if len(keys) > 3 else "")


def read_config(folder: Path, class_name: str) -> dict[str, Any]:
    """A diffusers folder's config.json, after a look at what class it describes."""
    file = folder / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing; expected a {class_name} folder of diffusers")
    config = json.loads(file.read_text())
    if config.get("_class_name") != class_name:
        raise ValueError(f"{file} describes a {config.get('_class_name')}; expected a {class_name}")
    return config


def _from_diffusers(cls: type, found: dict[str, Any], **overrides: Any) -> Any:
    names = {field.name for field in fields(cls)} & found.keys()
    values = {
        name: tuple(found[name]) if isinstance(found[name], list) else found[name] for name in names
    }
    return cls(**{**values, **overrides})


def _from_bfl(tensors: Tensors, **overrides: Any) -> FluxConfig:
    """FLUX's sizes read off the shapes in BFL's file, which carries no config."""

    def layers(prefix: str) -> int:
        return len({key.split(".")[1] for key in tensors.keys() if key.startswith(prefix)})  # noqa: SIM118

    try:
        head_dim = tensors.shape("single_blocks.0.norm.query_norm.scale")[0]
        hidden, in_channels = tensors.shape("img_in.weight")
        joint, pooled = (
            tensors.shape("txt_in.weight")[1],
            tensors.shape("vector_in.in_layer.weight")[1],
        )
    except KeyError as error:
        message = f"{tensors.path} has no key {error}; expected BFL's FLUX.1 file or a folder of diffusers"
        raise ValueError(message) from error
    index_axis = (
        head_dim // 16 * 2
    )  # (16, 56, 56) of 128: an eighth for the index, the rest for row and column
    return FluxConfig(
        in_channels=in_channels,
        num_layers=layers("double_blocks."),
        num_single_layers=layers("single_blocks."),
        attention_head_dim=head_dim,
        num_attention_heads=hidden // head_dim,
        joint_attention_dim=joint,
        pooled_projection_dim=pooled,
        guidance_embeds="guidance_in.in_layer.weight" in tensors.keys(),  # noqa: SIM118
        axes_dims_rope=(index_axis, (head_dim - index_axis) // 2, (head_dim - index_axis) // 2),
        **overrides,
    )


def transformer_config(folder: Path, **overrides: Any) -> FluxConfig:
    """The sizes in the config.json of diffusers' `transformer/`; `overrides` are FluxConfig fields (dtype, ...)."""
    return _from_diffusers(FluxConfig, read_config(folder, "FluxTransformer2DModel"), **overrides)


def vae_config(folder: Path, **overrides: Any) -> VaeConfig:
    """The sizes in the config.json of diffusers' `vae/`; `overrides` are VaeConfig fields."""
    found = read_config(folder, "AutoencoderKL")
    for name in ("use_quant_conv", "use_post_quant_conv"):
        if found.get(name, True):
            raise ValueError(
                f"{folder / 'config.json'} has {name}; FLUX's autoencoder has no such convolution"
            )
    return _from_diffusers(VaeConfig, found, **overrides)


def load_transformer(
    path: str | Path, sharding: Sharding = lambda leaf, shape: None, **overrides: Any
) -> tuple[FluxConfig, nnx.State]:
    """A `transformer/` folder of diffusers or BFL's single file. `overrides` are FluxConfig fields (dtype, ...)."""
    path = Path(path)
    if path.is_file():
        tensors = Tensors(path)
        config = _from_bfl(tensors, **overrides)
        return config, load(
            tensors, abstract(FluxTransformer, config)[1], BFL, _BFL_SUFFIXES, sharding
        )
    config = transformer_config(path, **overrides)
    return config, load(
        Tensors(path), abstract(FluxTransformer, config)[1], DIFFUSERS, _SUFFIXES, sharding
    )


def load_vae(
    path: str | Path, sharding: Sharding = lambda leaf, shape: None, **overrides: Any
) -> tuple[VaeConfig, nnx.State]:
    """A `vae/` folder of diffusers or BFL's `ae.safetensors`. `overrides` are VaeConfig fields."""
    path = Path(path)
    if path.is_file():
        config, layout = VaeConfig(**overrides), "bfl"
    else:
        config, layout = vae_config(path, **overrides), "diffusers"
    state = abstract(Autoencoder, config)[1]
    return config, load(Tensors(path), state, vae_table(config, layout), _SUFFIXES, sharding)


def to_torch(state: nnx.State, rows: Table = DIFFUSERS) -> Iterator[tuple[str, np.ndarray]]:
    """(key, array in torch's layout) for every tensor of a state, one array of ours on the host at a time."""
    for leaf, value in leaves(state).items():
        source = _source(leaf, rows, _SUFFIXES)
        host = _joined(leaf, fetch(value))
        for layer, array in enumerate(host if source.stacked else host[None]):
            pieces = np.split(array, len(source.parts), axis=-1)
            for (key, _), piece in zip(source.keys(layer), pieces, strict=True):
                order = (
                    (piece.ndim - 1, piece.ndim - 2, *range(piece.ndim - 2))
                    if piece.ndim > 1
                    else (0,)
                )
                yield key, np.ascontiguousarray(piece.transpose(order))


def save_transformer(
    folder: str | Path, config: FluxConfig, state: nnx.State, shard_bytes: int = 10**10
) -> None:
    """Write a `transformer/` folder that `diffusers.FluxTransformer2DModel.from_pretrained` reads.

    Every process must call it, since all hold a part of the weights; the first one writes.
    """
    if process_index():
        for _ in to_torch(state):
            pass
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, np.ndarray]] = [{}]
    for key, array in to_torch(state):
        if shards[-1] and sum(a.nbytes for a in shards[-1].values()) + array.nbytes > shard_bytes:
            shards.append({})
        shards[-1][key] = array
    names = [f"{_STEM}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [f"{_STEM}.safetensors"]
    else:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(array.nbytes for shard in shards for array in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{_STEM}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
    sizes = {k: v for k, v in asdict(config).items() if k not in ("dtype", "param_dtype", "remat")}
    described = {"_class_name": "FluxTransformer2DModel", "patch_size": 1, **sizes}
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
