"""Run a recorded recipe again and compare every row of its log.

    python scripts/reproduce.py examples/embedded/demo
    python scripts/reproduce.py examples/embedded/demo --run runs/NAME      a run that is finished
    python scripts/reproduce.py examples/embedded/demo --record runs/NAME   replaces the record

The folder has a recipe.json with the config's name, the options of train.py and the figures to
compare. The exit status is 0 if the run reproduces the recorded one, 1 if it does not.
examples/README.md says what is compared, and how to record a run of your own.
"""

from realgen_jax import process

process.begin(__name__)  # before the imports that take seconds

import argparse
import json
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import jax

from realgen_jax.nn.tensors import read_json
from realgen_jax.reproduction import compare, evaluations, figure, read_rows, this_machine

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("digests.json", "metrics.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the recorded recipe")
    parser.add_argument("--run", type=Path, help="compare this run instead of a new one")
    parser.add_argument(
        "--record", type=Path, metavar="RUN", help="record this run, of this machine"
    )
    parser.add_argument("--seeds", type=Path, nargs="+", default=[], help="other seeds, to record")
    parser.add_argument("--no-lora", action="store_true", help="do not record what was trained")
    args = parser.parse_args()
    try:
        if args.record:
            record(args.folder, args.record, args.seeds, lora=not args.no_lora)
            return
        run = args.run or train(args.folder)
        outcome = compare(args.folder, run, this_machine(kinds()))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    word = "reproduces" if outcome.equal else "does NOT reproduce"
    print(*outcome.lines, f"{run} {word} {args.folder}", sep="\n")
    sys.exit(0 if outcome.equal else 1)


def kinds() -> list[str]:
    """Return the kind of each device."""
    return [device.device_kind for device in jax.devices()]


def train(folder: Path) -> Path:
    """Train by the recipe, without the report; return the run's folder."""
    recipe = read_json(folder / "recipe.json")
    run = Path("runs") / f"reproduce-{folder.name}-{datetime.now():%Y%m%d-%H%M%S}"
    command = [sys.executable, ROOT / "scripts" / "train.py", "--config", recipe["config"]]
    command += [*recipe["options"], "--config.evaluate.after_training=False"]
    command += [f"--config.run_root={run.parent}", f"--config.run_name={run.name}"]
    done = subprocess.run([str(word) for word in command])
    if done.returncode:
        sys.exit(done.returncode)
    return run


def record(folder: Path, run: Path, seeds: list[Path], lora: bool) -> None:
    """Copy a finished run into the folder of its recipe."""
    recipe = read_json(folder / "recipe.json")
    ends = [last_evaluation(path) for path in (run, *seeds)]
    for column in recipe["figures"]:
        recipe["figures"][column] = [figure(end, column) for end in ends]

    for name in COPIED:
        shutil.copyfile(run / name, folder / name)
    if lora:
        shutil.copytree(run / "lora", folder / "lora", dirs_exist_ok=True)
    if (run / "report" / "report.md").exists():
        text = (run / "report" / "report.md").read_text().replace(str(run.parent), "runs")
        (folder / "report.md").write_text(text)

    # File names relative to the repository.
    config = (run / "config.json").read_text().replace(f"{ROOT}/", "")
    config = json.loads(config) | {"run_root": "runs"}
    machine = this_machine(kinds())
    for name, value in (("config", config), ("machine", machine), ("recipe", recipe)):
        (folder / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")


def last_evaluation(run: Path) -> dict:
    """Return the row of a run's last evaluation. Raises ValueError if the run has not ended."""
    row = evaluations(read_rows(run / "metrics.jsonl"))[-1]
    epochs = read_json(run / "config.json")["num_epochs"]
    if row["epoch"] != epochs:
        raise ValueError(f"{run} has not ended: evaluated at epoch {row['epoch']} of {epochs}")
    return dict(row)


if __name__ == "__main__":
    main()
