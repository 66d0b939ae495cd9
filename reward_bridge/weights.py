"""Loads published weight files strictly: reads no code, and renames keys by a table."""

import argparse
import json
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

State = Mapping[str, torch.Tensor]

# (regex that matches a whole key, its replacement). None drops the tensor.
Table = Sequence[tuple[str, str | None]]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# A model in several files, as transformers and diffusers save it: an index beside its shards.
INDEX = ".index.json"
SHARD = re.compile(r"-\d{5}-of-\d{5}\.")

# What trainers call a table of weights inside a larger file, with or without a moving average.
WRAPPER = re.compile(
    r"(ema_)?(model|module|net|network|params|weights|(model_)?state_dict)(_ema)?|ema"
)

# What wrappers put before a module's own names: torch.compile and FSDP anywhere, DDP at the start.
PREFIX = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

# Formats that are not read, by a file's first bytes or its suffix.
OTHER_FORMATS = (
    (b"GGUF", ".gguf", "GGUF"),
    (b"\x89HDF", ".h5", "HDF5 (Keras)"),
    (None, ".keras", "Keras"),
    (None, ".onnx", "ONNX"),
    (None, ".msgpack", "msgpack (Flax)"),
    (None, ".npz", "NumPy"),
    (b"version https://git-lfs", None, "a Git LFS pointer, whose file is still to be downloaded"),
    (b"<html", ".html", "a web page"),
    (b"<!DOCTYPE", ".htm", "a web page"),
)

# What trainers keep beside the weights and holds no code: their arguments, and NumPy's numbers,
# which two functions of NumPy restore. In NumPy 1 these are in numpy.core.
_SCALAR = np.float64().__reduce__()[0]
_ARRAY = np.zeros(0).__reduce__()[0]
HARMLESS = [
    argparse.Namespace,
    np.ndarray,
    np.dtype,
    *(type(np.dtype(code)) for code in np.typecodes["All"] if code != "O"),
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((_ARRAY, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
]


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of this name. Raises ValueError for a name that is not in DTYPES."""
    if name not in DTYPES:
        raise ValueError(f"got dtype {name!r}; expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def expand_home(path: str | Path) -> Path:
    """Return the path with the home folder for "~", or as it is if the user has none.

    Path.expanduser raises RuntimeError for such a user.
    """
    return Path(os.path.expanduser(path))


def find(path: str, option: str, *names: str) -> Path:
    """`path` itself if it is a file, else the first of `names` (globs) that is inside that folder.

    A file in shards is found by its index, such as model.safetensors.index.json. Raises
    FileNotFoundError naming the config's option, config.reward.options.<option>, and ValueError if
    several files have a name.
    """
    place = expand_home(path)
    if place.is_file():
        return place
    matches = files_named(place, *names)
    if len(matches) > 1:
        raise ValueError(
            f"{path!r} holds {' and '.join(file.name for file in matches)}; set "
            f"config.reward.options.{option} to one of them, or remove what is out of date"
        )
    if matches:
        return matches[0]
    shards = [file.name for file in place.glob("*") if SHARD.search(file.name)]
    raise FileNotFoundError(
        f"{path!r} is neither a file nor a folder with {' or '.join(names)}"
        f"{f' (the index of {shards[0]} is missing)' if shards else ''}; set "
        f"config.reward.options.{option}"
    )


def files_named(folder: Path, *names: str) -> list[Path]:
    """The files of the first of `names` (globs) that is inside a folder, or the indices of shards.

    There are several if one of them is out of date, and none if the folder has none of the names.
    """
    for name in names:
        matches = [file for file in folder.glob(name) if not SHARD.search(file.name)]
        matches += folder.glob(name + INDEX)
        matches = sorted(file for file in matches if not file.name.startswith("."))
        if matches:
            return matches
    return []


def read(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, of a .pth, .pt, .bin or .ckpt file, or of an index.

    The second kind is read by torch.load with weights_only=True. If such a file holds more than its
    weights, they are found by the name that trainers give them (WRAPPER). An index names the shards
    of a model, .safetensors or .bin, all of which are read. Prefixes that come from torch.compile
    and from distributed training are removed.

    Raises ValueError for another format, for pickled objects, for several sets of weights, and for
    shards without a tensor of their index. Raises FileNotFoundError for missing shards.
    """
    if file.name.endswith(INDEX):
        return _read_shards(file)
    try:
        state = load_file(file) if file.suffix == ".safetensors" else _torch_load(file)
    except OSError:
        raise
    except Exception as error:  # both libraries raise many kinds for files that are not theirs
        raise ValueError(
            f"{file} cannot be read by safetensors or torch.load(weights_only=True): "
            f"{_why_unreadable(file, error)}"
        ) from error

    if file.suffix != ".safetensors":
        state = _unwrap(state, file)
    return _without_prefixes(state, file)


def _torch_load(file: Path) -> Any:
    if _is_torchscript(file):
        raise ValueError("TorchScript")
    # Files from before torch 1.6 are not zip archives and cannot be memory-mapped.
    with torch.serialization.safe_globals(HARMLESS):
        return torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )


def _is_torchscript(file: Path) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _why_unreadable(file: Path, error: Exception) -> str:
    """Why reading a file failed, in one line."""
    with file.open("rb") as stream:
        start = stream.read(32)
    for magic, suffix, name in OTHER_FORMATS:
        if file.suffix.lower() == suffix or (magic and start.startswith(magic)):
            return f"it is {name}; expected .safetensors, or torch.save of a state_dict()"
    if _is_torchscript(file):
        return "it is TorchScript, which holds code; save the module's state_dict()"

    # torch wraps its reason in advice of several lines, some of it in colour.
    message = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    python_object = re.search(r"GLOBAL (\S+)", message)
    if python_object:
        return (
            f"it holds a pickled {python_object[1]}, which takes code to restore; save the "
            "weights alone, torch.save(model.state_dict(), FILE)"
        )
    message = message.partition("WeightsUnpickler error:")[2] or message
    reason = next(iter(message.strip().splitlines()), type(error).__name__)
    return (
        f"it may be another kind of file, or an incomplete download ({file.stat().st_size} bytes): "
        f"{reason}"
    )


def _unwrap(state: Any, file: Path) -> State:
    """The table of tensors in what torch.load returned: itself, or what a wrapper holds."""
    wrapped = {}
    if isinstance(state, Mapping):
        for name, value in state.items():
            if WRAPPER.fullmatch(str(name)) and _has_tensors(value):
                wrapped[name] = value
    if len(wrapped) > 1:
        raise ValueError(
            f"{file} holds several sets of weights ({', '.join(wrapped)}); save the one to use "
            "alone, torch.save(checkpoint[NAME], FILE)"
        )
    for value in wrapped.values():
        return _unwrap(value, file)

    _check_tensors(state, file)
    return state


def _has_tensors(value: Any) -> bool:
    """Whether this is a mapping with tensors, or one inside which there is such a mapping."""
    if not isinstance(value, Mapping):
        return False
    inner = value.values()
    return any(isinstance(item, torch.Tensor) or _has_tensors(item) for item in inner)


def _without_prefixes(state: State, source: Path) -> dict[str, Any]:
    """Remove `PREFIX` and "module." from keys. Raises ValueError if two become the same."""
    plain = {}
    for key, value in state.items():
        name = PREFIX.sub("", key).removeprefix("module.")
        if name in plain:
            raise ValueError(f"{source} holds {name!r} twice, once as {key!r}; remove one of them")
        plain[name] = value
    return plain


def _read_shards(index: Path) -> dict[str, torch.Tensor]:
    """The tensors that an index lists, each from the file that it names."""
    # {tensor: its file}
    try:
        file_of = _without_prefixes(json.loads(index.read_bytes())["weight_map"], index)
        files = sorted({index.parent / name for name in file_of.values()})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{index} is no index of shards, {{"weight_map": {{tensor: file}}}} '
            f"({type(error).__name__}: {error}); download it again"
        ) from error

    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{index.parent} lacks {len(missing)} of the {len(files)} files that {index.name} "
            f"names, such as {missing[0]}; download the folder again"
        )

    state = {}
    for file in files:
        shard = read(file)
        keys = [key for key, name in file_of.items() if index.parent / name == file]
        absent = [key for key in keys if key not in shard]
        if absent:
            raise ValueError(
                f"{file} lacks {absent[0]!r}, which {index.name} says it holds; one of the two may "
                "be out of date, download the folder again"
            )
        state |= {key: shard[key] for key in keys}
    return state


