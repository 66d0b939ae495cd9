"""Which objective reaches the demo's reward first, and what does the model look like then?

    python benchmarks/time_to_reward.py [--rows guard nft] [--seeds 0 1 2] [--epochs 46]

Trains the embedded FLUX (configs/embedded.py) with each objective, from the same start, until an
evaluation on the test prompts (128 pictures on fixed noise, 10 Euler steps) has

    detector >= 0.46,  prompt accuracy >= 0.99,  Fréchet distance <= that of the start.

The seconds are those of sampling, scoring and updates up to there. Evaluations are not counted, and
neither is compilation: the first epoch counts as the median of the others. Pictures are those that
were trained on, without the previews of `scout`.

The rows of a seed run one after the other, then the next seed's; nothing else should run on the
machine. Learning rates and the like were chosen on seed 0; benchmarks/NOTES.md says what was tried.

    python benchmarks/time_to_reward.py --correlations

Do cheaper pictures rank as the full ones do? Samples 16 pictures of each test prompt at 64 pixels
and 10 steps, and again from the same noise with fewer steps or pixels (a smaller picture starts
from the upper left part of the noise). Prints the rank correlation of each detector's scores over
the pictures of a prompt, averaged over prompts, and over the prompts' means.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import measure
import numpy as np
import torch
from scipy.stats import spearmanr

from realgen_configs import embedded
from realgen_jax.data import read_prompts
from realgen_jax.models.loading import load_model, with_size
from realgen_jax.models.model import Model
from realgen_jax.models.prompts import embed_prompts
from realgen_jax.rollout import numbered_latents, sample
from realgen_jax.sde import ode_steps
from realgen_jax.sharding import make_mesh
from reward_bridge.rewards import make_reward

ENCODE = (sys.executable, str(measure.ROOT / "scripts" / "encode_prompts.py"))
DETECTOR = "embedded_detector"
DETECTOR_GOAL = 0.46
ACCURACY_GOAL = 0.99

NFT = (
    "--config.train.loss=nft",
    "--config.train.learning_rate=3e-3",
    "--config.train.beta=0.05",
    "--config.train.nft.mix=0.3",
    "--config.train.nft.sigmas=2",
    "--config.train.nft.fraction=1.0",
)
GRPO = ("--config.train.loss=grpo", "--config.train.clip_range=1e-4")
# Row -> preset of configs/embedded.py, and what the row sets on top of it.
ROWS: dict[str, tuple[str, Sequence[str]]] = {
    "guard": ("tiny", ()),
    "awm": ("tiny_awm", ()),
    "nft": ("tiny", NFT),
    "nft, cached steps": ("tiny", (*NFT, "--config.sample.cached_steps=1")),
    "nft, scout": ("tiny", (*NFT, "--config.sample.scout.previews=32")),
    "grpo": ("tiny", GRPO),
    "dppo": ("tiny", ("--config.train.loss=dppo",)),
    "mix": (
        "tiny",
        (
            *GRPO,
            "--config.train.advantages=mixgrpo",
            "--config.sample.sde_window.strategy=progressive",
            "--config.sample.sde_window.epochs=2",
        ),
    ),
}
BENCHMARK = "time_to_reward"
EVALUATED = 2  # epochs from one evaluation to the next
# The columns that describe the model when the goal is reached.
QUALITIES = (
    DETECTOR,
    "embedded_held_out",
    "embedded_prompt_accuracy",
    "embedded_frechet",
    "clip_score",
    "prompt_std",
)


def reached(start: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether an evaluation meets the goal. start: the first evaluation."""
    return (
        row[DETECTOR] >= DETECTOR_GOAL
        and row["embedded_prompt_accuracy"] >= ACCURACY_GOAL
        and row["embedded_frechet"] <= start["embedded_frechet"]
    )


