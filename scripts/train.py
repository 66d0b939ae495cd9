"""GRPO training: the walk of one batch, in the order in which it happens.

    python scripts/train.py --config configs/flux_grpo.py                     the embedded model, on any laptop
    python scripts/train.py --config configs/flux_grpo.py:flux_dev_8xh200     RealGen's recipe
    python scripts/train.py --config ... --config.run_name=NAME --resume      go on with a run

prompts -> text embeddings -> rollout -> pictures -> rewards -> advantages -> update -> checkpoint
"""

import importlib.util
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from clu import parameter_overview
from command_line import parse_flags
from encode_prompts import ensure_encoded
from ml_collections import ConfigDict, config_flags

from realgen_jax.checkpoint import Checkpoints
from realgen_jax.data import Layout, prompt_batches, read_prompts
from realgen_jax.flux.convert import leaves, save_transformer
from realgen_jax.flux.lora import LoraConfig, init_lora, load_lora, save_lora
from realgen_jax.flux.pipeline import Pipeline, load_pipeline, no_model
from realgen_jax.flux.text import TextCache
from realgen_jax.flux.transformer import Cond
from realgen_jax.grpo import (
    Batch,
    EmaConfig,
    LossConfig,
    TrainState,
    group_advantages,
    make_optimizer,
    recompute_means,
    update,
)
from realgen_jax.rollout import Plan, draw_noise, make_plan, rollout
from realgen_jax.run_log import RunLog, check_same_config, run_folder, short_name
from realgen_jax.sharding import batch_devices, batch_sharding, make_mesh, replicated
from reward_bridge.bridge import PendingScores, RewardBridge, RewardError
from reward_bridge.dlpack import reserve
from reward_bridge.metrics import METRICS, make_metric
from reward_bridge.rewards import REWARDS, make_reward

EVAL, TRAIN, INIT = 0, 1, 2  # streams of the run's root key


@dataclass(frozen=True)
class Run:
    """What stays the same from the first epoch to the last."""

    config: ConfigDict
    folder: Path
    layout: Layout
    pipe: Pipeline
    plan: Plan
    cache: TextCache
    prompts: list[str]
    test_prompts: list[str]
    bridge: RewardBridge
    metrics: dict[str, Callable[[np.ndarray], float]]
    checkpoints: Checkpoints
    sample_call: Callable
    update_step: Callable
    recompute: Callable
    evaluate_call: Callable

    def cond(self, prompts: Sequence[str]) -> Cond:
        return self.pipe.cond(self.cache, prompts, self.config.sample.guidance_scale)

    def key(self, stream: int) -> jax.Array:
        return jax.random.fold_in(jax.random.key(self.config.seed), stream)


def set_up(config: ConfigDict, folder: Path) -> tuple[Run, TrainState]:
    """Load everything, compile nothing. Returns the run and its first state."""
    sample, t = config.sample, config.train
    check(config)
    loss = LossConfig(t.loss, t.kl, t.beta, t.clip_range, t.adv_clip_max, t.guard_bias)
    reserve(config.reward.device)
    prompts, test_prompts = read_prompts(config.prompts.train), read_prompts(config.prompts.test)
    # before JAX takes the memory of the devices
    cache = ensure_encoded([*prompts, *test_prompts], config.pretrained.model, config.prompts)
    mesh = make_mesh(**config.mesh, devices=jax.devices())
    layout = Layout(sample.num_batches_per_epoch, sample.train_batch_size, sample.branches, sample.num_image_per_prompt)
    layout.check(batch_devices(mesh))
    if layout.calls % t.gradient_accumulation_steps:
        raise ValueError(
            f"num_batches_per_epoch {layout.calls} must be a multiple of gradient_accumulation_steps "
            f"{t.gradient_accumulation_steps}"
        )
    if sample.test_batch_size % batch_devices(mesh):
        parts = batch_devices(mesh)
        raise ValueError(
            f"test_batch_size {sample.test_batch_size} must be a multiple of {parts}, the mesh's data x fsdp"
        )

    lora = LoraConfig(t.lora_rank, t.lora_alpha, t.lora_init) if t.lora else None
    pipe = load_pipeline(config.pretrained, sample.resolution, lora, mesh)
    names, device = [*config.reward.fn, *config.reward.held_out], config.reward.device
    rewards = {n: make_reward(n, device, config.reward.options.get(n, {})) for n in names}
    metrics = {n: make_metric(n, device, config.reward.options.get(n, {})) for n in config.reward.metrics}
    bridge = RewardBridge(rewards, device, deadline=config.reward.deadline, retries=config.reward.retries)

    optimizer = make_optimizer(
        t.learning_rate, t.adam_beta1, t.adam_beta2, t.adam_epsilon, t.adam_weight_decay, t.max_grad_norm
    )
    init_key = jax.random.fold_in(jax.random.key(config.seed), INIT)
    state, shardings = first_state(pipe, config, optimizer, init_key)
    ema = EmaConfig(t.ema_decay, t.ema_update_interval)
    run = Run(
        config=config,
        folder=folder,
        layout=layout,
        pipe=pipe,
        plan=make_plan(
            pipe.sigmas(sample.num_steps),
            kind=sample.sde_type,
            noise_level=sample.noise_level,
            window=sample.sde_window_size,
            bounds=tuple(sample.sde_window_range),
            branches=sample.branches,
        ),
        cache=cache,
        prompts=prompts,
        test_prompts=test_prompts,
        bridge=bridge,
        metrics=metrics,
        checkpoints=Checkpoints(folder / "checkpoints", config.num_checkpoint_limit),
        sample_call=jax.jit(partial(sample_call, pipe, layout, sample.same_latent)),
        update_step=jax.jit(
            partial(update, pipe.velocity, optimizer, loss, ema), donate_argnums=1, out_shardings=(shardings, None)
        ),
        recompute=jax.jit(partial(recompute_means, pipe.velocity, loss)),
        evaluate_call=pipe.sampler(sample.eval_num_steps),
    )
    return run, state


