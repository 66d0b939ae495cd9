"""Evaluations within a run: test prompts on fixed noise, and checks that are not trained on."""

import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from realgen_jax.advantages import trained_weights
from realgen_jax.files import whole_folder, write_whole
from realgen_jax.hosts import fetch, process_index, put, sum_over_processes
from realgen_jax.sharding import batch_sharding, to_device
from realgen_jax.training.log import NoLog, RunLog, short_name
from realgen_jax.training.monitor import REWARD, is_better
from realgen_jax.training.run import EVALUATION, Run
from realgen_jax.training.scoring import PendingBatch, scores_of_all, submit, weighted_mean
from realgen_jax.training.stage import Drawn, Stage

SHOWN = 16  # number of prompts whose first picture is in the grids
START_FILE = Path("samples", "start.npz")  # the first evaluation's pictures, in the run's folder


@dataclass(frozen=True)
class Evaluation:
    """Pictures of the test prompts, each on its own fixed noise, and their scores.

    drawn: what was drawn; the prompts, unless they are rewritten. pictures: uint8 [n, 3, H, W].
    scores: {reward: float32 [n]} for the prompts, including held-out rewards;
    "reward" is the weighted mean of the trained rewards. means: of the scores, plus the metrics and
    "prompt_std", the spread within a prompt (of the monitored reward, or of "reward" if a metric is
    monitored; absent with one picture per prompt). correlation: of each held-out reward with the
    trained reward, over pictures. details: further values for metrics.jsonl.
    """

    prompts: list[str]
    drawn: Drawn
    pictures: np.ndarray
    scores: dict[str, np.ndarray]
    means: dict[str, float]
    correlation: dict[str, float]
    details: dict[str, float]


def evaluate(run: Run, stage: Stage, trainable: Any) -> Evaluation:
    """Sample and score the test prompts."""
    reward = run.config.reward
    copies = run.config.sample.test_images_per_prompt
    prompts = [prompt for prompt in run.test_prompts for _ in range(copies)]
    drawn = stage.draw(trainable, prompts)
    pictures, scores, noise = _sample_and_score(run, stage, drawn, prompts)
    scores |= drawn.scores
    scores["reward"] = weighted_mean(scores, trained_weights(run.config))

    # Means of the scores and of their spread within a prompt, and the checks on the whole set.
    means = {name: float(values.mean()) for name, values in scores.items()}
    if copies > 1:
        judge = run.monitor if run.monitor in scores else REWARD
        spread = scores[judge].reshape(-1, copies).std(axis=1)
        means["prompt_std"] = float(spread.mean())
    for name, metric in run.metrics.items():
        means[name] = metric(pictures)

    # Correlations, where both sides vary.
    std = {name: values.std() for name, values in scores.items()}
    correlation = {}
    for name in reward.held_out:
        if std[name] > 0 and std["reward"] > 0:
            correlation[name] = float(np.corrcoef(scores[name], scores["reward"])[0, 1])

    details = {}
    if len(prompts) > 1:
        details |= {f"std/{name}": value for name, value in std.items()}
    details |= {f"noise/{name}": value for name, value in noise.items()}
    details |= {f"correlation/{name}": value for name, value in correlation.items()}
    details |= drawn.details
    return Evaluation(prompts, drawn, pictures, scores, means, correlation, details)


