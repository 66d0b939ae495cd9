"""Evaluations within a run: test prompts on fixed noise, checks beside the reward, what is shown and kept of them."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from realgen_jax.files import whole_folder
from realgen_jax.hosts import fetch, process_index, put, sum_over_processes
from realgen_jax.models.flux.family import Pipeline
from realgen_jax.nn.convert import save_transformer
from realgen_jax.nn.lora import save_lora
from realgen_jax.sharding import batch_sharding
from realgen_jax.training.log import RunLog, short_name
from realgen_jax.training.programs import Programs
from realgen_jax.training.run import Run
from realgen_jax.training.scoring import scores_of_all, submit, weighted_mean

EVAL = 0  # a stream of the run's root key, beside set_up.INIT and train.TRAIN


@dataclass(frozen=True)
class Evaluation:
    """Test prompts on noise that is fixed per picture."""

    prompts: list[str]
    pictures: np.ndarray  # uint8 [n, 3, H, W]
    scores: dict[
        str, np.ndarray
    ]  # float32 [n] by reward, held-out ones too; "reward" is the trained ones' mean
    means: dict[str, float]  # of the scores, of their spread within a prompt, and the metrics
    correlation: dict[str, float]  # of each held-out reward with the trained one, over pictures
    details: dict[str, float]  # what metrics.jsonl has besides


def evaluate(run: Run, programs: Programs, trainable: Any) -> Evaluation:
    """The last call is filled up with prompts from the front; what is over is neither kept nor counted."""
    sample, reward = run.config.sample, run.config.reward
    copies = sample.test_images_per_prompt
    prompts = [prompt for prompt in run.test_prompts for _ in range(copies)]
    images, pending = [], []
    for start in range(0, len(prompts), sample.test_batch_size):
        ids = np.arange(start, start + sample.test_batch_size, dtype=np.int32)
        texts = [prompts[i % len(prompts)] for i in ids]
        ids = put(ids, batch_sharding(run.pipe.mesh))
        images.append(programs.evaluate(trainable, run.cond(texts), run.key(EVAL), ids))
        pending.append(submit(run, images[-1], texts))
    pictures = [fetch(i) for i in images]
    rows = pending[-1][1]
    rows = rows[
        : max(1, len(rows) // 2)
    ]  # once more, in other company: a reward is to judge a picture by itself
    second = run.bridge.submit(jnp.asarray(pictures[-1][rows]), [texts[i] for i in rows])
    scores, again = scores_of_all(pending, len(texts)), scores_of_all([(second, rows)], len(texts))
    twice = sum_over_processes(np.isin(np.arange(len(texts)), rows).astype(np.int32)) > 0
    change = {name: (scores[name][-len(texts) :] - again[name])[twice] for name in again}
    noise = {f"noise/{name}": np.sqrt(np.mean(values**2) / 2) for name, values in change.items()}
    scores = {name: values[: len(prompts)] for name, values in scores.items()}
    pictures = np.concatenate(pictures)[: len(prompts)]
    scores["reward"] = weighted_mean(scores, reward.fn)
    means = {name: float(values.mean()) for name, values in scores.items()}
    means["prompt_std"] = float(scores["reward"].reshape(-1, copies).std(axis=1).mean())
    means |= {name: metric(pictures) for name, metric in run.metrics.items()}
    std = {name: values.std() for name, values in scores.items()}
    correlation = {
        name: float(np.corrcoef(scores[name], scores["reward"])[0, 1])
        for name in reward.held_out
        if std[name] > 0 and std["reward"] > 0
    }
    details = {f"std/{name}": value for name, value in std.items()} | noise
    details |= {f"correlation/{name}": value for name, value in correlation.items()}
    return Evaluation(prompts, pictures, scores, means, correlation, details)


def drift(start: Mapping[str, float], now: Mapping[str, float], reward: ConfigDict) -> list[str]:
    """What got worse since the start while the reward rose: signs that the reward is being hacked."""
    if now["reward"] <= start["reward"]:
        return []
    worse = [n for n in reward.held_out if now[n] < start[n] - 0.02]
    worse += [n for n in reward.metrics if now[n] > 1.05 * start[n]]
    worse += ["prompt_std"] if now["prompt_std"] < 0.25 * start["prompt_std"] else []
    return [f"{name} {start[name]:.3f} -> {now[name]:.3f}" for name in worse]


def fallen(peaks: dict[str, dict], now: Mapping[str, float], reward: ConfigDict) -> list[str]:
    """Held-out rewards that lay `stop_drop` below their best for `stop_patience` evaluations in a row, while the
    trained reward was above what it was at that best: the detectors are being fooled, and the run ends. `peaks` is
    what it remembers from one evaluation to the next.
    """
    found = []
    for name in reward.held_out:
        if name not in peaks or now[name] > peaks[name]["best"]:
            peaks[name] = {"best": now[name], "reward": now["reward"], "falls": 0}
        peak = peaks[name]
        low = now[name] < peak["best"] - reward.stop_drop and now["reward"] > peak["reward"]
        peak["falls"] = peak["falls"] + 1 if low else 0
        if 0 < reward.stop_patience <= peak["falls"]:
            found.append(
                f"{name} fell from {peak['best']:.4g} to {now[name]:.4g} while the reward rose from "
                f"{peak['reward']:.4g} to {now['reward']:.4g}"
            )
    return found


def export(folder: Path, pipe: Pipeline, trainable: Any) -> Path:
    """A LoRA file that diffusers loads, or the whole transformer as a diffusers folder, in place of an older one.

    All processes must call it; the first one writes.
    """
    writes = process_index() == 0
    with whole_folder(folder) if writes else nullcontext(folder) as part:
        if pipe.lora is None:
            save_transformer(part / "transformer", pipe.model, trainable)
        elif writes:
            save_lora(part / "pytorch_lora_weights.safetensors", trainable, pipe.lora)
    return folder


@partial(jax.profiler.annotate_function, name="evaluate")
def report(
    run: Run, programs: Programs, log: RunLog, epoch: int, trainable: Any, history: dict[str, Any]
) -> list[str]:
    """Evaluate, and show it: figures, pictures, a warning where checks fall while the reward rises. Keep the best.

    Returns why the run must end here, if it must.
    """
    config, reward = run.config, run.config.reward
    found = evaluate(run, programs, trainable)
    log.metrics("eval", epoch, found.means | found.details)
    reasons = fallen(history.setdefault("peaks", {}), found.means, reward)
    shown = np.arange(0, len(found.prompts), config.sample.test_images_per_prompt)[
        :16
    ]  # a prompt's first picture

    def captions(of: Mapping[str, np.ndarray], label: str) -> list[str]:
        figures = [
            ", ".join(f"{short_name(n)} {of[n][k]:.2f}" for n in reward.fn)
            for k in range(len(shown))
        ]
        return [
            label.format(found.prompts[i]) + text for i, text in zip(shown, figures, strict=True)
        ]

    now, pictures = {name: found.scores[name][shown] for name in reward.fn}, found.pictures[shown]
    log.pictures(f"epoch_{epoch:06}", epoch, [pictures], [captions(now, "{}\n")])
    first = run.folder / "samples" / "start.npz"
    if "start" not in history:
        history["start"] = found.means
        if process_index() == 0:
            np.savez(first, pictures=pictures, **now)
    elif epoch == config.num_epochs or reasons:
        with np.load(first) as start:
            rows, texts = (
                (start["pictures"], pictures),
                (captions(start, "{}\nbefore: "), captions(now, "after: ")),
            )
            log.say(
                f"before and after, from the same noise: {log.pictures('before_after', epoch, rows, texts)}"
            )
    if epoch and ("best" not in history or found.means["reward"] > history["best"]["reward"]):
        history["best"] = {"epoch": epoch, **found.means}
        export(run.folder / "best", run.pipe, trainable)
    worse = drift(history["start"], found.means, reward)
    log.evaluation(
        epoch, history["start"], found.means, ["reward", *reward.fn], found.correlation, worse
    )
    return reasons
