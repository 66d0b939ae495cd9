"""GRPO training: the walk of one batch, in the order in which it happens.

    python scripts/train.py --config configs/flux_grpo.py                     the embedded model, on any laptop
    python scripts/train.py --config configs/flux_grpo.py:flux_dev_8xh200     RealGen's recipe
    python scripts/train.py --config ... --config.run_name=NAME --resume      go on with a run
    python scripts/launch.py --processes 2 scripts/train.py --config ...      several processes (docs/clusters.md)

prompts -> text embeddings -> rollout -> pictures -> rewards -> advantages -> update -> checkpoint
                                                    `-> rewards that learn -'

At the end, where config.evaluate.after_training says so, RealBench's report on the run (scripts/evaluate.py).
"""

import contextlib
import copy
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from clu import parameter_overview
from ml_collections import ConfigDict, config_flags
from rich.console import Console

from realgen_jax.checkpoint import RestoreError, SaveError, read_meta
from realgen_jax.config import parse_flags
from realgen_jax.data import prompt_batches
from realgen_jax.hosts import process_count, process_index, put, sum_over_processes
from realgen_jax.nn.convert import leaves
from realgen_jax.objectives.grpo import Batch, TrainState, group_advantages
from realgen_jax.profiling.step_traces import StepTraces, phase
from realgen_jax.realbench.benchmark import build_report
from realgen_jax.realbench.benchmark import evaluate as benchmark
from realgen_jax.realbench.entries import BASE, TAKEN, read_entries
from realgen_jax.realbench.prompts import SAFE, read_sets
from realgen_jax.sharding import batch_sharding
from realgen_jax.text_cache import TextCache
from realgen_jax.training.evaluation import export, report
from realgen_jax.training.learning import begin_learning, draw_seeds, files, restore
from realgen_jax.training.log import NoLog, RunLog
from realgen_jax.training.preemption import Preemption, connect_by_flags
from realgen_jax.training.programs import Programs, make_programs
from realgen_jax.training.run import Run, keep_compiled, reports, set_up
from realgen_jax.training.run_folder import resume_from, run_folder, run_lock
from realgen_jax.training.scoring import Pending, scores_of_all, submit, weighted_mean
from reward_bridge.bridge import RewardError

TRAIN = 1  # a stream of the run's root key, beside evaluation.EVAL and set_up.INIT


def sample_epoch(
    run: Run, programs: Programs, trainable: Any, epoch: int, rows: np.ndarray, seeds: Sequence[int]
) -> tuple[list[tuple], list[Pending], list[jax.Array]]:
    """Sample every call of an epoch and hand its pictures to the rewards, which score while the next call runs.

    rows int [groups]: the epoch's prompts; seeds: one a call, for the reference pictures that go with its own. Returns
    the calls' (trajectory, cond), their pending scores and flags.
    """
    sample, layout = run.config.sample, run.recipe.layout
    epoch_key = jax.random.fold_in(run.key(TRAIN), epoch)
    calls, pending, finite = [], [], []
    for call in range(layout.calls):
        groups = layout.groups_of_slots(call)
        prompts = [run.prompts[rows[group]] for group in groups]
        cond = run.cond(prompts)
        start_key, noise_key, latent_key = jax.random.split(jax.random.fold_in(epoch_key, call), 3)
        if (
            sample.same_latent
        ):  # one latent for a group, also where the group goes on in the next call
            latent_key = jax.random.fold_in(epoch_key, layout.calls + int(groups[0]))
        images, trajectory, ok = programs.sample(
            run.pipe.params,
            run.pipe.vae_params,
            trainable,
            cond,
            (latent_key, noise_key),
            run.plan.draw(start_key),
        )
        texts = [prompt for prompt in prompts for _ in range(layout.branches)]
        pending.append(submit(run, images, texts, [*run.config.reward.fn], seeds[call]))
        calls.append((trajectory, cond))
        finite.append(ok)
    return calls, pending, finite


_stack = jax.jit(lambda *trees: jax.tree.map(lambda *a: jnp.stack(a), *trees))


