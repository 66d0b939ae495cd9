"""How fast does the rewriter learn, by the number of rewrites and with or without common noise?

    python benchmarks/rewriter_learning.py [--seeds 0 1 2] [--epochs 120] [--processes 2]

Trains `tiny_rewriter` (configs/embedded.py) with 4, 8 and 16 rewrites of a prompt, of as many
prompts as make 64 rewrites an epoch, on common noise (config.sample.same_latent) and on noise of
their own. Every 20 epochs the likeliest rewrites of the test prompts are drawn on fixed noise: 128
pictures. Prints the first epoch of these whose detector is at GOAL, the last figures, and the
seconds of an epoch; the JSON has all evaluations. `--processes` runs share the machine, so the
seconds compare only with each other.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import measure

REWRITES = (4, 8, 16)
PICTURES = 64  # an epoch
GOAL = 0.4  # P(real) of the detector; at first 0.2
COLUMNS = (
    "reward",
    "embedded_detector",
    "embedded_held_out",
    "embedded_prompt_accuracy",
    "embedded_frechet",
    "text/words",
    "text/kept",
)


def run(folder: Path, epochs: int, case: tuple[int, bool, int]) -> dict[str, Any]:
    """Train one case, (rewrites of a prompt, common noise, seed); return what it recorded."""
    rewrites, common, seed = case
    name = f"{rewrites}-{common}-{seed}"
    command = measure.train_command(
        folder,
        name,
        "tiny_rewriter",
        f"--config.seed={seed}",
        f"--config.num_epochs={epochs}",
        "--config.eval_freq=20",
        f"--config.rewriter.rewrites_per_prompt={rewrites}",
        f"--config.rewriter.prompts_per_epoch={PICTURES // rewrites}",
        f"--config.sample.same_latent={common}",
    )
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    evaluations = [row for row in rows if row["kind"] == "eval"]
    seconds = []
    for row in rows:
        if row["kind"] == "train":
            phases = [row[key] for key in row if key.startswith("seconds/") and key.count("/") == 1]
            seconds.append(sum(phases))
    return {
        "rewrites": rewrites,
        "common_noise": common,
        "seed": seed,
        "seconds_an_epoch": statistics.median(seconds),
        "evaluations": [{key: row[key] for key in ("epoch", *COLUMNS)} for row in evaluations],
    }


def row_of(result: dict[str, Any]) -> list[str]:
    """A line of the table."""
    evaluations = result["evaluations"]
    there = [row["epoch"] for row in evaluations if row["embedded_detector"] >= GOAL]
    noise = "common noise" if result["common_noise"] else "own noise"
    cells = [f"{result['rewrites']} rewrites, {noise}, seed {result['seed']}"]
    cells += [str(there[0]) if there else "-", f"{result['seconds_an_epoch']:.2f}"]
    return cells + [f"{evaluations[0][key]:.3f} -> {evaluations[-1][key]:.3f}" for key in COLUMNS]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()

    cases = [(n, common, s) for s in args.seeds for n in REWRITES for common in (True, False)]
    results = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.processes) as pool:
        for result in pool.map(partial(run, Path(folder), args.epochs), cases):
            results.append(result)
            print("  ".join(row_of(result)), flush=True)

    header = ("", f"epoch at {GOAL}", "seconds an epoch", *COLUMNS)
    measure.print_table(header, [row_of(result) for result in results])
    print(f"written to {measure.save('rewriter_learning', {'runs': results})}")


if __name__ == "__main__":
    main()