def check(config: ConfigDict) -> None:
    """Name everything that is missing at once, before anything is loaded."""
    model, reward, missing = Path(config.pretrained.model), config.reward, []
    if not (model / "model_index.json").exists():
        missing.append(no_model(model))
    for name in ("train", "test"):
        if not Path(config.prompts[name]).is_file():
            missing.append(
                f"config.prompts.{name} is {config.prompts[name]!r}, which does not exist; expected one prompt a line "
                "(.txt) or .jsonl. RealGen's own files come with its repository, under dataset/realgen"
            )
    for kind, names, known in (
        ("reward", [*reward.fn, *reward.held_out], REWARDS),
        ("metric", reward.metrics, METRICS),
    ):
        if unknown := [name for name in names if name not in known]:
            missing.append(f"there is no {kind} {', '.join(unknown)}; choose from {', '.join(sorted(known))}")
    if config.pretrained.lora and not config.train.lora:
        missing.append("config.pretrained.lora is set, but config.train.lora=False trains all weights and no adapters")
    if config.eval_freq < 1 or config.save_freq < 1:
        missing.append(f"eval_freq {config.eval_freq} and save_freq {config.save_freq} must be 1 or more epochs")
    if config.wandb_project and importlib.util.find_spec("wandb") is None:
        missing.append("config.wandb_project is set, but wandb is not installed: pip install wandb")
    if missing:
        raise ValueError("\n".join(missing))


def first_state(
    pipe: Pipeline, config: ConfigDict, optimizer: optax.GradientTransformation, key: jax.Array
) -> tuple[TrainState, TrainState]:
    """The state before any step, on the mesh, and its shardings: adapters are replicated, weights lie as they are."""
    everywhere = replicated(pipe.mesh)
    if pipe.lora is None:
        trainable = jax.tree.map(lambda p: p.astype(jnp.float32), pipe.params)
        shardings = jax.tree.map(lambda p: p.sharding, pipe.params)
    else:
        trainable = init_lora(pipe.model, pipe.lora, key)
        if config.pretrained.lora:
            found, trainable = load_lora(config.pretrained.lora, pipe.model)
            if (found.rank, found.alpha) != (pipe.lora.rank, pipe.lora.alpha):
                raise ValueError(
                    f"{config.pretrained.lora} has rank {found.rank} and alpha {found.alpha:g}, config.train has "
                    f"lora_rank {pipe.lora.rank} and lora_alpha {pipe.lora.alpha:g}; set those to the file's"
                )
        shardings = jax.tree.map(lambda _: everywhere, trainable)
    trainable = jax.device_put(trainable, shardings)
    opt_shardings = optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, trainable),
        shardings,
        transform_non_params=lambda _: everywhere,
    )
    where = TrainState(shardings, shardings, opt_shardings, everywhere)
    start = lambda p: TrainState(p, jax.tree.map(jnp.copy, p), optimizer.init(p), jnp.int32(0))  # noqa: E731
    return jax.jit(start, out_shardings=where)(trainable), where


