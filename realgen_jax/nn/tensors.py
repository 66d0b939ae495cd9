"""Reading published checkpoints: safetensors files, and the JSON files beside them."""

import json
import math
from collections.abc import Collection, Mapping, Set
from copy import copy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

STEM = "diffusion_pytorch_model"
Config = TypeVar("Config")

# Names of the files of weights in a folder, without ".safetensors" -> the library that writes them.
LIBRARIES = {STEM: "diffusers", "model": "transformers"}

# The dtypes of weights, by their names in safetensors files. Float8 is a plain cast of the weights.
DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}

# The dtypes of codes, in files of scripts/quantize.py alone. Their header names the format.
CODES = {"I8": np.int8, "U8": np.uint8}
QUANTIZATION = "realgen_jax_quantization"
QUANT_METHOD = "realgen_jax"  # in config.json, so that other programs do not read the codes

# The last part of the names of the scales beside float8 weights.
FLOAT8_SCALES = ("scaled_fp8", "scale_weight", "weight_scale", "scale_input", "input_scale")

# How files of other formats begin.
OTHER_FORMATS = {
    b"GGUF": "is a GGUF file, whose weights are quantized; expected safetensors in bfloat16",
    b"PK\3\4": "is a PyTorch pickle; expected a safetensors file",
    b"\x80": "is a pickle; expected a safetensors file",
    b"version https://git-lfs": "is a pointer of Git LFS, not the file itself; run git lfs pull",
}

# Prefixes of all names: of ComfyUI, torch.compile and DataParallel. ComfyUI's checkpoints of a
# whole pipeline hold the autoencoder and the text encoders too, under names of their own.
PREFIXES = ("model.diffusion_model.", "_orig_mod.", "module.")
COMPANIONS = ("vae.", "text_encoders.", "first_stage_model.", "cond_stage_model.")


@dataclass(frozen=True)
class _Tensor:
    """A tensor's place in its file."""

    file: Path
    key: str  # its name in the file
    dtype: str
    shape: tuple[int, ...]
    offset: int  # of its first byte


