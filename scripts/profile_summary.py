"""Summarise where the time of an epoch goes, from a trace that train.py wrote. No viewer is needed.

    python scripts/profile_summary.py runs/NAME                  the run's last trace
    python scripts/profile_summary.py runs/NAME/profile/step_3   the trace of epoch 3
    python scripts/profile_summary.py FILE.xplane.pb             one file

train.py writes a trace with --config.profile.steps=3. docs/profiling.md explains the tables.
"""

from realgen_jax import process

process.begin(__name__)  # before the imports that take seconds

import argparse
import sys
from pathlib import Path

from realgen_jax.profiling.summary import summary, trace_files


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "trace",
        type=Path,
        help="a run's folder, an epoch's folder (profile/step_3) or an .xplane.pb file",
    )
    parser.add_argument(
        "--top", type=int, default=20, help="number of operations to show (default: 20)"
    )
    parser.add_argument(
        "--depth", type=int, default=2, help="number of scope levels to show (default: 2)"
    )
    args = parser.parse_args()

    try:
        lines = summary(trace_files(args.trace), args.top, args.depth)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