def improve(
    run: Run, programs: Programs, state: TrainState, calls: list[tuple], advantages: np.ndarray
) -> tuple[TrainState, list[dict]]:
    """The epoch's optimizer steps. advantages float32 [calls, images]. Returns each step's metrics."""
    t, metrics = run.config.train, []
    advantages = put(advantages, batch_sharding(run.pipe.mesh, axis=1))
    batches = [
        _stack(
            *(Batch(*calls[c], advantages[c]) for c in range(i, i + t.gradient_accumulation_steps))
        )
        for i in range(0, len(calls), t.gradient_accumulation_steps)
    ]
    if t.recompute_old:
        batches = [programs.recompute(run.pipe.params, state.trainable, batch) for batch in batches]
    for _ in range(t.num_inner_epochs):
        for batch in batches:
            state, step_metrics = programs.update(run.pipe.params, state, batch)
            metrics.append(step_metrics)
    return state, jax.device_get(metrics)


def stop_if_not_finite(values: Mapping[str, float], epoch: int, phase: str, run: Run) -> None:
    """Raise FloatingPointError naming epoch, phase and values; nothing of this epoch has been saved."""
    if bad := [name for name, value in values.items() if not np.isfinite(value)]:
        with contextlib.suppress(SaveError):
            run.checkpoints.wait()
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


def train(run: Run, state: TrainState, stop: Preemption, resumed: int | None) -> bool:
    """Sample, score, improve and save until `num_epochs` are done, the held-out rewards say that it is enough, or
    SIGTERM ends it. `resumed` is the epoch of the checkpoint to go on from. Returns whether the run is over.
    """
    config, folder, programs = run.config, run.folder, make_programs(run.recipe, run.pipe)
    data = prompt_batches(len(run.prompts), run.recipe.layout.groups, config.seed)
    first, history = 0, {}
    if resumed is not None:
        state, meta = (
            run.checkpoints.restore(resumed, state),
            read_meta(run.checkpoints.folder, resumed),
        )
        first, history = resumed, meta["history"]
        for name, size in meta[
            "batch_sizes"
        ].items():  # what memory allowed; other batches round otherwise
            run.bridge.batch_sizes[name] = min(
                filter(None, (size, run.bridge.batch_sizes[name])), default=0
            )
        data.set_state(meta["data"])
    log = NoLog()
    if process_index() == 0:
        describe = parameter_overview.get_parameter_overview(
            dict(leaves(state.trainable)), include_stats=False
        )
        (folder / "trainable.txt").write_text(describe + "\n")
        log = RunLog(folder, config.to_dict(), first, config.num_epochs, config.wandb_project)
    if resumed is not None:
        restore(run, resumed, log)

    def remembered() -> dict[str, Any]:
        """All of the run but its arrays, as it is now; the config has the seed, the root of all keys."""
        kept = {
            "data": data.get_state(),
            "history": copy.deepcopy(history),
            "config": config.to_dict(),
        }
        return kept | {"batch_sizes": dict(run.bridge.batch_sizes)}

    with log, StepTraces(folder, config.profile.steps, log) as traces:
        for epoch in range(first, config.num_epochs + 1):
            traces.begin(epoch + 1)
            meta = remembered()
            if stop.wanted_anywhere():
                end_early(run, log, stop, epoch, state, meta)
                return False
            if epoch % config.eval_freq == 0 or epoch == config.num_epochs:
                if reasons := report(run, programs, log, epoch, state.ema, history):
                    log.say(
                        f"[bold red]stopped[/bold red] after {epoch} epochs: {'; '.join(reasons)}"
                    )
                    break
                if epoch == config.num_epochs:
                    break
            seconds, scored = {}, dict(run.bridge.seconds)
            with phase("sample", seconds):
                seeds = draw_seeds(run, epoch, run.recipe.layout.calls + len(run.adversaries))
                calls, pending, finite = sample_epoch(
                    run, programs, state.trainable, epoch, next(data), seeds
                )
                for ok, (one, _) in zip(finite, pending, strict=True):
                    ok.block_until_ready()
                    if (
                        process_count() == 1
                    ):  # rather now than when all calls are through; several must agree
                        one.raise_if_failed()
                        if stop.wanted():
                            end_early(run, log, stop, epoch, state, meta)
                            return False
                sampled = {"latents": 0.0 if all(finite) else float("nan")}
                stop_if_not_finite(sampled, epoch, "rollout (velocity)", run)

            with phase("reward_wait", seconds):
                found = scores_of_all(pending, run.recipe.layout.images)
                groups = {
                    name: found[name].reshape(-1, run.recipe.layout.group)
                    for name in config.reward.fn
                }
                means = {name: float(scores.mean()) for name, scores in found.items()}
                learning, rest = begin_learning(run, epoch, means, seeds[run.recipe.layout.calls :])
                advantages = group_advantages(
                    groups, config.reward.fn, global_std=config.sample.global_std
                )

            with phase("update", seconds):
                steps = []
                if not rest:
                    advantages = advantages.reshape(run.recipe.layout.calls, -1)
                    state, steps = improve(run, programs, state, calls, advantages)
                for step in steps:
                    stop_if_not_finite(step, epoch, "update", run)

            with phase("reward_learning", seconds):
                learnt = learning.result()
            learnt = {
                f"learning/{name}/{key}": v
                for name, values in learnt.items()
                for key, v in values.items()
            }
            learnt |= {f"reward/{name}": mean for name, mean in means.items() if name not in groups}

            deviation = float(steps[0]["ratio_deviation"]) if steps else 0.0
            if epoch == first and deviation > 0.1 * config.train.clip_range:
                log.say(
                    f"[bold red]warning[/bold red] on unchanged weights a ratio is {deviation:.1e} away from 1, over a "
                    f"tenth of the clip range {config.train.clip_range:g}: set --config.train.recompute_old=True"
                )
            for name in groups:
                learnt[f"seconds/scoring/{name}"] = run.bridge.seconds[name] - scored[name]
            log.train(
                epoch + 1,
                groups,
                weighted_mean(groups, config.reward.fn),
                steps,
                seconds,
                learnt,
            )
            if (epoch + 1) % config.save_freq == 0 or epoch + 1 == config.num_epochs:
                save(run, log, epoch + 1, state, remembered())
            tolerate(run, log, run.checkpoints.raise_if_failed)
        stop.reached()
        tolerate(run, log, run.checkpoints.wait)
        log.say(f"trained weights: {export(folder / 'lora', run.pipe, state.ema)}")
    return True


