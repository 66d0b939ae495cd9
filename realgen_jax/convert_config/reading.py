"""Read an ml_collections config file of Flow-GRPO's form without executing it.

Such a file has a function for each preset, which starts from `base.get_config()` of the file
base.py beside it or from another preset, assigns to keys and returns the config. Read are
assignments, numbers, text, tuples, lists, dicts, arithmetic, comparisons, choices (x if c else y),
f-strings, and the calls in FUNCTIONS; anything else is a ValueError that names its line.
"""

import ast
import math
import operator
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "bool": bool,
    "min": min,
    "max": max,
    "round": round,
    "len": len,
    "tuple": tuple,
    "list": list,
    "os.getcwd": lambda: "",  # paths of the written config are relative
    "os.path.join": lambda *parts: "/".join(part for part in parts if part),
}
ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
# Statements without an effect on the config. ast.Expr is a docstring.
SKIPPED = (ast.Import, ast.ImportFrom, ast.Assert, ast.Pass, ast.Expr)


class Config:
    """A config under construction: {"train.beta": value}, and the keys that the preset itself sets.

    Keys that base.py sets are not in `own`.
    """

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.own: set[str] = set()
        self.sections: set[str] = set()
        self.gpus: int | None = None  # the local variable gpu_number

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key; the default if it is None or not set."""
        value = self.values.get(key)
        return default if value is None else value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number. Raises ValueError if the value is something else."""
        value = self.get(key, default)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"{key} is {value!r}; expected a number")
        return value


class Node:
    """A part of a config, such as config.train."""

    def __init__(self, config: Config, path: str = "") -> None:
        self.config = config
        self.path = path

    def child(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name


class _File:
    """The functions of a config file, and of base.py beside it."""

    def __init__(self, path: Path, base: bool = False) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        self.path = path
        self.base = base
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError) as error:
            line = getattr(error, "lineno", None) or 1
            raise ValueError(f"{path}, line {line}: {error.args[0]}") from error
        self.functions = {node.name: node for node in tree.body if type(node) is ast.FunctionDef}


def preset_names(path: Path) -> list[str]:
    """Return the presets of a file: its functions without arguments."""
    functions = _File(path).functions
    return [name for name, node in functions.items() if not node.args.args]


def read_config(path: Path, preset: str, gpus: int | None = None) -> Config:
    """Return the config of a preset. gpus: replaces its gpu_number, from which sizes follow.

    Raises FileNotFoundError for a missing file, and ValueError in one line for an unknown preset or
    for code that is not read.
    """
    names = preset_names(path)
    if preset not in names:
        choices = ", ".join(names) or "none"
        raise ValueError(f"{path} has no preset {preset!r}; its presets are {choices}")
    return _Reader(_File(path), gpus).call(preset)