def sample_call(pipe: Pipeline, layout: Layout, same_latent: bool, params, vae_params, trainable, cond, keys, plan):
    """One rollout call: (uint8 pictures, trajectory, whether all latents are finite)."""
    distinct = max(1, layout.images // layout.group) if same_latent else layout.slots
    latents, noise = draw_noise(*keys, plan, layout.slots, distinct, pipe.token_shape)
    latents = jax.lax.with_sharding_constraint(latents, batch_sharding(pipe.mesh))
    noise = jax.lax.with_sharding_constraint(noise, batch_sharding(pipe.mesh, axis=1))
    tokens, trajectory = rollout(pipe.velocity, params, trainable, cond, latents, noise, plan)
    return pipe.decode(vae_params, tokens), trajectory, jnp.isfinite(tokens).all()


def sample_epoch(
    run: Run, trainable: Any, epoch: int, rows: np.ndarray
) -> tuple[list[tuple], list[PendingScores], list[jax.Array]]:
    """Sample every call of an epoch and hand its pictures to the rewards, which score while the next call runs.

    rows int [groups]: the epoch's prompts. Returns the calls' (trajectory, cond), their pending scores and flags.
    """
    sample, layout = run.config.sample, run.layout
    epoch_key = jax.random.fold_in(run.key(TRAIN), epoch)
    calls, pending, finite = [], [], []
    for call in range(layout.calls):
        groups = layout.groups_of_slots(call)
        prompts = [run.prompts[rows[group]] for group in groups]
        cond = run.cond(prompts)
        start_key, noise_key, latent_key = jax.random.split(jax.random.fold_in(epoch_key, call), 3)
        if sample.same_latent:  # one latent for a group, also where the group goes on in the next call
            latent_key = jax.random.fold_in(epoch_key, layout.calls + int(groups[0]))
        images, trajectory, ok = run.sample_call(
            run.pipe.params, run.pipe.vae_params, trainable, cond, (latent_key, noise_key), run.plan.draw(start_key)
        )
        texts = [prompt for prompt in prompts for _ in range(layout.branches)]
        pending.append(run.bridge.submit(images, texts, [*run.config.reward.fn]))
        calls.append((trajectory, cond))
        finite.append(ok)
    return calls, pending, finite


_stack = jax.jit(lambda *trees: jax.tree.map(lambda *a: jnp.stack(a), *trees))


def improve(run: Run, state: TrainState, calls: list[tuple], advantages: np.ndarray) -> tuple[TrainState, list[dict]]:
    """The epoch's optimizer steps. advantages float32 [calls, images]. Returns each step's metrics."""
    t, metrics = run.config.train, []
    advantages = jax.device_put(advantages, batch_sharding(run.pipe.mesh, axis=1))
    batches = [
        _stack(*(Batch(*calls[c], advantages[c]) for c in range(i, i + t.gradient_accumulation_steps)))
        for i in range(0, len(calls), t.gradient_accumulation_steps)
    ]
    if t.recompute_old:
        batches = [run.recompute(run.pipe.params, state.trainable, batch) for batch in batches]
    for _ in range(t.num_inner_epochs):
        for batch in batches:
            state, step_metrics = run.update_step(run.pipe.params, state, batch)
            metrics.append(step_metrics)
    return state, jax.device_get(metrics)


def evaluate(run: Run, trainable: Any) -> tuple[dict[str, float], dict[str, np.ndarray], np.ndarray, list[str]]:
    """Test prompts on noise that is fixed per picture: (means, scores by name, pictures uint8 [n, 3, H, W], prompts).

    The last call is filled up with prompts from the front; what is over is neither kept nor counted.
    """
    sample, reward = run.config.sample, run.config.reward
    copies = sample.test_images_per_prompt
    prompts = [prompt for prompt in run.test_prompts for _ in range(copies)]
    images, pending = [], []
    for start in range(0, len(prompts), sample.test_batch_size):
        ids = np.arange(start, start + sample.test_batch_size, dtype=np.int32)
        texts = [prompts[i % len(prompts)] for i in ids]
        ids = jax.device_put(ids, batch_sharding(run.pipe.mesh))
        images.append(run.evaluate_call(trainable, run.cond(texts), run.key(EVAL), ids))
        pending.append(run.bridge.submit(images[-1], texts))
    found = [one.result() for one in pending]
    scores = {name: np.concatenate([f[name] for f in found])[: len(prompts)] for name in found[0]}
    pictures = np.concatenate([np.asarray(i) for i in images])[: len(prompts)]
    scores["reward"] = weighted_mean(scores, reward.fn)
    means = {name: float(values.mean()) for name, values in scores.items()}
    means["prompt_std"] = float(scores["reward"].reshape(-1, copies).std(axis=1).mean())
    means |= {name: metric(pictures) for name, metric in run.metrics.items()}
    return means, scores, pictures, prompts


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


def stop_if_not_finite(values: Mapping[str, float], epoch: int, phase: str, checkpoints: Checkpoints) -> None:
    """Raise FloatingPointError naming epoch, phase and values; nothing of this epoch has been saved."""
    if bad := [name for name, value in values.items() if not np.isfinite(value)]:
        newest = checkpoints.newest()
        good = (
            f"--resume goes on from the newest good checkpoint, epoch {newest}"
            if newest
            else "there is no checkpoint yet"
        )
        raise FloatingPointError(
            f"epoch {epoch}, {phase}: {', '.join(bad)} not finite; {good} ({checkpoints.folder}). If it happens again, "
            "lower config.train.learning_rate or config.sample.noise_level"
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


def report(run: Run, log: RunLog, epoch: int, trainable: Any, history: dict[str, Any]) -> None:
    """Evaluate, and show it: figures, pictures, a warning where checks fall while the reward rises. Keep the best."""
    means, scores, pictures, prompts = evaluate(run, trainable)
    log.metrics("eval", epoch, means)
    shown = np.arange(0, len(prompts), run.config.sample.test_images_per_prompt)[:16]  # a prompt's first picture
    names = list(run.config.reward.fn)

    def captions(of: Mapping[str, np.ndarray], label: str) -> list[str]:
        figures = [", ".join(f"{short_name(n)} {of[n][k]:.2f}" for n in names) for k in range(len(shown))]
        return [label.format(prompts[i]) + text for i, text in zip(shown, figures, strict=True)]

    now = {name: scores[name][shown] for name in names}
    log.pictures(f"epoch_{epoch:06}", epoch, [pictures[shown]], [captions(now, "{}\n")])
    first = run.folder / "samples" / "start.npz"
    if "start" not in history:
        history["start"] = means
        np.savez(first, pictures=pictures[shown], **now)
    elif epoch == run.config.num_epochs:
        with np.load(first) as start:
            rows, texts = (
                (start["pictures"], pictures[shown]),
                (captions(start, "{}\nbefore: "), captions(now, "after: ")),
            )
            log.say(f"before and after, from the same noise: {log.pictures('before_after', epoch, rows, texts)}")
    if epoch and ("best" not in history or means["reward"] > history["best"]["reward"]):
        history["best"] = {"epoch": epoch, **means}
        export(run.folder / "best", run.pipe, trainable)
    reward = run.config.reward
    found = drift(history["start"], means, reward)
    log.evaluation(epoch, history["start"], means, ["reward", *reward.fn], reward.held_out, found)


def train(run: Run, state: TrainState, resume: bool) -> None:
    """Sample, score, improve and save until `num_epochs` are done."""
    config, folder = run.config, run.folder
    data = prompt_batches(len(run.prompts), run.layout.groups, config.seed)
    first, history = 0, {}
    if resume and run.checkpoints.newest() is not None:  # a run that ended before its first one starts anew
        state, meta = run.checkpoints.restore(state)
        first, history = meta["epoch"], meta["history"]
        data.set_state(meta["data"])
    describe = parameter_overview.get_parameter_overview(dict(leaves(state.trainable)), include_stats=False)
    (folder / "trainable.txt").write_text(describe + "\n")

    with RunLog(folder, config.to_dict(), first, config.num_epochs, config.wandb_project) as log:
        for epoch in range(first, config.num_epochs):
            if epoch % config.eval_freq == 0:
                report(run, log, epoch, state.ema, history)
            clock = [time.perf_counter()]
            calls, pending, finite = sample_epoch(run, state.trainable, epoch, next(data))
            sampled = {"latents": 0.0 if all(finite) else float("nan")}
            stop_if_not_finite(sampled, epoch, "rollout (velocity)", run.checkpoints)
            clock.append(time.perf_counter())

            found = [one.result() for one in pending]
            groups = {n: np.concatenate([f[n] for f in found]).reshape(-1, run.layout.group) for n in found[0]}
            advantages = group_advantages(groups, config.reward.fn, global_std=config.sample.global_std)
            clock.append(time.perf_counter())

            state, steps = improve(run, state, calls, advantages.reshape(run.layout.calls, -1))
            for step in steps:
                stop_if_not_finite(step, epoch, "update", run.checkpoints)
            clock.append(time.perf_counter())

            deviation = float(steps[0]["ratio_deviation"])
            if epoch == first and deviation > 0.1 * config.train.clip_range:
                log.say(
                    f"[bold red]warning[/bold red] on unchanged weights a ratio is {deviation:.1e} away from 1, over a "
                    f"tenth of the clip range {config.train.clip_range:g}: set --config.train.recompute_old=True"
                )
            log.train(epoch + 1, groups, weighted_mean(groups, config.reward.fn), steps, np.diff(clock))
            if (epoch + 1) % config.save_freq == 0 or epoch + 1 == config.num_epochs:
                run.checkpoints.save(
                    epoch + 1, state, {"epoch": epoch + 1, "data": data.get_state(), "history": history}
                )
        report(run, log, config.num_epochs, state.ema, history)
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