def _sample_and_score(
    run: Run, stage: Stage, drawn: Drawn, prompts: Sequence[str]
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, float]]:
    """Return pictures uint8 [n, 3, H, W], {reward: float32 [n]}, and the noise of each reward.

    The last call is padded with prompts from the start; the surplus pictures are dropped.
    """
    batch_size = run.config.sample.test_batch_size
    copies = run.config.sample.test_images_per_prompt
    reward = run.config.reward
    names = list(dict.fromkeys([*reward.fn, *reward.held_out]))
    guidance = run.config.evaluate.sample.guidance_scale
    scored = [prompt for prompt in run.scored_test_prompts for _ in range(copies)]
    images = []
    batches = []
    for start in range(0, len(prompts), batch_size):
        numbers = np.arange(start, start + batch_size, dtype=np.int32)
        rows = numbers % len(prompts)
        asked = [scored[row] for row in rows]
        ids = put(numbers, batch_sharding(run.evaluated.mesh))
        cond = run.cond([drawn.texts[row] for row in rows], guidance, drawn.cache)
        key = run.key(EVALUATION)
        images.append(stage.evaluate(run.evaluated, drawn.trainable, cond, key, ids))
        batches.append(submit(run.scorer, images[-1], asked, names, group=copies))
    pictures = [fetch(array) for array in images]

    # Score half of the last batch again in a different batch: a picture's reward should not depend
    # on the rest of its batch. If the batch is whole groups of a prompt, so is the half.
    rows = batches[-1].rows
    unit = copies if len(rows) % copies == 0 else 1
    rows = rows[: max(1, len(rows) // (2 * unit)) * unit]
    again = [asked[row] for row in rows]
    half = run.scorer.submit(jnp.asarray(pictures[-1][rows]), again, names, group=copies)
    scores = scores_of_all(batches, batch_size).rewards
    again = scores_of_all([PendingBatch(half, rows)], batch_size).rewards

    scored_twice = sum_over_processes(np.isin(np.arange(batch_size), rows).astype(np.int32)) > 0
    noise = {}
    for name, values in again.items():
        change = (scores[name][-batch_size:] - values)[scored_twice]
        noise[name] = np.sqrt(np.mean(change**2) / 2)

    scores = {name: values[: len(prompts)] for name, values in scores.items()}
    return np.concatenate(pictures)[: len(prompts)], scores, noise


def drift(
    start: Mapping[str, float], now: Mapping[str, float], reward: ConfigDict, monitor: str
) -> list[str]:
    """Return the checks that got worse since the start: signs of reward hacking.

    monitor: what judges the run. If it is the trained reward, checks only count while that rises.
    """
    if monitor == REWARD and now[REWARD] <= start[REWARD]:
        return []
    known = start.keys() & now.keys()
    worse = [name for name in reward.held_out if name in known and now[name] < start[name] - 0.02]
    worse += [name for name in reward.metrics if name in known and now[name] > 1.05 * start[name]]
    has_spread = "prompt_std" in known and monitor not in reward.metrics
    if has_spread and now["prompt_std"] < 0.25 * start["prompt_std"]:
        worse.append("prompt_std")
    return [f"{name} {start[name]:.3f} -> {now[name]:.3f}" for name in worse]


def fallen(
    peaks: dict[str, dict], now: Mapping[str, float], reward: ConfigDict, monitor: str
) -> list[str]:
    """Return one line for each check because of which the run must end.

    The checks are the held-out rewards, and the metric that is monitored. One is listed if it was
    `stop_drop` worse than its best for `stop_patience` evaluations in a row. If the run is judged
    by the trained reward, only evaluations count in which that was above its value at the check's
    best. `peaks` is the state kept between evaluations.
    """
    metric = [monitor] if monitor in reward.metrics else []
    reasons = []
    for name in [*reward.held_out, *metric]:
        if name not in peaks or is_better(name, now[name], peaks[name]["best"], reward):
            peaks[name] = {"best": now[name], "reward": now[REWARD], "falls": 0}
        peak = peaks[name]
        low = abs(now[name] - peak["best"]) > reward.stop_drop
        low = low and (monitor != REWARD or now[REWARD] > peak["reward"])
        peak["falls"] = peak["falls"] + 1 if low else 0
        if 0 < reward.stop_patience <= peak["falls"]:
            change = "rose" if metric == [name] else "fell"
            reason = f"{name} {change} from {peak['best']:.4g} to {now[name]:.4g}"
            if monitor == REWARD:
                reason += f" while the reward rose from {peak['reward']:.4g} to {now[REWARD]:.4g}"
            reasons.append(reason)
    return reasons


def say_what_judges(run: Run, log: RunLog | NoLog) -> None:
    """Say what `best/`, alarms and the early stop go by, and which metrics are left out."""
    reward = run.config.reward
    pictures = len(run.test_prompts) * run.config.sample.test_images_per_prompt
    for name in reward.metrics:
        if name not in run.metrics:
            log.warn(
                f"{name} is left out: it needs more pictures than an evaluation has, {pictures} "
                "(config.prompts.test, config.sample.test_images_per_prompt)"
            )

    learning = ", ".join(reward.adversarial)
    reason = f", since {learning} learns" if learning and run.monitor != REWARD else ""
    log.say(f"best/, alarms and the early stop go by {run.monitor}{reason} (config.reward.monitor)")
    if learning and run.monitor == REWARD:
        log.warn(
            f"{learning} learns, so this reward is not comparable over time, and neither are best/ "
            "and the alarms: name a check in config.reward.held_out, such as "
            f"{next(iter(reward.adversarial))}_at_start, or in config.reward.metrics"
        )


def export(folder: Path, stage: Stage, trainable: Any) -> Path:
    """Write the trained weights, replacing older ones.

    All processes must call this; the first one writes.
    """
    if process_index():
        stage.export(folder, trainable)
        return folder
    with whole_folder(folder) as part:
        stage.export(part, trainable)
    return folder


def evaluate_if_due(
    run: Run,
    stage: Stage,
    log: RunLog | NoLog,
    epoch: int,
    trainable: Any,
    history: dict[str, Any],
) -> bool:
    """Evaluate every `eval_freq` epochs and at the end. Returns whether the run ends here."""
    last = epoch == run.config.num_epochs
    if epoch % run.config.eval_freq and not last:
        return False
    reasons = evaluate_and_report(run, stage, log, epoch, trainable, history)
    if reasons:
        log.warn(f"after {epoch} epochs: {'; '.join(reasons)}", title="stopped")
    return last or bool(reasons)


@partial(jax.profiler.annotate_function, name="evaluate")
def evaluate_and_report(
    run: Run,
    stage: Stage,
    log: RunLog | NoLog,
    epoch: int,
    trainable: Any,
    history: dict[str, Any],
) -> list[str]:
    """Evaluate; log figures, pictures and warnings; save the best weights.

    Returns the reasons to end the run here, if any. `trainable` may be in host memory. `history` is
    the state kept between evaluations.
    """
    config = run.config
    trainable = to_device(trainable)
    evaluation = evaluate(run, stage, trainable)
    means = evaluation.means
    reasons = fallen(history.setdefault("peaks", {}), means, config.reward, run.monitor)
    last = epoch == config.num_epochs or bool(reasons)
    own = stage.after_evaluation(epoch, trainable, evaluation)
    log.metrics("eval", epoch, means | evaluation.details | own)

    first = "start" not in history
    start = history.setdefault("start", means)
    _show_pictures(run, log, epoch, evaluation, first, last)

    # The weights of the best evaluation after the start.
    monitor = run.monitor
    best = history.get("best", {})
    if epoch and (
        monitor not in best or is_better(monitor, means[monitor], best[monitor], config.reward)
    ):
        history["best"] = {"epoch": epoch, **means}
        export(run.folder / "best", stage, trainable)

    trained = [REWARD, *trained_weights(config)]
    log.evaluation(epoch, start, means, trained, evaluation.correlation)
    worse = drift(start, means, config.reward, monitor)
    if worse:
        rises = "the reward rises while these get worse"
        alarm = rises if monitor == REWARD else "worse than at the start"
        log.warn(f"{alarm}: {', '.join(worse)}")
    return reasons


def _show_pictures(
    run: Run, log: RunLog | NoLog, epoch: int, evaluation: Evaluation, first: bool, last: bool
) -> None:
    """Save a picture grid; at the end, also one of before and after, from the same noise."""
    if process_index():
        return
    copies = run.config.sample.test_images_per_prompt
    shown = np.arange(0, len(evaluation.prompts), copies)[:SHOWN]  # a prompt's first picture
    pictures = evaluation.pictures[shown]
    scores = {name: evaluation.scores[name][shown] for name in run.config.reward.fn}
    prompts = [evaluation.drawn.texts[number] for number in shown]
    figures = _captions(scores)
    captions = [f"{prompt}\n{text}" for prompt, text in zip(prompts, figures, strict=True)]
    log.pictures(f"epoch_{epoch:06}", epoch, [pictures], [captions])

    start_file = run.folder / START_FILE
    if first:
        stream = io.BytesIO()
        np.savez(stream, pictures=pictures, **scores)
        write_whole(start_file, stream.getvalue())
    elif last:
        try:
            before = _read_start(start_file, pictures, scores)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            reason = getattr(error, "strerror", error)
            log.warn(f"no picture of before and after: {start_file} cannot be read ({reason})")
            return
        first_captions = []
        for prompt, text in zip(prompts, _captions(before, scores), strict=True):
            first_captions.append(f"{prompt}\nbefore: {text}")
        last_captions = [f"after: {text}" for text in figures]
        rows = (before["pictures"], pictures)
        file = log.pictures("before_after", epoch, rows, (first_captions, last_captions))
        log.say(f"before and after, from the same noise: {file}")


def _read_start(
    file: Path, pictures: np.ndarray, names: Sequence[str] | Mapping
) -> dict[str, np.ndarray]:
    """Return the first evaluation's pictures and scores. Raises if they do not match `pictures`."""
    with np.load(file) as arrays:
        start = {name: arrays[name] for name in ("pictures", *names)}
    if start["pictures"].shape != pictures.shape:
        raise ValueError(f"it holds {len(start['pictures'])} other pictures")
    return start


def _captions(
    scores: Mapping[str, np.ndarray], names: Sequence[str] | Mapping | None = None
) -> list[str]:
    """Return one line per picture, with its scores by reward. scores: {reward: [n]}."""
    names = list(scores if names is None else names)
    captions = []
    for number in range(len(scores[names[0]])):
        parts = [f"{short_name(name)} {scores[name][number]:.2f}" for name in names]
        captions.append(", ".join(parts))
    return captions
