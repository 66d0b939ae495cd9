"""The flag --config, and the check of everything on the command line of a program that has it."""

import ast
import difflib
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from realgen_jax.config import base
from realgen_jax.config_files import DOTS, OWN_REWARD, RENAMED, load_config, missing_keys
from realgen_jax.config_ranges import RANGES, range_of, takes_new_names, wrong_values
from realgen_jax.ranges import Range

NO_CONFIG = "error: no config; name one, such as --config flux_grpo"

flags.disclaim_key_flags()  # --help lists --config under the program that calls define_config


def define_config(
    default: str | None = None,
    template: Callable[[], ConfigDict] = base,
    ranges: Mapping[str, Range] = RANGES,
) -> None:
    """Define the flag --config. Programs that call this pass `parse_flags` to app.run.

    default: the config to use if the command line names none. template: returns a config with all
    keys that the program needs; a config that lacks any of them is rejected. ranges: the allowed
    values of these keys.
    """
    usage = "a config file, or a shipped config by name, with a preset: flux_grpo:flux_dev_8xh200"
    config_flags.register_flag_parser_for_type(tuple, _TupleParser())
    config_flags.DEFINE_config_file("config", None, usage, flag_values=flags.FLAGS)
    flags.FLAGS["config"].parser = _ConfigParser(default, template, ranges)


def parse_flags(argv: list[str], *, words: bool = False) -> list[str]:
    """Parse the flags, check the config's values and return the other arguments.

    words: whether the program takes arguments that are not flags. Exits with one line for each
    problem of the flags or the config.
    """
    if "--help" in argv:
        _show_help()
        sys.exit()

    # Name the default config if the command line names none.
    flag = flags.FLAGS["config"]
    default = flag.parser.default
    given = [argument for argument in argv if re.match(r"--?config(=|$)", argument)]
    if len(given) > 1:
        sys.exit(f"error: --config is given {len(given)} times; name one config")
    if default and not given:
        argv = [argv[0], f"--config={default}", *argv[1:]]

    # Parse.
    try:
        rest = flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        # Flags of the config's keys exist once there is a config.
        sys.exit(NO_CONFIG if error.flagname.startswith("config.") else f"error: {error}")
    except flags.IllegalFlagValueError as error:
        sys.exit(f"error: {_refused_value(str(error), argv, flag.parser.ranges)}")
    except (AttributeError, KeyError) as error:
        sys.exit(f"error: {_unknown_key(argv, flag.parser) or error}")
    except (flags.Error, TypeError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")

    # Check.
    if not words:
        refuse_words(rest)
    if flag.value is None:
        sys.exit(NO_CONFIG)
    problems = _not_finite() + wrong_values(flag.value, flag.parser.ranges)
    if problems:
        sys.exit("error: " + "\n".join(problems))
    return rest


def refuse_words(argv: Sequence[str]) -> None:
    """Exit with one line if the command line has arguments that are not flags."""
    if len(argv) > 1:
        word = argv[1]
        hint = f"; did you mean --{word}?" if word in flags.FLAGS else ""
        sys.exit(f"error: unexpected argument {word!r}; this program takes only flags{hint}")


def _show_help() -> None:
    """Print the program's description and flags.

    absl's own --help finds the flags only if the program is run as a file, not as an installed
    command.
    """
    name = flags.FLAGS.find_module_defining_flag("config")
    module = sys.modules.get(name, sys.modules["__main__"])
    print(module.__doc__)
    print(flags.FLAGS.module_help(name))


def _not_finite() -> list[str]:
    """Return a line for each number that is not finite, of the program's own flags."""
    problems = []
    for name in flags.FLAGS:
        value = flags.FLAGS[name].value
        if "." not in name and isinstance(value, float) and not math.isfinite(value):
            problems.append(f"--{name} is {value}; expected a finite number")
    return problems


def _refused_value(message: str, argv: Sequence[str], ranges: Mapping[str, Range]) -> str:
    """Return what absl's "flag --NAME=VALUE: REASON" says, with the values that are allowed."""
    if DOTS in message:
        return f"{message} {OWN_REWARD}"
    key = message.removeprefix("flag --config.").partition("=")[0]
    allowed = range_of(key, ranges)
    for argument in argv:
        value = argument.removeprefix("-").removeprefix(f"-config.{key}=")
        if allowed is not None and message.startswith(f"flag --config.{key}={value}: "):
            return f"config.{key} is {value!r}; expected {allowed.words}"
    return message


def _unknown_key(argv: Sequence[str], parser: "_ConfigParser") -> str | None:
    """Return a line about the first key on the command line that the config lacks."""
    known = _values(parser.config)
    for argument in argv:
        match = re.match(r"--?(?:no)?config\.([^=]+)=?(.*)", argument, re.DOTALL)
        if not match or match[1] in known:
            continue
        key, value = match.groups()
        if key in RENAMED:
            return f"the config has no key {key}; it is now {RENAMED[key]}"

        # A new name in a mapping: the whole mapping has to be set.
        parent = key.rpartition(".")[0]
        while parent and not isinstance(known.get(parent), ConfigDict):
            parent = parent.rpartition(".")[0]
        names = key.removeprefix(f"{parent}.").split(".")
        if parent == "reward.fn" and len(names) > 1:
            return f"the config has no key {key}. {OWN_REWARD}"
        if takes_new_names(parent, parser.ranges):
            value = _literal(value)
            for name in reversed(names):
                value = f"{{{name!r}: {value}}}"
            return (
                f"the config has no key {key}; to add it, set the whole mapping: "
                f'"--config.{parent}={value}"'
            )

        nearest = difflib.get_close_matches(key, known, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        return f"the config has no key {key}{hint}"
    return None


def _values(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Return {"train": its keys, "train.beta": 0.0, ...} of a config."""
    values = {}
    for name, value in config.items():
        values[prefix + name] = value
        if isinstance(value, ConfigDict):
            values |= _values(value, f"{prefix}{name}.")
    return values


def _literal(text: str) -> str:
    """Return a flag's value as a Python literal."""
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return repr(text)
    return text


class _TupleParser(flags.ArgumentParser):
    """Reads a tuple: "3,5", "a,b", "('a', 'b')", or "" for none.

    A flag that is given twice has its last value. ml_collections' own parser joins the values.
    """

    def parse(self, argument: str | tuple) -> tuple:
        if not isinstance(argument, str):
            return tuple(argument)
        try:
            value = ast.literal_eval(argument)
        except (ValueError, SyntaxError):  # names without quotes
            return tuple(word.strip() for word in argument.split(",") if word.strip())
        return tuple(value) if isinstance(value, tuple | list) else (value,)

    def flag_type(self) -> str:
        return "tuple"


class _ConfigParser(flags.ArgumentParser):
    """Reads the value of --config."""

    def __init__(
        self,
        default: str | None,
        template: Callable[[], ConfigDict],
        ranges: Mapping[str, Range],
    ):
        self.default = default
        self.template = template
        self.ranges = ranges
        self.config = ConfigDict()  # the config that was read last

    def parse(self, argument: str) -> ConfigDict:
        try:
            config = load_config(argument)
            missing = missing_keys(config, self.template())
            if missing:
                source = f"{self.template.__module__}.{self.template.__name__}()"
                raise ValueError(
                    f"{argument} lacks the keys {', '.join(missing)}; start from {source}"
                )
        except (ValueError, OSError) as error:
            raise flags.Error(str(error)) from error
        self.config = config
        return config.lock()

    def flag_type(self) -> str:
        return "config"
