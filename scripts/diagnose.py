"""Explain why a run's reward does or does not rise.

    python scripts/diagnose.py runs/NAME             as text
    python scripts/diagnose.py runs/NAME --json      as JSON

Reads config.json and metrics.jsonl of the run, also while it is still running. Loads neither JAX
nor PyTorch. The exit status is 0 if the run is healthy (notes are allowed), 1 if there are problems
and 2 if the run cannot be judged. docs/diagnosis.md lists the checks.
"""

from realgen_jax import process

process.begin(__name__)  # before the imports that take seconds

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from realgen_jax.diagnosis.diagnose import diagnose
from realgen_jax.diagnosis.finding import PROBLEM
from realgen_jax.diagnosis.metrics import NotRecorded
from realgen_jax.diagnosis.render import show
from realgen_jax.training.progress import plain_console


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the run's folder, runs/NAME")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()

    try:
        answer = diagnose(args.run)
    except NotRecorded as error:
        fail(f"{args.run} has no values of {error}; expected the metrics of train.py")
    except KeyError as error:
        fail(f"{args.run} has no key {error} in config.json or metrics.jsonl; expected train.py's")
    except ValueError as error:
        fail(str(error))

    if args.json:
        print(json.dumps(asdict(answer), indent=2))
    else:
        show(answer, plain_console())
    sys.exit(1 if answer.of(PROBLEM) else 0)


def fail(message: str) -> NoReturn:
    """Print an error and exit with status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