class _Reader:
    """Follows the functions of a file."""

    def __init__(self, file: _File, gpus: int | None, calls: tuple[str, ...] = ()) -> None:
        self.file = file
        self.gpus = gpus
        self.calls = calls  # the functions that are being read

    def call(self, name: str) -> Config:
        """Return the config that a function of the file returns."""
        node = self.file.functions[name]
        if name in self.calls:
            raise self.refusal(node, f"{name}() calls itself")
        if node.args.args:
            raise self.refusal(node, f"{name}() takes arguments")
        reader = _Reader(self.file, self.gpus, (*self.calls, name))
        return reader.run(node)

    def run(self, function: ast.FunctionDef) -> Config:
        names: dict[str, Any] = {}
        for statement in function.body:
            if isinstance(statement, ast.Return):
                result = self.value(statement.value, names) if statement.value else None
                if not isinstance(result, Node) or result.path:
                    raise self.refusal(statement, f"{function.name}() does not return a config")
                gpus = names.get("gpu_number", self.gpus or result.config.gpus)
                result.config.gpus = gpus if type(gpus) is int and gpus > 0 else None
                return result.config
            if isinstance(statement, ast.Assign):
                self.assign(statement, names)
            elif not isinstance(statement, SKIPPED):
                raise self.refusal(statement, f"{ast.unparse(statement).splitlines()[0]!r}")
        raise self.refusal(function, f"{function.name}() does not return a config")

    def assign(self, statement: ast.Assign, names: dict[str, Any]) -> None:
        """Assign a value to all targets, from the left: config.train = train = ConfigDict()."""
        value = self.value(statement.value, names)
        for target in statement.targets:
            if isinstance(target, ast.Name):
                replaced = target.id == "gpu_number" and self.gpus
                names[target.id] = self.gpus if replaced else value
            elif isinstance(target, ast.Attribute):
                value = self.set_key(target, value, names)
            else:
                raise self.refusal(statement, f"{ast.unparse(target)!r}")

    def set_key(self, target: ast.Attribute, value: Any, names: dict[str, Any]) -> Any:
        """Assign to config.KEY; return the value, or the part of the config that it now is."""
        parent = self.value(target.value, names)
        if not isinstance(parent, Node):
            raise self.refusal(target, f"{ast.unparse(target)!r}")
        config = parent.config
        key = parent.child(target.attr)
        for old in [old for old in config.values if old.startswith(f"{key}.")]:
            del config.values[old]
        if isinstance(value, Node):  # a new ConfigDict()
            config.sections.add(key)
            config.values.pop(key, None)
            return Node(config, key)
        config.values[key] = value
        if not self.file.base:
            config.own.add(key)
        return value

    def value(self, node: ast.expr, names: dict[str, Any]) -> Any:
        """Return the value of an expression."""
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Tuple() | ast.List():
                items = [self.value(item, names) for item in node.elts]
                return tuple(items)
            case ast.Dict():
                keys = [self.value(key, names) for key in node.keys if key is not None]
                values = [self.value(item, names) for item in node.values]
                if len(keys) == len(values):
                    return dict(zip(keys, values, strict=True))
            case ast.Name(id=name) if name in names:
                return names[name]
            case ast.Attribute():
                return self.attribute(node, names)
            case ast.JoinedStr():
                return "".join(str(part) for part in self.parts(node, names))
            case ast.IfExp():
                chosen = node.body if self.value(node.test, names) else node.orelse
                return self.value(chosen, names)
            case ast.BinOp() | ast.UnaryOp() | ast.Compare():
                return self.arithmetic(node, names)
            case ast.Call():
                return self.called(node, names)
        raise self.refusal(node, f"{ast.unparse(node)!r}")

    def attribute(self, node: ast.Attribute, names: dict[str, Any]) -> Any:
        """Return the value of config.KEY."""
        parent = self.value(node.value, names)
        if not isinstance(parent, Node):
            raise self.refusal(node, f"{ast.unparse(node)!r}")
        key = parent.child(node.attr)
        values = parent.config.values
        if key in values:
            return values[key]
        if key in parent.config.sections:
            return Node(parent.config, key)
        raise self.refusal(node, f"config.{key} has no value")

    def parts(self, node: ast.JoinedStr, names: dict[str, Any]) -> Iterator[Any]:
        """Yield the parts of an f-string."""
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                if part.format_spec is not None:
                    raise self.refusal(part, f"{ast.unparse(node)!r}")
                yield self.value(part.value, names)
            else:
                yield self.value(part, names)

    def arithmetic(self, node: ast.expr, names: dict[str, Any]) -> Any:
        """Return the result of an operation on numbers; text can be added and compared."""
        match node:
            case ast.UnaryOp():
                operation, operands = node.op, [node.operand]
            case ast.BinOp():
                operation, operands = node.op, [node.left, node.right]
            case ast.Compare(ops=[operation], comparators=[right]):
                operands = [node.left, right]
            case _:
                raise self.refusal(node, f"{ast.unparse(node)!r}")
        values = [self.value(operand, names) for operand in operands]
        texts = all(isinstance(value, str) for value in values)
        numbers = all(isinstance(value, int | float) for value in values)
        known = type(operation) in ARITHMETIC
        if not known or not (numbers or (texts and not isinstance(operation, ast.Mod))):
            raise self.refusal(node, f"{ast.unparse(node)!r}")
        try:
            return ARITHMETIC[type(operation)](*values)
        except (ArithmeticError, TypeError) as error:
            raise self.refusal(node, f"{ast.unparse(node)!r}: {error}") from error

    def called(self, node: ast.Call, names: dict[str, Any]) -> Any:
        """Return the value of a call: of base.get_config(), of a preset, or of FUNCTIONS."""
        name = ast.unparse(node.func)
        if not node.args and not node.keywords:
            if name.rpartition(".")[2] == "ConfigDict":
                return Node(Config())
            if name == "base.get_config":
                base = _File(self.file.path.with_name("base.py"), base=True)
                if "get_config" not in base.functions:
                    raise ValueError(f"{base.path} has no get_config()")
                return Node(_Reader(base, self.gpus).call("get_config"))
            if name in self.file.functions:
                return Node(self.call(name))
        if name.rpartition(".")[2] == "ConfigDict" and len(node.args) == 1:
            return self.value(node.args[0], names)
        if name in FUNCTIONS and not node.keywords:
            arguments = [self.value(argument, names) for argument in node.args]
            try:
                return FUNCTIONS[name](*arguments)
            except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
                raise self.refusal(node, f"{ast.unparse(node)!r}: {error}") from error
        raise self.refusal(node, f"{ast.unparse(node)!r}")

    def refusal(self, node: ast.AST, reason: str) -> ValueError:
        """Return the error about code that is not read."""
        line = getattr(node, "lineno", 1)
        return ValueError(
            f"{self.file.path}, line {line}: cannot read {reason}; expected assignments of "
            "numbers, text and simple arithmetic to keys of the config"
        )