def _check_tensors(state: Any, file: Path) -> None:
    """Raise ValueError if `state` is not a mapping from names to tensors."""
    wrong = None
    if isinstance(state, Mapping):
        for key, value in state.items():
            if not (isinstance(key, str) and isinstance(value, torch.Tensor)):
                wrong = key
                break
    else:
        wrong = state
    if wrong is not None:
        raise ValueError(
            f"{file} does not hold a table of tensors (see {wrong!r}); expected a state dict"
        )


def rename(state: State, table: Table, source: str | Path) -> dict[str, torch.Tensor]:
    """Rename every key with the first rule whose regex matches the whole key.

    Raises ValueError naming a key that no rule matches.
    """
    renamed: dict[str, torch.Tensor] = {}
    unknown = []
    for key, value in state.items():
        for pattern, replacement in table:
            match = re.fullmatch(pattern, key)
            if match:
                if replacement is not None:
                    renamed[match.expand(replacement)] = value
                break
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(
            f"{source} has {len(unknown)} keys that do not belong to this model, such as "
            f"{unknown[0]!r}"
        )
    return renamed


def load_strict(module: nn.Module, state: State, source: str | Path) -> nn.Module:
    """Fill every parameter and buffer exactly once, and prepare the module for scoring.

    Returns the module in eval mode, without gradients. Raises ValueError naming missing keys,
    unexpected keys, different shapes, and integers in place of floats (which quantized weights
    are).
    """
    expected = module.state_dict()
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    different = []
    for key, value in expected.items():
        given = state.get(key, value)
        if given.shape != value.shape:
            different.append(f"{key} has shape {tuple(given.shape)}, expected {tuple(value.shape)}")
        elif given.is_floating_point() != value.is_floating_point():
            different.append(f"{key} has {given.dtype}, expected {value.dtype}")

    problems = []
    if missing:
        problems.append(f"{len(missing)} keys missing, such as {missing[0]!r}")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected keys, such as {unexpected[0]!r}")
    problems += different[:3]
    if problems:
        raise ValueError(f"{source} does not fit {type(module).__name__}: {'; '.join(problems)}")

    module.load_state_dict(dict(state))
    return module.eval().requires_grad_(False)
