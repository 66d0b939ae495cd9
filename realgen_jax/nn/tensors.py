"""Reading published checkpoints: safetensors files, and the config.json beside them."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which safetensors then returns)
import numpy as np
from safetensors import SafetensorError, safe_open

STEM = "diffusion_pytorch_model"
Config = TypeVar("Config")


class Tensors:
    """The tensors of a safetensors file, or of a folder with one such file or an index of several.

    Raises FileNotFoundError for a missing file and ValueError for one that is incomplete.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file_of: dict[str, Any] = {}
        for file in _files(path):
            try:
                opened = safe_open(file, framework="np")
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{file} is missing") from error
            except SafetensorError as error:
                raise ValueError(
                    f"{file} is not a complete safetensors file ({error}); download it again"
                ) from error
            self._file_of |= dict.fromkeys(opened.keys(), opened)

    def keys(self) -> set[str]:
        return set(self._file_of)

    def metadata(self) -> dict[str, str]:
        first = next(iter(self._file_of.values()))
        return first.metadata() or {}

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._file_of[key].get_slice(key).get_shape())

    def read(self, key: str, start: int | None = None, stop: int | None = None) -> np.ndarray:
        """Return a tensor, or its rows [start, stop). Nothing else is read from disk."""
        if start is None:
            return self._file_of[key].get_tensor(key)
        return self._file_of[key].get_slice(key)[start:stop]


def _files(path: Path) -> list[Path]:
    """The safetensors files of `path`: itself, or the files in a diffusers folder."""
    if not path.is_dir():
        return [path]
    single = path / f"{STEM}.safetensors"
    if single.exists():
        return [single]
    index = path / f"{STEM}.safetensors.index.json"
    if index.exists():
        names = set(json.loads(index.read_text())["weight_map"].values())
        return [path / name for name in sorted(names)]
    raise FileNotFoundError(
        f"{path} holds neither {single.name} nor {index.name}; expected a folder of diffusers"
    )


def read_config(folder: Path, class_name: str) -> dict[str, Any]:
    """Return the config.json of a diffusers folder.

    Raises FileNotFoundError if it is missing, ValueError if it describes another class.
    """
    file = folder / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing; expected a {class_name} folder of diffusers")
    config = json.loads(file.read_text())
    if config.get("_class_name") != class_name:
        raise ValueError(f"{file} describes a {config.get('_class_name')}; expected a {class_name}")
    return config


def config_from(cls: type[Config], values: dict[str, Any], **overrides: Any) -> Config:
    """Build a config dataclass from the entries of config.json that it has fields for."""
    known = {}
    for field in fields(cls):
        if field.name in values:
            value = values[field.name]
            known[field.name] = tuple(value) if isinstance(value, list) else value
    return cls(**{**known, **overrides})
