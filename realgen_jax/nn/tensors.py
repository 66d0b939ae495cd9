"""Reading published checkpoints: their tensors, and the JSON files beside them."""

import json
from collections.abc import Collection, Mapping, Set
from copy import copy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from realgen_jax.nn.stored import DTYPES, QUANTIZATION, Stored, open_tensors

STEM = "diffusion_pytorch_model"
Config = TypeVar("Config")

# Names of the files of weights in a folder, without ".safetensors" -> the library that writes them.
LIBRARIES = {STEM: "diffusers", "model": "transformers"}

# Prefixes of all names: of ComfyUI, torch.compile and DataParallel. ComfyUI's checkpoints of a
# whole pipeline hold the autoencoder and the text encoders too; PARTS are the prefixes in these.
PREFIXES = ("model.diffusion_model.", "_orig_mod.", "module.")
VAE_PREFIXES = ("first_stage_model.", "vae.")
PARTS = (PREFIXES[0], *VAE_PREFIXES, "text_encoders.", "cond_stage_model.", "conditioner.")

# The names, after a module's, of the scale of a float8 weight: ComfyUI's older and newer one.
SCALES = ("scale_weight", "weight_scale")
# Beside them: scales of the inputs, for products in float8, and notes. Weights do not need them.
SCALE_NOTES = ("scaled_fp8", "comfy_quant", "scale_input", "input_scale")
# What other ways of quantizing write beside a weight.
QUANTIZED = ("weight_scale_2", "pre_quant_scale", "weight_scale_inv", "absmax", "quant_map")
# In the config.json of scripts/quantize.py, so that other programs do not read its codes.
QUANT_METHOD = "realgen_jax"


class Tensors:
    """The tensors of a file, or of a folder with one such file or an index of several.

    stem: a key of LIBRARIES, the name of a folder's files. prefixes: those that other programs put
    before all names; names come without them. Tensors that are quantized in a GGUF file, or float8
    with a scale, are read as float32. Raises FileNotFoundError for a missing file and ValueError
    for one that is incomplete, of another format, or not of floating-point weights.
    """

    def __init__(self, path: Path, stem: str = STEM, prefixes: tuple[str, ...] = PREFIXES):
        self.path = path
        self._metadata: dict[str, str] = {}
        self._tensors: dict[str, Stored] = {}
        for file in _files(path, stem):
            metadata, tensors = open_tensors(file)
            self._metadata |= metadata
            for tensor in tensors:
                other = self._tensors.get(tensor.key)
                if other is not None:
                    raise ValueError(f"{file} and {other.file} both hold {tensor.key}")
                self._tensors[tensor.key] = tensor

        self._remove_prefix(prefixes)
        self._apply_scales()
        self._check_dtypes()

    def _remove_prefix(self, prefixes: tuple[str, ...]) -> None:
        others = tuple(part for part in PARTS if part not in prefixes)
        for prefix in prefixes:
            if any(key.startswith(prefix) for key in self._tensors):
                self._tensors = {
                    key.removeprefix(prefix): tensor
                    for key, tensor in self._tensors.items()
                    if not key.startswith(others)
                }

    def _apply_scales(self) -> None:
        """Multiply weights by their scales when they are read; drop what is not needed then."""
        for key in list(self._tensors):
            module, _, name = key.rpartition(".")
            if name in SCALE_NOTES:
                del self._tensors[key]
            elif name in SCALES:
                scale = self._tensors.pop(key)
                weight = self._tensors.get(f"{module}.weight")
                if weight is None or np.prod(scale.shape) != 1 or not scale.readable:
                    raise ValueError(
                        f"{scale.file} holds {scale.key} of dtype {scale.dtype} and shape "
                        f"{scale.shape}; expected one number for a weight, as in ComfyUI's scaled "
                        "float8. Other quantized weights are not read"
                    )
                self._tensors[f"{module}.weight"] = _scaled(weight, float(scale.read().ravel()[0]))

    def _check_dtypes(self) -> None:
        for key, tensor in self._tensors.items():
            if not tensor.readable or key.rpartition(".")[2] in QUANTIZED:
                raise ValueError(
                    f"{tensor.file} holds {tensor.key} of dtype {tensor.dtype}; expected one of "
                    f"{', '.join(DTYPES)}. Quantized weights are read from GGUF files only"
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
        return tensor.read() if start is None else tensor.rows(start, stop)


def _scaled(weight: Stored, scale: float) -> Stored:
    """A float8 weight times its scale, in float32."""

    def rows(start: int, stop: int) -> np.ndarray:
        return weight.rows(start, stop).astype(np.float32) * np.float32(scale)

    return replace(weight, rows=rows)


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