@partial(jax.profiler.annotate_function, name="checkpoint")
def tolerate(run: Run, log: RunLog, action: Callable[[], None]) -> None:
    """Do what a failed save may end, where `config.save_failure` says so."""
    try:
        action()
    except SaveError as error:
        if run.config.save_failure == "stop":
            raise
        log.say(f"[bold red]warning[/bold red] {error}; the run goes on (config.save_failure)")


def save(run: Run, log: RunLog, epoch: int, state: TrainState, meta: dict[str, Any]) -> None:
    """Begin a checkpoint, once the one before is written."""
    tolerate(run, log, run.checkpoints.wait)
    tolerate(run, log, lambda: run.checkpoints.save(epoch, state, meta, files(run)))


def end_early(
    run: Run, log: RunLog, stop: Preemption, epoch: int, state: TrainState, meta: dict[str, Any]
) -> None:
    """Save what there was when the epoch began, where that is not saved yet."""
    stop.reached()
    if run.checkpoints.begun != epoch:
        save(run, log, epoch, state, meta)
    run.checkpoints.wait()
    log.say(
        f"stopped by SIGTERM, saved after {epoch} epochs; to go on: --config.run_name={run.folder.name} --resume"
    )


FLAGS = flags.FLAGS
ENCODE = [sys.executable, str(Path(__file__).with_name("encode_prompts.py"))]
config_flags.DEFINE_config_file(
    "config", None, "configs/flux_grpo.py, or configs/flux_grpo.py:PRESET"
)
flags.DEFINE_bool("resume", False, "go on with config.run_name, or with this preset's latest run")
flags.DEFINE_bool(
    "auto_resume", False, "as --resume where config.run_name exists, else start it: for schedulers"
)
flags.DEFINE_bool(
    "allow_config_change", False, "resume with a config that computes something else than before"
)


