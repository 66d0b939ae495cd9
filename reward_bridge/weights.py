"""Loads published weight files strictly: reads no code, and renames keys by a table."""

import argparse
import os
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

State = Mapping[str, torch.Tensor]

# (regex that matches a whole key, its replacement). None drops the tensor.
Table = Sequence[tuple[str, str | None]]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WRAPPERS = ("model", "state_dict", "module")
UNREADABLE = (
    pickle.UnpicklingError,
    SafetensorError,
    RuntimeError,
    EOFError,
    LookupError,
    TypeError,
    ValueError,
)


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
    """`path` itself if it is a file, else the first match of `names` (globs) inside that folder.

    Raises FileNotFoundError naming the config's option, config.reward.options.<option>.
    """
    place = expand_home(path)
    if place.is_file():
        return place
    for name in names:
        matches = sorted(place.glob(name))
        if matches:
            return matches[0]
    raise FileNotFoundError(
        f"{path!r} is neither a file nor a folder with {' or '.join(names)}; set "
        f"config.reward.options.{option}"
    )


def read(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, or of a .pth, .pt or .bin file.

    The latter are read by torch.load with weights_only=True. A file that wraps its tensors
    ({"model": ...}, {"state_dict": ...}, {"module": ...}) is unwrapped, and DataParallel's prefix
    "module." is removed. Raises ValueError for a file that holds anything but tensors.
    """
    try:
        state = load_file(file) if file.suffix == ".safetensors" else _torch_load(file)
    except UNREADABLE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{file} cannot be read by safetensors or torch.load(weights_only=True); it may be "
            f"another kind of file, or an incomplete download ({file.stat().st_size} bytes): "
            f"{reason}"
        ) from error
    if file.suffix == ".safetensors":
        return state

    for wrapper in WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    _check_tensors(state, file)
    return {key.removeprefix("module."): value for key, value in state.items()}


def _torch_load(file: Path) -> Any:
    # Some trainers also save their arguments as a Namespace, which holds no code. Files from before
    # torch 1.6 are not zip archives and cannot be memory-mapped.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )


def _check_tensors(state: Any, file: Path) -> None:
    """Raise ValueError if `state` is not a mapping from keys to tensors."""
    wrong = None
    if isinstance(state, Mapping):
        for key, value in state.items():
            if not isinstance(value, torch.Tensor):
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
    unexpected keys and different shapes.
    """
    expected = module.state_dict()
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    shapes = []
    for key, value in expected.items():
        if key in state and state[key].shape != value.shape:
            shapes.append(
                f"{key} has shape {tuple(state[key].shape)}, expected {tuple(value.shape)}"
            )

    problems = []
    if missing:
        problems.append(f"{len(missing)} keys missing, such as {missing[0]!r}")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected keys, such as {unexpected[0]!r}")
    problems += shapes[:3]
    if problems:
        raise ValueError(f"{source} does not fit {type(module).__name__}: {'; '.join(problems)}")

    module.load_state_dict(dict(state))
    return module.eval().requires_grad_(False)
