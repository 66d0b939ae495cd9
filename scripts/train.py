"""GRPO training: the walk of one batch, in the order in which it happens.

    python scripts/train.py --config configs/flux_grpo.py                     the embedded model, on any laptop
    python scripts/train.py --config configs/flux_grpo.py:flux_dev_8xh200     RealGen's recipe
    python scripts/train.py --config ... --config.run_name=NAME --resume      go on with a run

prompts -> text embeddings -> rollout -> pictures -> rewards -> advantages -> update -> checkpoint
"""

import copy
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from clu import parameter_overview
from command_line import parse_flags
from ml_collections import ConfigDict, config_flags
from programs import Programs, make_programs
from set_up import Run, set_up

from realgen_jax.data import prompt_batches
from realgen_jax.flux.convert import leaves, save_transformer
from realgen_jax.flux.lora import save_lora
from realgen_jax.flux.pipeline import Pipeline
from realgen_jax.grpo import Batch, TrainState, group_advantages
from realgen_jax.run_log import RunLog, check_same_config, run_folder, short_name
from realgen_jax.sharding import batch_sharding
from reward_bridge.bridge import PendingScores, RewardError

EVAL, TRAIN = 0, 1  # streams of the run's root key, beside set_up.INIT


def sample_epoch(
    run: Run, programs: Programs, trainable: Any, epoch: int, rows: np.ndarray
) -> tuple[list[tuple], list[PendingScores], list[jax.Array]]:
    """Sample every call of an epoch and hand its pictures to the rewards, which score while the next call runs.

    rows int [groups]: the epoch's prompts. Returns the calls' (trajectory, cond), their pending scores and flags.
    """
    sample, layout = run.config.sample, run.recipe.layout
    epoch_key = jax.random.fold_in(run.key(TRAIN), epoch)
    calls, pending, finite = [], [], []
    for call in range(layout.calls):
        groups = layout.groups_of_slots(call)
        prompts = [run.prompts[rows[group]] for group in groups]
        cond = run.cond(prompts)
        start_key, noise_key, latent_key = jax.random.split(jax.random.fold_in(epoch_key, call), 3)
        if sample.same_latent:  # one latent for a group, also where the group goes on in the next call
            latent_key = jax.random.fold_in(epoch_key, layout.calls + int(groups[0]))
        images, trajectory, ok = programs.sample(
            run.pipe.params, run.pipe.vae_params, trainable, cond, (latent_key, noise_key), run.plan.draw(start_key)
        )
        texts = [prompt for prompt in prompts for _ in range(layout.branches)]
        pending.append(run.bridge.submit(images, texts, [*run.config.reward.fn]))
        calls.append((trajectory, cond))
        finite.append(ok)
    return calls, pending, finite


_stack = jax.jit(lambda *trees: jax.tree.map(lambda *a: jnp.stack(a), *trees))


def improve(
    run: Run, programs: Programs, state: TrainState, calls: list[tuple], advantages: np.ndarray
) -> tuple[TrainState, list[dict]]:
    """The epoch's optimizer steps. advantages float32 [calls, images]. Returns each step's metrics."""
    t, metrics = run.config.train, []
    advantages = jax.device_put(advantages, batch_sharding(run.pipe.mesh, axis=1))
    batches = [
        _stack(*(Batch(*calls[c], advantages[c]) for c in range(i, i + t.gradient_accumulation_steps)))
        for i in range(0, len(calls), t.gradient_accumulation_steps)
    ]
    if t.recompute_old:
        batches = [programs.recompute(run.pipe.params, state.trainable, batch) for batch in batches]
    for _ in range(t.num_inner_epochs):
        for batch in batches:
            state, step_metrics = programs.update(run.pipe.params, state, batch)
            metrics.append(step_metrics)
    return state, jax.device_get(metrics)


