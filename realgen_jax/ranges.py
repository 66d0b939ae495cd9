"""Kinds of ranges: the values that a key of a config may have."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict


@dataclass(frozen=True)
class Range:
    """The values that a key may have: in words, to follow "expected", and as a function."""

    words: str
    holds: Callable[[Any], bool]


def integer(least: int, most: int | None = None) -> Range:
    """Integers from `least` to `most`, both included."""
    words = f"{least} or more" if most is None else f"from {least} to {most}"
    return Range(
        f"an integer, {words}",
        lambda value: is_integer(value) and least <= value <= (math.inf if most is None else most),
    )


def number(least: float | None = None) -> Range:
    """Finite numbers, not below `least`."""
    words = "a finite number" if least is None else f"a finite number, {least:g} or more"
    return Range(
        words, lambda value: is_number(value) and value >= (-math.inf if least is None else least)
    )


def positive() -> Range:
    """Finite numbers above 0."""
    return Range("a finite number above 0", lambda value: is_number(value) and value > 0)


def fraction() -> Range:
    """Numbers from 0 to below 1, such as the decay of an average."""
    return Range("a number from 0 to below 1", lambda value: is_number(value) and 0 <= value < 1)


def boolean() -> Range:
    """True or False."""
    return Range("True or False", lambda value: isinstance(value, bool))


def choice(*names: str) -> Range:
    """One of these names, which may be empty."""
    return Range(
        f"one of {', '.join(name or repr(name) for name in names)}", lambda value: value in names
    )


def text() -> Range:
    """Any text: a file, or a name that is looked up in a table that users can extend."""
    return Range("text", lambda value: isinstance(value, str))


def folder() -> Range:
    """A folder, which need not exist."""
    return Range("a folder", lambda value: isinstance(value, str) and value.strip() != "")


def folder_name(empty: bool = False) -> Range:
    """The name of a folder without its parents."""
    return Range(
        "the name of one folder, without / (config.run_root is its parent)",
        lambda value: isinstance(value, str) and (_is_folder_name(value) or (empty and not value)),
    )


def device() -> Range:
    """A torch device."""
    return Range(
        "auto, cpu or cuda:N",
        lambda value: isinstance(value, str) and re.fullmatch("auto|cpu|cuda(:[0-9]+)?", value),
    )


def names() -> Range:
    """A tuple of different names."""
    return Range(
        "different names, such as ('a', 'b')",
        lambda value: (
            is_tuple(value, lambda name: isinstance(name, str) and name != "")
            and len(set(value)) == len(value)
        ),
    )


def options() -> Range:
    """The options of a reward, which its class checks."""
    return Range(
        "a mapping of options, without NaN or infinity",
        lambda value: is_mapping(value) and _is_finite(value),
    )


# -- Tests of a value


def is_integer(value: Any) -> bool:
    return type(value) is int  # not bool


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)


def is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping | ConfigDict)


def is_tuple(value: Any, member: Callable[[Any], bool]) -> bool:
    return isinstance(value, tuple | list) and all(map(member, value))


def is_pattern(value: Any) -> bool:
    """Return whether a value is a regular expression."""
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except re.error:
        return False


def _is_folder_name(value: str) -> bool:
    if not value.isprintable() or value != value.strip() or value in ("", ".", ".."):
        return False
    return "/" not in value and len(value.encode()) <= 200


def _is_finite(value: Any) -> bool:
    """Return whether a mapping of options holds no NaN and no infinity, at any depth."""
    if is_mapping(value):
        return all(map(_is_finite, value.values()))
    if isinstance(value, tuple | list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)
