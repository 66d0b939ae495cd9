"""Finds the class of a reward, and checks the options that the config gives it.

A table entry is "module:Class" and is imported on demand, so a run only loads what it uses. The
option `class` names a class outside the table, config.reward.options.NAME = {"class":
"package.module:Class"}. Only the user's own config can set it.
"""

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from typing import Any

CLASS = "class"  # the option that names a class of the user's own
LEARNS = ("prepare", "score", "loss")  # what a learner has (reward_bridge/learners)


def find_class(kind: str, name: str, table: Mapping[str, str], options: Mapping[str, Any]) -> type:
    """The class in the option `class`, else the table's class for `name`.

    Raises ValueError if neither exists or the class cannot be imported. `kind` is for the error.
    """
    if CLASS in options:
        return _import(options[CLASS], f"config.reward.options.{name}.{CLASS}")
    if name not in table:
        raise ValueError(
            f"there is no {kind} {name!r}; choose from {', '.join(sorted(table))}, or name a class "
            f"of your own: config.reward.options.{name} = {{'{CLASS}': 'package.module:Class'}}"
        )
    return _import(table[name], name)


def check_packages(made: type, name: str) -> None:
    """Raise ValueError if a package that a reward's class names in `packages` is not installed."""
    for package in getattr(made, "packages", ()):
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"the reward {name!r} needs the package {package}, which is not installed; install "
                f"the extra, as in: pip install 'realgen_jax[{made.extra}]'"
            )


def check_interface(made: Any, kind: str, name: str) -> None:
    """Raise ValueError if a class of the user's own cannot be a reward, or a learner (`kind`)."""
    source = f"config.reward.options.{name}.{CLASS}"
    if not inspect.isclass(made):
        raise ValueError(f"{source} names a {type(made).__name__}; expected a class")
    if kind == "learner":
        missing = [method for method in LEARNS if not hasattr(made, method)]
        if missing:
            raise ValueError(
                f"{source} names {made.__name__}, which has no {missing[0]}(); a learner has "
                f"{', '.join(LEARNS)}"
            )
    elif not any("__call__" in base.__dict__ for base in made.__mro__) and not hasattr(
        made, "score_groups"
    ):
        raise ValueError(
            f"{source} names {made.__name__}, which has neither __call__(images, prompts) nor "
            "score_groups(images, prompts, size); a reward needs one of them"
        )


def check_arguments(make: Callable, name: str, arguments: Mapping[str, Any]) -> None:
    """Raise ValueError if `make` does not take these keyword arguments."""
    signature = inspect.signature(make)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        options = [key for key in signature.parameters if key not in ("device", "name")]
        raise ValueError(
            f"config.reward.options.{name}: {error}; {make.__name__} takes "
            f"{', '.join(options) or 'no options'}"
        ) from error


def without_class(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a class's constructor receives."""
    return {key: value for key, value in options.items() if key != CLASS}


def _import(target: Any, source: str) -> type:
    """Import "package.module:Class". Raises ValueError naming `source`, where the string is set."""
    module, _, name = str(target).partition(":")
    if not module or not name:
        raise ValueError(f"{source} is {target!r}; expected 'package.module:Class'")
    try:
        imported = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"{source} is {target!r}, and the module {module} cannot be imported ({error}); its "
            "folder must be that of the config file, or in PYTHONPATH"
        ) from error
    except Exception as error:  # whatever a module of the user's own raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{source} is {target!r}, and the module {module} cannot be imported ({reason})"
        ) from error
    if not hasattr(imported, name):
        raise ValueError(f"{source} is {target!r}, but the module {module} has no {name}")
    return getattr(imported, name)