def main(_: Sequence[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    logging.get_absl_logger().setLevel(
        "CRITICAL"
    )  # what Orbax logs with tracebacks comes as an error of ours
    config, leave = FLAGS.config, contextlib.ExitStack()
    with leave:
        try:
            connect_by_flags()
            stop = Preemption(config.preemption_grace)
            folder, epoch = open_run(config, leave)
            keep_compiled(config.compilation_cache)
            run, state = set_up(config, folder, ENCODE)
            leave.callback(run.bridge.close)
        except (ValueError, OSError) as error:  # what a person can mend: paths, sizes, names
            sys.exit(f"error: {error}")
        try:
            # which checkpoint it is the first process has found out
            resumed = int(
                sum_over_processes(
                    np.int32([0 if process_index() or epoch is None else epoch + 1])
                )[0]
            )
            over = train(run, state, stop, resumed - 1 if resumed else None)
        except (OSError, RewardError, FloatingPointError, SaveError, RestoreError) as error:
            sys.exit(f"error: {error}")
        except jax.errors.JaxRuntimeError as error:
            if process_count() == 1:
                raise
            sys.exit(
                f"error: the connection to another process broke ({str(error).splitlines()[0]})"
            )
        except KeyboardInterrupt:
            sys.exit(f"stopped; to go on: --config.run_name={folder.name} --resume")
        finally:
            stop.reached()
            with contextlib.suppress(SaveError):  # told above, or less than what is being told
                run.checkpoints.close()
        if over and reports(config):
            run.bridge.close()
            cache = run.cache
            del run, state  # their memory is the report's now
            report_run(config, folder, cache)


def report_run(config: ConfigDict, folder: Path, cache: TextCache) -> None:
    """RealBench's report on the run: its weights beside those it began with. SIGTERM ends it as it ends any program."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    console, kind = Console(highlight=False), "lora" if config.train.lora else "model"
    free = SAFE.fullmatch(folder.name) and folder.name not in (BASE, *TAKEN)
    trained = [f"{folder.name if free else 'trained'}={folder / 'lora'}"]
    try:
        loras, models = (trained, []) if config.train.lora else ([], trained)
        entries = read_entries(config.pretrained, loras, models, [], None, base=True)
        options = {"seed": 0, "console": console}  # evaluate.py's default: it finds these pictures
        sets = read_sets(config.evaluate.prompts)
        evaluated = benchmark(
            config, entries, sets, folder, remake=True, encode=ENCODE, cache=cache, **options
        )
        index = build_report(config, evaluated, folder, judge="embedded", **options)
    except (ValueError, OSError, RewardError) as error:
        again = (
            f"python scripts/evaluate.py --config ... --{kind} {folder / 'lora'} --judge embedded"
        )
        sys.exit(f"error: the run is over, but not its report: {error}\nto make it: {again}")
    print(f"report: {index}")


def open_run(config: ConfigDict, leave: contextlib.ExitStack) -> tuple[Path, int | None]:
    """The run's folder, locked by the first process until `leave` closes, and the epoch of the checkpoint that it goes
    on from.
    """
    if process_count() > 1 and not config.run_name:
        raise ValueError("several processes need one name for their run: set --config.run_name")
    if (
        process_index()
    ):  # its folder may not exist yet, and what it goes on from the first process says
        return Path(config.run_root) / config.run_name, None
    there = (Path(config.run_root) / config.run_name / "config.json").exists() and bool(
        config.run_name
    )
    resume = FLAGS.resume or (FLAGS.auto_resume and there)
    folder = run_folder(config.run_root, config.run_name, config.preset, resume)
    print(
        f"preset {config.preset} -> {folder}   (another preset: --config configs/flux_grpo.py:flux_dev_8xh200)"
    )
    leave.enter_context(run_lock(folder))
    return folder, resume_from(folder, config, FLAGS.allow_config_change) if resume else None


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
