"""Find and run the config file that --config names.

A config is named by its path or, if it ships with the package, by its name: flux_grpo. A preset may
follow after a colon, flux_grpo:tiny; it is passed to the file's get_config().
"""

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

from ml_collections import ConfigDict

from realgen_jax.files import expand_home

SHIPPED = "realgen_configs"  # the package that setup.py builds from configs/

DOTS = "does not accept dots in field names"  # what ml_collections says of {"module.Class": 1.0}
OWN_REWARD = (
    "A reward of your own has a name without dots, and its class in its options: "
    "config.reward.options.NAME = {'class': 'package.module:Class'} (docs/rewards.md)"
)

# Keys of older versions, and those that say the same now.
RENAMED = {
    "sample.resolution": "config.sample.width and config.sample.height",
    "sample.eval_num_steps": "config.evaluate.sample.num_steps",
}


def load_config(argument: str) -> ConfigDict:
    """Return the config of "FILE[:PRESET]", or of "NAME[:PRESET]" for a shipped config.

    Raises FileNotFoundError if there is no such file or name, and ValueError with a one-line
    message if the file does not produce a config.
    """
    name, *preset = argument.split(":", 1)
    file = find_config(name)
    with _one_line_errors(file):
        module = _run_file(file)

    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise ValueError(f"{file} has no get_config(); expected a function that returns the config")
    if preset and not inspect.signature(get_config).parameters:
        raise ValueError(f"{file} has no presets; leave out ':{preset[0]}'")

    with _one_line_errors(file):
        config = get_config(*preset)
    if not isinstance(config, ConfigDict):
        raise ValueError(f"{file}: get_config() returned {config!r}; expected a ConfigDict")
    return config


def make_preset(
    presets: Mapping[str, Callable[[], ConfigDict]], name: str, file: str
) -> ConfigDict:
    """Return the config of the preset `name`. Raises ValueError for a name that `file` lacks."""
    if name not in presets:
        choices = ", ".join(presets)
        raise ValueError(f"{Path(file).name} has no preset {name!r}; choose from {choices}")
    return presets[name]()


def find_config(name: str) -> Path:
    """Return the file at this path, or else the shipped config of this name ("flux_grpo").

    A shipped config may also be named by its path in the repository, "configs/flux_grpo.py".
    """
    file = expand_home(name)
    if file.is_file():
        return file

    shipped = shipped_configs()
    stem = name.removeprefix("configs/").removesuffix(".py")
    if stem not in shipped:
        raise FileNotFoundError(
            f"--config {name}: no such file and no shipped config; shipped are {', '.join(shipped)}"
        )
    return shipped[stem]


def shipped_configs() -> dict[str, Path]:
    """Return {name: file} of the configs that are installed with this package."""
    package = importlib.util.find_spec(SHIPPED)
    if package is None:  # a checkout that is not installed
        return {}

    files = {}
    for folder in package.submodule_search_locations:
        for file in sorted(Path(folder).glob("*.py")):
            files[file.stem] = file
    return files


def missing_keys(config: ConfigDict, template: ConfigDict, parent: str = "") -> list[str]:
    """Return the keys, such as "train.beta", that the template has and the config lacks."""
    missing = []
    for key, value in template.items():
        if key not in config:
            missing.append(parent + key)
        elif isinstance(value, ConfigDict) and isinstance(config[key], ConfigDict):
            missing += missing_keys(config[key], value, f"{parent}{key}.")
    return missing


def _run_file(file: Path) -> ModuleType:
    """Execute a Python file of any name as a module. It can import modules from its folder."""
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    loader = SourceFileLoader("_realgen_config", str(file))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module  # dataclasses look up the module of their class
    loader.exec_module(module)
    return module


@contextmanager
def _one_line_errors(file: Path) -> Iterator[None]:
    """Turn errors from the file's own code into a one-line ValueError naming file and line."""
    try:
        yield
    except ValueError as error:  # the file's own message, such as that of an unknown preset
        if DOTS in str(error):
            raise ValueError(f"{file}: {error} {OWN_REWARD}") from error
        raise
    except SyntaxError as error:
        raise ValueError(f"{error.filename}, line {error.lineno}: {error.msg}") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(file)]
        place = f"{file}, line {lines[-1]}" if lines else str(file)
        message = " ".join(str(error).split())
        message = message.partition(" Other fields present")[0]  # ml_collections lists all keys
        for key, names in RENAMED.items():
            if f'"{key.rpartition(".")[2]}"' in message:
                message += f" config.{key} is now {names}."
        raise ValueError(f"{place}: {type(error).__name__}: {message}") from error