def read(file: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the whole lines of a run's metrics so far: those of epochs, and of evaluations."""
    text = file.read_text() if file.exists() else ""
    rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    epochs = [row for row in rows if row["kind"] == "train"]
    evaluations = [row for row in rows if row["kind"] == "eval"]
    return epochs, evaluations


def run(folder: Path, name: str, preset: str, options: Sequence[str]) -> Path:
    """Train until the goal is reached or the run ends; return the file of its metrics.

    Raises RuntimeError if the run fails.
    """
    watched = '--config.reward.watched=("diversity",)'
    command = measure.train_command(folder, name, preset, watched, *options)
    file = folder / name / "metrics.jsonl"
    with (folder / f"{name}.log").open("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        met = False
        while process.poll() is None:
            time.sleep(0.5)
            _, evaluations = read(file)
            if evaluations and reached(evaluations[0], evaluations[-1]):
                met = True
                process.terminate()
                process.wait()
        if process.returncode and not met:
            output.seek(0)
            raise RuntimeError(f"{name} failed:\n{output.read()[-2000:]}")
    return file


def summarize(file: Path) -> dict[str, Any]:
    """Return what a run took to reach the goal, or the whole run if it did not ("reached")."""
    epochs, evaluations = read(file)
    start = evaluations[0]
    last = evaluations[-1]
    met = [row["epoch"] for row in evaluations if reached(start, row)]
    count = met[0] if met else last["epoch"]

    # Phases of the loop; the scores of one call are computed while the next one is sampled.
    phases = sorted({key for row in epochs for key in row if key.startswith("seconds/")})
    phases = [key for key in phases if not key.startswith("seconds/scoring/")]
    by_phase = {}
    for phase in phases:
        values = [row.get(phase, 0.0) for row in epochs[:count]]
        by_phase[phase.removeprefix("seconds/")] = sum(values[1:]) + statistics.median(values[1:])
    at_end = next(row for row in evaluations if row["epoch"] == count)
    qualities = {name: (start[name], at_end[name]) for name in QUALITIES}
    diversity = [row["diversity"] for row in epochs[:count]]
    sample = json.loads(file.with_name("config.json").read_text())["sample"]
    return {
        "reached": bool(met),
        "epochs": count,
        "pictures": count * sample["num_batches_per_epoch"] * sample["train_batch_size"],
        "seconds": sum(by_phase.values()),
        "by_phase": by_phase,
        "qualities": qualities,
        "diversity": (statistics.mean(diversity[:2]), statistics.mean(diversity[-2:])),
    }


def row_of(name: str, result: dict[str, Any]) -> list[str]:
    """A line of the table."""
    cells = [name]
    cells.append(f"{result['seconds']:.1f}" if result["reached"] else "not reached")
    cells += [str(result["epochs"]), str(result["pictures"])]
    phases = result["by_phase"]
    cells.append(" + ".join(f"{phases[phase]:.1f}" for phase in phases))
    for start, end in (*result["qualities"].values(), result["diversity"]):
        cells.append(f"{start:.3f} -> {end:.3f}")
    return cells


def print_correlations() -> None:
    """Print and save the rank correlations of cheaper pictures."""
    results = correlations()
    rows = []
    for detector, settings in results.items():
        for name, (within, over) in settings.items():
            rows.append([f"{detector}, {name}", f"{within:.2f}", f"{over:.2f}"])
    measure.print_table(("rank correlation", "within a prompt", "over prompts"), rows)
    print(f"written to {measure.save('rank_correlations', {'rows': results})}")


# -- Rank correlations of cheaper pictures

DETECTORS = (DETECTOR, "embedded_held_out")
FULL = (64, 10)  # pixels, steps
CHEAPER = ((64, 8), (64, 6), (64, 4), (48, 10), (32, 10), (48, 4))
COPIES = 16


def correlations() -> dict[str, dict[str, tuple[float, float]]]:
    """Return {detector: {"48 px, 4 steps": (within a prompt, over prompts)}}."""
    config = embedded.tiny()
    prompts = read_prompts(config.prompts.test)
    cache = embed_prompts(prompts, config.pretrained, config.prompts, ENCODE)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    side, _ = FULL
    model = load_model(config.pretrained, (side, side), mesh)
    scores = {
        (pixels, steps): scores_at(config, model, cache, prompts, pixels, steps)
        for pixels, steps in (FULL, *CHEAPER)
    }

    results: dict[str, dict[str, tuple[float, float]]] = {}
    for detector in DETECTORS:
        full = scores[FULL][detector]
        results[detector] = {}
        for pixels, steps in CHEAPER:
            cheap = scores[pixels, steps][detector]
            within = [spearmanr(*rows)[0] for rows in zip(full, cheap, strict=True)]
            over = spearmanr(full.mean(axis=1), cheap.mean(axis=1))[0]
            name = f"{pixels} px, {steps} steps"
            results[detector][name] = (float(np.mean(within)), float(over))
    return results


def scores_at(
    config: Any, model: Model, cache: Any, prompts: Sequence[str], pixels: int, steps: int
) -> dict[str, np.ndarray]:
    """Return {detector: [prompts, COPIES]} of pictures at this size, with this many Euler steps."""
    small = with_size(model, config.pretrained, (pixels, pixels), "config.sample")

    @jax.jit
    def draw(cond: Any, numbers: jax.Array) -> jax.Array:
        noise = numbered_latents(jax.random.key(0), numbers, model.token_shape)
        grid = noise.reshape(-1, model.height, model.width, noise.shape[-1])
        latents = grid[:, : small.height, : small.width].reshape(-1, *small.token_shape)
        velocity = partial(small.velocity, None)
        return small.decode(sample(velocity, cond, latents, ode_steps(small.sigmas(steps))))

    rewards = {name: make_reward(name, "cpu", {}) for name in DETECTORS}
    scores: dict[str, list[np.ndarray]] = {name: [] for name in DETECTORS}
    for number, prompt in enumerate(prompts):
        texts = [prompt] * COPIES
        cond = small.cond(cache, texts, config.evaluate.sample.guidance_scale)
        pictures = np.asarray(draw(cond, number * COPIES + np.arange(COPIES)))
        for name, reward in rewards.items():
            scores[name].append(np.asarray(reward(torch.from_numpy(pictures.copy()), texts)))
    return {name: np.stack(rows) for name, rows in scores.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", choices=ROWS, nargs="+", default=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=46, help="give up after this many")
    parser.add_argument("--correlations", action="store_true", help="nothing is trained")
    args = parser.parse_args()
    if args.correlations:
        print_correlations()
        return

    results: dict[str, dict[str, Any]] = {name: {} for name in args.rows}
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            for name in args.rows:
                preset, own = ROWS[name]
                options = (
                    f"--config.num_epochs={args.epochs}",
                    f"--config.seed={seed}",
                    f"--config.eval_freq={EVALUATED}",
                    *own,
                )
                file = run(Path(folder), f"{name.replace(', ', '-')}-{seed}", preset, options)
                result = summarize(file)
                results[name][str(seed)] = result
                table.append(row_of(f"{name}, seed {seed}", result))
                print("  ".join(table[-1]), flush=True)

    header = ("", "seconds", "epochs", "pictures", "by phase", *QUALITIES, "diversity")
    measure.print_table(header, table)
    # Rows that were measured before, and not now, are kept.
    file = measure.RESULTS / measure.file_name(BENCHMARK)
    rows = json.loads(file.read_text())["rows"] if file.exists() else {}
    for name in args.rows:
        preset, options = ROWS[name]
        rows[name] = {"preset": preset, "options": list(options), "seeds": results[name]}
    print(f"written to {measure.save(BENCHMARK, {'rows': rows})}")


if __name__ == "__main__":
    main()
