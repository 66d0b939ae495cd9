"""Convert a config of Flow-GRPO or RealGen into a config file of ours.

    python -m realgen_jax.convert_config config/grpo.py:pickscore_flux_fast
    python -m realgen_jax.convert_config FILE:PRESET --gpus 8 --out own.py
    python -m realgen_jax.convert_config --table     the keys, as in docs/from_elsewhere.md

FILE is read, not executed; base.py must be beside it. Prints what differs, what is left out and
why; the written file has the same list.
"""

from realgen_jax import process

process.begin(__name__)  # before the imports that take seconds

import argparse
import sys
from pathlib import Path

from realgen_jax.convert_config.conversion import Conversion, convert
from realgen_jax.convert_config.page import tables
from realgen_jax.convert_config.reading import preset_names, read_config
from realgen_jax.convert_config.writing import file_text, listing


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m realgen_jax.convert_config",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", nargs="?", help="FILE:PRESET, their config file and its function")
    parser.add_argument("--gpus", type=int, help="GPUs that train; default: the file's gpu_number")
    parser.add_argument("--out", type=Path, help="the file to write; default: PRESET.py")
    parser.add_argument("--table", action="store_true", help="print the table of keys")
    args = parser.parse_args()
    if args.table:
        print(tables())
        return
    if not args.file:
        parser.error("name a file: FILE:PRESET")

    try:
        out, conversion = write(args.file, args.gpus, args.out)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except RecursionError:
        sys.exit(f"error: {args.file}: expressions are nested too deeply")
    print(f"wrote {out}", *listing(conversion), sep="\n")


def write(argument: str, gpus: int | None, out: Path | None) -> tuple[Path, Conversion]:
    """Write our config of "FILE:PRESET"; return its path and the conversion."""
    if gpus is not None and gpus < 1:
        raise ValueError(f"--gpus is {gpus}; expected 1 or more")
    name, _, preset = argument.partition(":")
    file = Path(name)
    presets = preset_names(file)
    if not preset:
        if presets != ["get_config"]:
            raise ValueError(f"{file} has presets; name one, {file}:NAME: {', '.join(presets)}")
        preset = "get_config"

    theirs = read_config(file, preset, gpus)
    try:
        conversion = convert(theirs)
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from error
    out = out or Path(f"{preset}.py")
    if out.exists():
        raise ValueError(f"{out} exists; name another file with --out")
    out.write_text(file_text(conversion, file.name, preset))
    return out, conversion


if __name__ == "__main__":
    main()
