"""Published weight files into our modules: read without executing anything, renamed by a table, loaded strictly."""

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Table = Sequence[
    tuple[str, str | None]
]  # (regex of a whole key, its replacement; None: not needed, left out)


def torch_dtype(name: str) -> torch.dtype:
    """Raises ValueError for anything but the names in DTYPES."""
    if name not in DTYPES:
        raise ValueError(f"got dtype {name!r}; expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def find(path: str, option: str, *names: str) -> Path:
    """`path` itself where it is a file, else the first of `names` (globs) inside that folder.

    Raises FileNotFoundError naming the config's option, config.reward.options.<option>.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return place
    for name in names:
        if found := sorted(place.glob(name)):
            return found[0]
    raise FileNotFoundError(
        f"{path!r} is neither a file nor a folder that holds {' or '.join(names)}; set config.reward.options.{option}"
    )


def read(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, or of a .pth, .pt or .bin one (torch.load with weights_only=True).

    A file that wraps them ({"model": ...}, {"state_dict": ...}, {"module": ...}) is unwrapped, and the prefix "module."
    of DataParallel removed. Raises ValueError for a file that holds anything but tensors.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # trainers keep their arguments in the file too, and a Namespace holds no code; a file from before torch 1.6 is
        # no archive and cannot be mapped
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(
                file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
            )
    except (
        pickle.UnpicklingError,
        SafetensorError,
        RuntimeError,
        EOFError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{file} is no file of tensors that safetensors or torch.load(weights_only=True) reads, or it was not "
            f"downloaded whole ({file.stat().st_size} bytes): {reason}"
        ) from error
    for wrapper in ("model", "state_dict", "module"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    wrong = (
        state
        if not isinstance(state, Mapping)
        else next(
            (key for key, value in state.items() if not isinstance(value, torch.Tensor)), None
        )
    )
    if wrong is not None:
        raise ValueError(
            f"{file} does not hold a table of tensors (see {wrong!r}); expected a state dict"
        )
    return {key.removeprefix("module."): value for key, value in state.items()}


def rename(
    state: Mapping[str, torch.Tensor], table: Table, source: str | Path
) -> dict[str, torch.Tensor]:
    """Every key by the first rule whose regex matches it whole. Raises ValueError naming keys that no rule knows."""
    renamed: dict[str, torch.Tensor] = {}
    unknown = []
    for key, value in state.items():
        for pattern, replacement in table:
            if match := re.fullmatch(pattern, key):
                if replacement is not None:
                    renamed[match.expand(replacement)] = value
                break
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(
            f"{source}: {len(unknown)} keys that are not of this model, such as {unknown[0]!r}"
        )
    return renamed


def load_strict(
    module: nn.Module, state: Mapping[str, torch.Tensor], source: str | Path
) -> nn.Module:
    """Fill every parameter and buffer once, shapes equal; ready to score: eval mode, no gradients.

    Raises ValueError naming what is missing, what is over, and shapes that differ.
    """
    want = module.state_dict()
    problems = [
        f"{len(keys)} keys {what}, such as {keys[0]!r}"
        for what, keys in (
            ("missing", [key for key in want if key not in state]),
            ("too many", [key for key in state if key not in want]),
        )
        if keys
    ]
    problems += [
        f"{key} has shape {tuple(state[key].shape)}, the model {tuple(value.shape)}"
        for key, value in want.items()
        if key in state and state[key].shape != value.shape
    ][:3]
    if problems:
        raise ValueError(f"{source} does not fit {type(module).__name__}: {'; '.join(problems)}")
    module.load_state_dict(dict(state))
    return module.eval().requires_grad_(False)