@dataclass(frozen=True)
class Evaluation:
    """Test prompts on noise that is fixed per picture."""

    prompts: list[str]
    pictures: np.ndarray  # uint8 [n, 3, H, W]
    scores: dict[str, np.ndarray]  # float32 [n] by reward, held-out ones too; "reward" is the trained ones' mean
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
        ids = jax.device_put(ids, batch_sharding(run.pipe.mesh))
        images.append(programs.evaluate(trainable, run.cond(texts), run.key(EVAL), ids))
        pending.append(run.bridge.submit(images[-1], texts))
    pictures = [np.asarray(i) for i in images]
    half = max(1, len(texts) // 2)  # once more, in other company: a reward is to judge a picture by itself
    again = run.bridge.submit(jnp.asarray(pictures[-1][:half]), texts[:half]).result()
    found = [one.result() for one in pending]
    noise = {f"noise/{name}": np.sqrt(np.mean((found[-1][name][:half] - again[name]) ** 2) / 2) for name in again}
    scores = {name: np.concatenate([f[name] for f in found])[: len(prompts)] for name in found[0]}
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


def weighted_mean(scores: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """The trained rewards' weighted mean, picture by picture."""
    return sum(weight * scores[name] for name, weight in weights.items()) / sum(weights.values())


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


def stop_if_not_finite(values: Mapping[str, float], epoch: int, phase: str, run: Run) -> None:
    """Raise FloatingPointError naming epoch, phase and values; nothing of this epoch has been saved."""
    if bad := [name for name, value in values.items() if not np.isfinite(value)]:
        newest = run.checkpoints.newest()
        good = (
            f"--resume goes on from the newest good checkpoint, epoch {newest}"
            if newest
            else "there is no checkpoint yet"
        )
        raise FloatingPointError(
            f"epoch {epoch}, {phase}: {', '.join(bad)} not finite; {good} ({run.checkpoints.folder}). If it "
            "happens again, lower config.train.learning_rate or config.sample.noise_level"
        )


def export(folder: Path, pipe: Pipeline, trainable: Any) -> Path:
    """A LoRA file that diffusers loads, or the whole transformer as a diffusers folder, in place of an older one."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    if pipe.lora is None:
        save_transformer(part / "transformer", pipe.model, trainable)
    else:
        save_lora(part / "pytorch_lora_weights.safetensors", trainable, pipe.lora)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    return folder


def report(run: Run, programs: Programs, log: RunLog, epoch: int, trainable: Any, history: dict[str, Any]) -> list[str]:
    """Evaluate, and show it: figures, pictures, a warning where checks fall while the reward rises. Keep the best.

    Returns why the run must end here, if it must.
    """
    config, reward = run.config, run.config.reward
    found = evaluate(run, programs, trainable)
    log.metrics("eval", epoch, found.means | found.details)
    reasons = fallen(history.setdefault("peaks", {}), found.means, reward)
    shown = np.arange(0, len(found.prompts), config.sample.test_images_per_prompt)[:16]  # a prompt's first picture

    def captions(of: Mapping[str, np.ndarray], label: str) -> list[str]:
        figures = [", ".join(f"{short_name(n)} {of[n][k]:.2f}" for n in reward.fn) for k in range(len(shown))]
        return [label.format(found.prompts[i]) + text for i, text in zip(shown, figures, strict=True)]

    now, pictures = {name: found.scores[name][shown] for name in reward.fn}, found.pictures[shown]
    log.pictures(f"epoch_{epoch:06}", epoch, [pictures], [captions(now, "{}\n")])
    first = run.folder / "samples" / "start.npz"
    if "start" not in history:
        history["start"] = found.means
        np.savez(first, pictures=pictures, **now)
    elif epoch == config.num_epochs or reasons:
        with np.load(first) as start:
            rows, texts = (start["pictures"], pictures), (captions(start, "{}\nbefore: "), captions(now, "after: "))
            log.say(f"before and after, from the same noise: {log.pictures('before_after', epoch, rows, texts)}")
    if epoch and ("best" not in history or found.means["reward"] > history["best"]["reward"]):
        history["best"] = {"epoch": epoch, **found.means}
        export(run.folder / "best", run.pipe, trainable)
    worse = drift(history["start"], found.means, reward)
    log.evaluation(epoch, history["start"], found.means, ["reward", *reward.fn], found.correlation, worse)
    return reasons


def train(run: Run, state: TrainState, resume: bool) -> None:
    """Sample, score, improve and save until `num_epochs` are done, or the held-out rewards say that it is enough."""
    config, folder, programs = run.config, run.folder, make_programs(run.recipe, run.pipe)
    data = prompt_batches(len(run.prompts), run.recipe.layout.groups, config.seed)
    first, history = 0, {}
    if resume and run.checkpoints.newest() is not None:  # a run that ended before its first one starts anew
        state, meta = run.checkpoints.restore(state)
        first, history = meta["epoch"], meta["history"]
        for name, size in meta["batch_sizes"].items():  # what memory allowed; other batches round otherwise
            run.bridge.batch_sizes[name] = min(filter(None, (size, run.bridge.batch_sizes[name])), default=0)
        data.set_state(meta["data"])
    describe = parameter_overview.get_parameter_overview(dict(leaves(state.trainable)), include_stats=False)
    (folder / "trainable.txt").write_text(describe + "\n")

    with RunLog(folder, config.to_dict(), first, config.num_epochs, config.wandb_project) as log:
        for epoch in range(first, config.num_epochs + 1):
            if epoch % config.eval_freq == 0 or epoch == config.num_epochs:
                if reasons := report(run, programs, log, epoch, state.ema, history):
                    log.say(f"[bold red]stopped[/bold red] after {epoch} epochs: {'; '.join(reasons)}")
                    break
                if epoch == config.num_epochs:
                    break
            clock, scored = [time.perf_counter()], dict(run.bridge.seconds)
            calls, pending, finite = sample_epoch(run, programs, state.trainable, epoch, next(data))
            for ok, one in zip(finite, pending, strict=True):
                ok.block_until_ready()
                one.raise_if_failed()  # rather now than when all calls are through
            sampled = {"latents": 0.0 if all(finite) else float("nan")}
            stop_if_not_finite(sampled, epoch, "rollout (velocity)", run)
            clock.append(time.perf_counter())

            found = [one.result() for one in pending]
            groups = {n: np.concatenate([f[n] for f in found]).reshape(-1, run.recipe.layout.group) for n in found[0]}
            advantages = group_advantages(groups, config.reward.fn, global_std=config.sample.global_std)
            clock.append(time.perf_counter())

            state, steps = improve(run, programs, state, calls, advantages.reshape(run.recipe.layout.calls, -1))
            for step in steps:
                stop_if_not_finite(step, epoch, "update", run)
            clock.append(time.perf_counter())

            deviation = float(steps[0]["ratio_deviation"])
            if epoch == first and deviation > 0.1 * config.train.clip_range:
                log.say(
                    f"[bold red]warning[/bold red] on unchanged weights a ratio is {deviation:.1e} away from 1, over a "
                    f"tenth of the clip range {config.train.clip_range:g}: set --config.train.recompute_old=True"
                )
            seconds = dict(zip(("sample", "reward_wait", "update"), np.diff(clock), strict=True))
            scoring = {f"scoring/{name}": run.bridge.seconds[name] - scored[name] for name in groups}
            log.train(epoch + 1, groups, weighted_mean(groups, config.reward.fn), steps, seconds, scoring)
            if (epoch + 1) % config.save_freq == 0 or epoch + 1 == config.num_epochs:
                meta = {"epoch": epoch + 1, "data": data.get_state(), "batch_sizes": dict(run.bridge.batch_sizes)}
                # a copy of the history: it is written while the next evaluation adds to it
                run.checkpoints.save(epoch + 1, state, meta | {"history": copy.deepcopy(history)})
        log.say(f"trained weights: {export(folder / 'lora', run.pipe, state.ema)}")


FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "configs/flux_grpo.py, or configs/flux_grpo.py:PRESET")
flags.DEFINE_bool("resume", False, "go on with config.run_name, or with this preset's latest run")


def main(_: Sequence[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    config = FLAGS.config
    try:
        folder = run_folder(config.run_root, config.run_name, config.preset, FLAGS.resume)
        print(f"preset {config.preset} -> {folder}   (another preset: --config configs/flux_grpo.py:flux_dev_8xh200)")
        if FLAGS.resume:
            check_same_config(folder, config.to_dict())
        if config.compilation_cache:
            jax.config.update("jax_compilation_cache_dir", str(Path(config.compilation_cache).expanduser()))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        run, state = set_up(config, folder)
    except (ValueError, OSError) as error:  # what a person can mend: paths, sizes, names
        sys.exit(f"error: {error}")
    try:
        train(run, state, FLAGS.resume)
    except (RewardError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"stopped; to go on: --config.run_name={folder.name} --resume")
    finally:
        run.bridge.close()
        run.checkpoints.close()


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
