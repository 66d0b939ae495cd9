"""Does a detector that learns end better than a frozen one? The embedded model, both from the same start, over seeds.

    python benchmarks/adversarial.py [--seeds 0 1 2] [--epochs N]

Runs configs/flux_grpo.py:tiny_adversarial twice a seed, with its detector learning and with it frozen, and tabulates
the evaluations on fixed noise, first and last: the Fréchet distance to fresh crops of the photographs and to crops of
squares that nothing has seen, prompt accuracy, the CLIP score, and a detector that neither run trains. 4 minutes a seed
on 2 cores.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import measure

ROOT = Path(__file__).resolve().parent.parent
CHECKS = (
    "embedded_frechet",
    "embedded_frechet_held_out",
    "embedded_prompt_accuracy",
    "clip_score",
    "embedded_held_out",
)


def run(folder: Path, name: str, *words: str) -> list[dict[str, float]]:
    """A run's evaluations, first to last."""
    config = f"{ROOT}/configs/flux_grpo.py:tiny_adversarial"
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--config", config]
    command += [
        f"--config.run_root={folder}",
        f"--config.run_name={name}",
        "--config.evaluate.after_training=False",
    ]
    subprocess.run([*command, *words], check=True, stdout=subprocess.DEVNULL)
    rows = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == "eval"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="default: the preset's")
    words = parser.parse_args()
    more = [f"--config.num_epochs={words.epochs}"] if words.epochs else []
    found, rows = {}, []
    kinds = {"learning": [], "frozen": ["--config.reward.adversarial={}"]}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        for seed in words.seeds:
            started = {}
            for kind, own in kinds.items():
                changes = [f"--config.seed={seed}", *more, *own]
                started[kind] = pool.submit(run, Path(folder), f"{kind}-{seed}", *changes)
            for kind, one in started.items():
                evals = one.result()
                found[f"{kind}-{seed}"] = [
                    {key: row[key] for key in ("epoch", *CHECKS)} for row in evals
                ]
                rows.append(
                    [
                        f"seed {seed}, {kind}",
                        *(f"{evals[0][c]:.3f} -> {evals[-1][c]:.3f}" for c in CHECKS),
                    ]
                )
                print("  ".join(rows[-1]), flush=True)
    measure.print_table(("", *CHECKS), rows)
    print(measure.save("adversarial", {"evaluations": found}))


if __name__ == "__main__":
    main()