class Tensors:
    """The tensors of a safetensors file, or of a folder with one such file or an index of several.

    stem: a key of LIBRARIES, the name of a folder's files. Names come without the prefixes that
    other programs put before all of them. Raises FileNotFoundError for a missing file and
    ValueError for one that is incomplete, of another format, or not of floating-point weights.
    """

    def __init__(self, path: Path, stem: str = STEM):
        self.path = path
        self._metadata: dict[str, str] = {}
        self._tensors: dict[str, _Tensor] = {}
        for file in _files(path, stem):
            header, start = _read_header(file)
            self._metadata |= header.pop("__metadata__", {})
            for key, entry in header.items():
                offset = start + entry["data_offsets"][0]
                tensor = _Tensor(file, key, entry["dtype"], tuple(entry["shape"]), offset)
                if key in self._tensors:
                    raise ValueError(f"{file} and {self._tensors[key].file} both hold {key}")
                self._tensors[key] = tensor

        self._remove_prefix()
        self._check_dtypes()

    def _remove_prefix(self) -> None:
        for prefix in PREFIXES:
            if any(key.startswith(prefix) for key in self._tensors):
                self._tensors = {
                    key.removeprefix(prefix): tensor
                    for key, tensor in self._tensors.items()
                    if not key.startswith(COMPANIONS)
                }

    def _check_dtypes(self) -> None:
        for key, tensor in self._tensors.items():
            if key.rpartition(".")[2] in FLOAT8_SCALES:
                raise ValueError(
                    f"{tensor.file} holds {tensor.key}: scaled float8 weights are not read; "
                    "expected bfloat16, or float8 without scales"
                )
            allowed = {**DTYPES, **CODES} if self.quantization() else DTYPES
            if tensor.dtype not in allowed:
                raise ValueError(
                    f"{tensor.file} holds {tensor.key} of dtype {tensor.dtype}; expected one of "
                    f"{', '.join(DTYPES)}. Quantized weights are not read"
                )

    def keys(self) -> Set[str]:
        return self._tensors.keys()

    def without(self, key: str) -> "Tensors":
        """Return the same tensors, but for one of them."""
        other = copy(self)
        other._tensors = {name: tensor for name, tensor in self._tensors.items() if name != key}
        return other

    def metadata(self) -> dict[str, str]:
        """The header's own entries; {} if there are none."""
        return self._metadata

    def quantization(self) -> str:
        """The format of codes in a file of scripts/quantize.py; "" for any other file."""
        return self._metadata.get(QUANTIZATION, "")

    def shape(self, key: str) -> tuple[int, ...]:
        return self._tensors[key].shape

    def read(self, key: str, start: int | None = None, stop: int | None = None) -> np.ndarray:
        """Return a tensor, or its rows [start, stop). Nothing else is read from disk."""
        tensor = self._tensors[key]
        dtype = np.dtype({**DTYPES, **CODES}[tensor.dtype])
        shape = tensor.shape
        offset = tensor.offset
        if start is not None:
            row = math.prod(shape[1:]) * dtype.itemsize
            offset += start * row
            shape = (stop - start, *shape[1:])
        size = math.prod(shape) * dtype.itemsize
        content = np.fromfile(tensor.file, np.uint8, size, offset=offset)
        return content.view(dtype).reshape(shape)


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its tensors begin.

    The safetensors library checks it. It cannot tell numpy's float8 dtypes, so we read the tensors.
    """
    try:
        with safe_open(file, framework="np"), file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            return json.loads(stream.read(size)), 8 + size
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file} is missing") from error
    except SafetensorError as error:
        with file.open("rb") as stream:
            content = stream.read(64)
        for start, problem in OTHER_FORMATS.items():
            if content.startswith(start):
                raise ValueError(f"{file} {problem}") from error
        raise ValueError(
            f"{file} is not a complete safetensors file ({error}); download it again"
        ) from error


def has_weights(path: Path, stem: str = STEM) -> bool:
    """Return whether `path` is a file, or a folder that holds weights."""
    return path.is_file() or any(path.glob(f"{stem}.safetensors*"))


def _files(path: Path, stem: str) -> list[Path]:
    """The safetensors files of `path`: itself, or the files in a folder.

    An index wins over a single file, as in diffusers.
    """
    if not path.is_dir():
        return [path]
    index = path / f"{stem}.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f'{index} has no "weight_map"; expected {{tensor: file}}')
        return [path / str(name) for name in sorted(set(weight_map.values()))]
    single = path / f"{stem}.safetensors"
    if single.exists():
        return [single]
    raise FileNotFoundError(
        f"{path} holds neither {single.name} nor {index.name}; expected a folder of "
        f"{LIBRARIES[stem]}"
    )


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises FileNotFoundError if it is missing, ValueError naming it if it is not a JSON object.
    """
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing")
    try:
        values = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__}; expected a JSON object")
    return values


def read_config(folder: Path, class_name: str) -> dict[str, Any]:
    """Return the config.json of a diffusers folder.

    Raises FileNotFoundError if it is missing, ValueError if it describes another class or
    quantized weights.
    """
    file = folder / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing; expected a {class_name} folder of diffusers")
    config = read_json(file)
    if config.get("_class_name") != class_name:
        raise ValueError(f"{file} describes a {config.get('_class_name')}; expected a {class_name}")
    quantization = config.pop("quantization_config", None)
    if quantization and quantization.get("quant_method") != QUANT_METHOD:
        raise ValueError(
            f"{file} has quantization_config: quantized weights are not read; expected the model "
            "in bfloat16, or a folder of scripts/quantize.py"
        )
    return config


def config_from(
    cls: type[Config],
    file: Path,
    values: Mapping[str, Any],
    fixed: Mapping[str, Any],
    required: Collection[str] = (),
    **overrides: Any,
) -> Config:
    """Build a config dataclass from the entries of a JSON file that it has fields for.

    fixed: {entry: its only value here}. Names that start with "_" are diffusers' notes, and an
    unknown entry is off if it is null or false. required: fields that need an entry, since no
    tensor's shape confirms them.

    Raises ValueError naming the file and an entry that would change what is computed.
    """
    known = {}
    names = [field.name for field in fields(cls)]
    for name, value in values.items():
        if name in names:
            known[name] = tuple(value) if isinstance(value, list) else value
        elif name in fixed:
            if value != fixed[name]:
                raise ValueError(f"{file} has {name} {value!r}; expected {fixed[name]!r}")
        elif not name.startswith("_") and value not in (None, False):
            raise ValueError(
                f"{file} has {name} {value!r}, which is not known here and may change what the "
                "model computes; remove the entry if it does not"
            )

    missing = [name for name in required if known.get(name) is None]
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}")
    try:
        return cls(**{**known, **overrides})
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
