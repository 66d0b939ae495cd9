"""Train a text-to-image model with reinforcement learning.

    python scripts/train.py --config configs/flux_grpo.py                  the embedded model
    python scripts/train.py --config configs/flux_grpo.py:flux_dev_8xh200  RealGen's recipe
    python scripts/train.py --config ... --config.run_name=NAME --resume   resume a run
    python scripts/launch.py --processes 2 scripts/train.py --config ...   several processes

config.stage "rewriter" trains a language model that rewrites prompts for the image model
(configs/rewriter_grpo.py, docs/rewriter.md). "diffusion", the default, trains the image model:

prompts -> text embeddings -> rollout -> pictures -> rewards -> advantages -> update -> checkpoint
                                                    `-> rewards that learn -'

The run ends with RealBench's report if config.evaluate.after_training is set. See docs/training.md
and docs/clusters.md.
"""

from realgen_jax import process

process.begin(__name__)  # before the imports that take seconds

import contextlib
import itertools
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from clu import parameter_overview
from ml_collections import ConfigDict

from realgen_jax.advantages import AdvantageError, advantages_of, trained_weights
from realgen_jax.checkpoint import RestoreError, SaveError
from realgen_jax.command_line import define_config, parse_flags
from realgen_jax.data import overlaps, prompt_batches, read_originals, read_prompts
from realgen_jax.files import content_digest, write_whole
from realgen_jax.hosts import (
    broadcast_text,
    coordinator_host,
    hide_gpus,
    process_count,
    process_index,
    start_devices,
    sum_over_processes,
)
from realgen_jax.models.language import load_with_adapter
from realgen_jax.models.loading import find_family
from realgen_jax.models.prompts import embed_prompts
from realgen_jax.models.trainable import make_trainable
from realgen_jax.nn.convert import leaves
from realgen_jax.profiling.step_traces import StepTraces, phase
from realgen_jax.realbench.entries import BASE, RESERVED, read_entries
from realgen_jax.realbench.evaluate import evaluate_entries
from realgen_jax.realbench.prompts import SAFE, read_sets
from realgen_jax.realbench.summarize import summarize
from realgen_jax.rewriter.child import BATCH as REWRITES
from realgen_jax.rewriter.embeddings import FreshTexts
from realgen_jax.rewriter.files import open_rewriter
from realgen_jax.rewriter.writer import Writer, rewrite_all, whole_batch
from realgen_jax.sharding import make_mesh
from realgen_jax.text_cache import TextCache
from realgen_jax.training.evaluation import evaluate_if_due, export, say_what_judges
from realgen_jax.training.inputs import check_unchanged, input_digests
from realgen_jax.training.kl_gate import gate_epoch
from realgen_jax.training.learning import begin_learning, draw_seeds
from realgen_jax.training.log import NoLog, RunLog, step_columns
from realgen_jax.training.monitor import warn_of_deviation
from realgen_jax.training.preemption import Preemption, connect_by_flags
from realgen_jax.training.programs import keep_compiled
from realgen_jax.training.progress import plain_console
from realgen_jax.training.rewriting import RewriteError
from realgen_jax.training.run import LEARNING, Run, check, check_shapes, reports, set_up
from realgen_jax.training.run_folder import (
    can_resume,
    resume_from,
    run_folder,
    run_lock,
    write_digests,
)
from realgen_jax.training.saving import Saver, stop_if_not_finite
from realgen_jax.training.scoring import ScoringError, scores_of_all, weighted_mean
from realgen_jax.training.stage import finite_latents
from realgen_jax.training.stages import OUTPUTS, STAGES
from realgen_jax.training.wandb_run import open_wandb
from realgen_jax.update import TrainState
from reward_bridge.adversary import join
from reward_bridge.bridge import RewardBridge
from reward_bridge.chat import ChatTokenizer
from reward_bridge.devices import gpus_for_jax
from reward_bridge.digests import run_digests, score_keys, served_rewards
from reward_bridge.encoders import TextEncoders, open_encoders, open_window
from reward_bridge.groups import group_problems, report_problems
from reward_bridge.judges import make_judge
from reward_bridge.prompts import prompt_problems
from reward_bridge.reward import RewardError
from reward_bridge.setup import (
    Rewards,
    encoder_problems,
    negative_problems,
    open_rewards,
    reward_devices,
    reward_problems,
    run_rewards,
)
from reward_bridge.terminal import show_messages


def train(
    run: Run,
    state: TrainState,
    log: RunLog | NoLog,
    traces: StepTraces,
    preemption: Preemption,
    resumed: int | None,
) -> bool:
    """Train until `num_epochs` are done or a held-out reward or a signal ends the run.

    resumed: the epoch of the checkpoint to resume from. Returns whether the run is over; it is not
    if a signal has ended it.
    """
    config = run.config
    weights = trained_weights(config)
    layout = run.recipe.layout
    stage = STAGES[config.stage](run)
    data = prompt_batches(len(run.prompts), stage.prompts, config.seed)
    saver = Saver(run, data, log)
    first = 0
    if resumed is not None:
        state = saver.restore(resumed, state)
        first = resumed
    say_what_judges(run, log)

    for epoch in range(first, config.num_epochs + 1):
        traces.begin(epoch + 1)
        seconds = {}
        scoring_before = dict(run.scorer.seconds)

        # The state that is saved if a signal interrupts this epoch.
        start = saver.snapshot(epoch, state)
        if preemption.wanted_anywhere():
            saver.leave(start, preemption)
            return False

        # -- Evaluate. The run ends after the last evaluation, or when held-out rewards fall.
        if evaluate_if_due(run, stage, log, epoch, state.ema, saver.history):
            break

        # -- Sample. Each call's pictures go to the rewards while the next call samples.
        refused_before = run.scorer.refused
        seeds = draw_seeds(run.key(LEARNING), epoch, layout.calls + len(run.learning))
        sampled = stage.sample(state, epoch, next(data), seeds, preemption, seconds)
        if sampled is None:
            saver.leave(start, preemption)
            return False
        latents = finite_latents(sampled.calls)
        stop_if_not_finite(latents, epoch, "rollout (velocity)", run)

        with phase("reward_wait", seconds):
            # -- Score. Waits for the slowest reward: {reward: [groups, group]}.
            scores = scores_of_all([call.scores for call in sampled.calls], layout.images)
            groups = stage.groups(sampled, scores)
            reward = weighted_mean(groups, weights)

            # -- Advantages within a group, the pictures or the rewrites of one prompt.
            advantages = advantages_of(config, groups)

            # -- The weights of the pictures' KL, by the ranks of other rewards: the same shape.
            kl_weights, gate = gate_epoch(config, groups, saver.history)

            # -- Learn: the rewards that are due by their schedule, in their own threads.
            learning = begin_learning(
                run.scorer, run.learning, epoch, scores, seeds[layout.calls :]
            )
        details = stage.columns(state, epoch, sampled, reward, log, saver.history, epoch == first)

        # -- Update, unless the generator is skipped while its rewards learn.
        with phase("update", seconds):
            steps = []
            if not learning.generator_rests:
                state, steps = stage.update(state, sampled, advantages, kl_weights, epoch)
        with phase("reward_learning", seconds):
            details |= learning.result() | gate

        # -- Log. From here on there is something to save when Ctrl-C ends the run.
        preemption.hold(saver.lost)
        for name, mean in scores.reference_means().items():
            details[f"reward/{name}/references"] = mean
        for name in config.reward.watched:
            details[name] = float(groups[name].mean())
        for name in scores.rewards:
            scoring = run.scorer.seconds[name] - scoring_before[name]
            details[f"seconds/scoring/{name}"] = scoring
        for name, refused in run.scorer.refused.items():
            details[f"refused/{name}"] = refused - refused_before[name]
        if epoch == first:
            warn_of_deviation(log, steps, config)
        columns = step_columns(steps, run.recipe.objective.largest_metrics)
        trained = {name: groups[name] for name in weights}
        pictures = layout.calls * layout.images
        log.train(epoch + 1, trained, reward, columns, seconds, pictures, details)

        # -- Save.
        saver.save_if_due(epoch + 1, state)

    preemption.reached()
    saver.wait()
    log.say(f"trained weights: {export(run.folder / stage.output, stage, state.ema)}")
    return True


def open_log(run: Run, state: TrainState, first: int, wandb_run: Any | None) -> RunLog | NoLog:
    """The run's log, in the first process only; also writes the table of trained arrays."""
    if process_index():
        return NoLog()
    arrays = dict(leaves(state.trainable))
    overview = parameter_overview.get_parameter_overview(arrays, include_stats=False)
    write_whole(run.folder / "trainable.txt", overview + "\n")
    write_digests(run.folder, run.digests)
    config = run.config
    return RunLog(run.folder, config.to_dict(), first, config.num_epochs, wandb_run)


# -- Set-up and command line.

# The program that computes text embeddings, in a separate process.
ENCODE = (sys.executable, str(Path(__file__).with_name("encode_prompts.py")))

FLAGS = flags.FLAGS
define_config()
flags.DEFINE_bool("resume", False, "resume config.run_name, or this preset's latest run")
flags.DEFINE_bool(
    "auto_resume", False, "resume config.run_name if it exists, else start it: for schedulers"
)
flags.DEFINE_bool("allow_config_change", False, "resume with a config that changes the results")


def run_training(_: Sequence[str]) -> None:
    """Set up, train and report. Errors that the user can fix end the program with one line."""
    logging.set_verbosity(logging.WARNING)
    # Orbax logs failures with tracebacks; we report them as our own errors.
    logging.get_absl_logger().setLevel("CRITICAL")
    show_messages()
    config = FLAGS.config
    with contextlib.ExitStack() as stack:
        try:
            connect_by_flags()
            preemption = Preemption(config.preemption_grace)
            folder, resume = open_run(config, stack)
            keep_compiled(config.compilation_cache)
            served = check_all(config)
            digests = all_digests(config, served)
            epoch = None
            if resume:
                epoch = resume_from(folder, config, digests, FLAGS.allow_config_change)
            wandb_run = open_wandb(config.wandb_project, folder.name, config.to_dict())
            run, state, rewards = load_run(config, folder, digests)
            stack.callback(rewards.bridge.close)
            if run.rewriter:
                stack.callback(run.rewriter.encoders.close)
            resumed = agree_on_checkpoint(epoch)
            log = open_log(run, state, resumed or 0, wandb_run)
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")

        try:
            with log, StepTraces(run.folder, config.profile.steps, log) as traces:
                over = train(run, state, log, traces, preemption, resumed)
        except (
            OSError,
            FloatingPointError,
            AdvantageError,
            RewardError,
            RewriteError,
            ScoringError,
            SaveError,
            RestoreError,
        ) as error:
            sys.exit(f"error: {error}")
        except jax.errors.JaxRuntimeError as error:
            if process_count() == 1:
                raise
            reason = str(error).splitlines()[0]
            sys.exit(f"error: the connection to another process broke ({reason})")
        finally:
            preemption.reached()
            # A failed save was reported above, or matters less than the error being reported.
            with contextlib.suppress(SaveError):
                run.checkpoints.close()

        if not over:
            sys.exit(preemption.status)
        if reports(config):
            kept = f"stopped, without a report; {report_advice(config, folder)}"
            preemption.release(kept)
            if preemption.wanted():
                process.leave(kept, preemption.status)
            # The report loads its own models and rewards.
            rewards.bridge.close()
            cache = run.cache
            encoders = run.rewriter.encoders if run.rewriter else None
            del run, state, rewards
            report_run(config, folder, cache, digests, served, encoders)


def open_run(config: ConfigDict, stack: contextlib.ExitStack) -> tuple[Path, bool]:
    """The run's folder, and whether this process looks there for a checkpoint to resume from.

    The first process does. It locks the folder until `stack` closes.
    """
    if process_count() > 1 and not config.run_name:
        raise ValueError("several processes need one name for their run: set --config.run_name")
    if process_index():
        return Path(config.run_root) / config.run_name, False

    resume = FLAGS.resume or (FLAGS.auto_resume and can_resume(config.run_root, config.run_name))
    folder = run_folder(config.run_root, config.run_name, config.preset, resume)
    print(
        f"preset {config.preset} -> {folder}   "
        "(another preset: --config configs/flux_grpo.py:flux_dev_8xh200)"
    )
    stack.enter_context(run_lock(folder))
    return folder, resume


def agree_on_checkpoint(epoch: int | None) -> int | None:
    """Tell all processes which checkpoint the first one has found."""
    number = 0 if process_index() or epoch is None else epoch + 1
    number = int(sum_over_processes(np.int32([number]))[0])
    return number - 1 if number else None


def check_all(config: ConfigDict) -> dict[str, str]:
    """Check the whole config, and ask the servers in it, before anything is loaded.

    Returns what the servers tell, {reward: digest}. Raises ValueError with one line per problem.
    """
    report_scores = list(config.evaluate.scores) if reports(config) else []
    problems = reward_problems(config.reward, report_scores)
    if config.stage == "rewriter" and not problems:
        problems += encoder_problems(config.prompts.device, config.reward)
    problems += group_problems(config.reward, config.sample, process_count())
    problems += report_problems(config.reward, report_scores)
    if config.train.advantages == "paco":
        problems += negative_problems(config.reward)
    check(config, problems)
    check_shapes(config, device_count(config.reward))
    problems = prompt_problems(config.reward, run_rewards(config.reward), scored_prompts(config))
    problems += prompt_problems(config.reward, report_scores, report_prompts(config))
    if problems:
        raise ValueError("\n".join(problems))
    names = [*run_rewards(config.reward), *report_scores]
    return served_rewards(config.reward, names)


def scored_prompts(config: ConfigDict) -> dict[str, list[str]]:
    """The prompts of training and evaluations as rewards see them, {key of the config: prompts}."""
    read = read_originals if config.reward.score_original else read_prompts
    return {f"config.prompts.{name}": read(config.prompts[name]) for name in ("train", "test")}


def report_prompts(config: ConfigDict) -> dict[str, Sequence[str]]:
    """The prompts of the report at the end, {key of the config: prompts}; {} without a report."""
    if not reports(config):
        return {}
    sets = read_sets(config.evaluate.prompts)
    return {f"config.evaluate.prompts.{part.name}": part.prompts for part in sets}


def all_digests(config: ConfigDict, served: Mapping[str, str]) -> dict[str, str]:
    """The digests of everything that training reads, {key of the config: digest}."""
    rewards = run_digests(config.reward, run_rewards(config.reward), served, content_digest)
    return {**input_digests(config), **rewards}


def load_run(
    config: ConfigDict, folder: Path, digests: Mapping[str, str]
) -> tuple[Run, TrainState, Rewards]:
    """Load embeddings, rewards and the model, in this order.

    Text encoders and rewards come before JAX, which preallocates the memory of its devices.
    """
    prompts = read_prompts(config.prompts.train)
    test_prompts = read_prompts(config.prompts.test)
    scored, scored_test = scored_prompts(config).values()
    sets = report_prompts(config)
    tell_overlaps(prompts, test_prompts, sets)
    # The rewriter's texts are encoded when they are written.
    fixed = [] if config.stage == "rewriter" else [prompts, test_prompts]
    texts = list(itertools.chain(*fixed, *sets.values()))
    cache = embed_prompts(texts, config.pretrained, config.prompts, ENCODE)

    # Rewards that learn in several processes average their gradients.
    meet = None
    if process_count() > 1:
        meet = partial(join, broadcast_text, coordinator_host(), process_index(), process_count())
    rewards = open_rewards(
        config.reward,
        prompts=scored,
        hide_from_jax=hide_gpus,
        jax_platforms=jax.config.jax_platforms,
        meet=meet,
    )
    tokenizer, encoders = None, None
    if config.stage == "rewriter":
        tokenizer, encoders = open_texts(config, [*prompts, *test_prompts])
    run, state = set_up(
        config,
        folder,
        digests=digests,
        cache=cache,
        prompts=prompts,
        test_prompts=test_prompts,
        scorer=rewards.bridge,
        learning=rewards.learning,
        metrics=rewards.metrics,
        scored_prompts=scored,
        scored_test_prompts=scored_test,
        tokenizer=tokenizer,
        encoders=encoders,
    )
    return run, state, rewards


def open_texts(config: ConfigDict, prompts: Sequence[str]) -> tuple[ChatTokenizer, TextEncoders]:
    """Open the rewriter's tokenizer and load the image model's text encoders, which stay.

    Raises ValueError for a prompt that is too long.
    """
    settings = config.rewriter
    tokenizer = ChatTokenizer(settings.path, system=settings.system, thinking=settings.thinking)
    tokenizer.encode(prompts, settings.max_prompt_tokens)
    window = config.prompts.max_tokens
    if settings.max_new_tokens > window and not process_index():
        print(
            f"warning: config.rewriter.max_new_tokens is {settings.max_new_tokens}, but the image "
            f"model reads {window} tokens (config.prompts.max_tokens), so a "
            f"rewrite of full length would lose {1 - window / settings.max_new_tokens:.0%} of its "
            "tokens; rewrites that do not fit are not drawn"
        )
    encoders = open_encoders(
        config.pretrained.model,
        find_family(config.pretrained).encoders,
        max_tokens=config.prompts.max_tokens,
        dtype=config.prompts.dtype,
        device=config.prompts.device,
        deadline=config.reward.deadline,
        retries=config.reward.retries,
    )
    return tokenizer, encoders


def tell_overlaps(
    prompts: Sequence[str], test_prompts: Sequence[str], sets: Mapping[str, Sequence[str]]
) -> None:
    """Print a warning for each set of test or report prompts that is not new to the run."""
    if process_index():
        return
    others = {"config.prompts.test": test_prompts, **sets}
    lines = overlaps("config.prompts.train", prompts, others)
    lines += overlaps("config.prompts.test", test_prompts, sets)
    for line in lines:
        print(f"warning: {line}")


def device_count(reward: ConfigDict) -> int:
    """The number of devices that JAX will train on. GPUs are counted without starting JAX."""
    devices = reward_devices(reward).values()
    gpus = gpus_for_jax(devices, jax.config.jax_platforms, reward.share_gpu)
    return gpus * process_count() if gpus else len(start_devices())


def report_run(
    config: ConfigDict,
    folder: Path,
    cache: TextCache,
    digests: Mapping[str, str],
    served: Mapping[str, str],
    encoders: TextEncoders | None,
) -> None:
    """Make RealBench's report, which compares the trained model with the initial one.

    digests, served: those at the start of the run, since which nothing may have changed. encoders:
    of a run that rewrites, for its texts.
    """
    console = plain_console()
    kind = entry_kind(config)
    is_free = SAFE.fullmatch(folder.name) and folder.name not in (BASE, *RESERVED)
    name = folder.name if is_free else "trained"
    trained = [f"{name}={folder / OUTPUTS[config.stage]}"]
    entries = {"loras": [], "models": [], "rewriters": [], f"{kind}s": trained}

    def embeddings(prompts: Sequence[str], model: str) -> TextCache | FreshTexts:
        known = set(cache.prompts)
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        if model == config.pretrained.model and not new:
            return cache
        if model == config.pretrained.model and encoders is not None:
            return FreshTexts(cache, new, encoders.encode(new).result())
        return embed_prompts(prompts, config.pretrained, config.prompts, ENCODE, model)

    def scorer() -> RewardBridge:
        return open_rewards(
            config.reward,
            list(config.evaluate.scores),
            hide_from_jax=hide_gpus,
            jax_platforms=jax.config.jax_platforms,
        ).bridge

    def rewrite(rewriter: str, prompts: Sequence[str], _: Path) -> list[str]:
        return rewrite_here(config, rewriter, prompts)

    # Rewrites are of the shortest prompts.
    sets = read_sets(config.evaluate.prompts)
    sets = sets[:1] if config.stage == "rewriter" else sets

    try:
        check_unchanged(digests, all_digests(config, served))
        # The same seed as evaluate.py's default, so that evaluate.py finds these pictures.
        results = evaluate_entries(
            config,
            read_entries(config.pretrained, **entries, pictures=[], photographs=None, base=True),
            sets,
            folder,
            seed=0,
            remake=True,
            score_keys=score_keys(config.reward, config.evaluate.scores, served, content_digest),
            open_scorer=scorer,
            encode=embeddings,
            rewrite=rewrite,
            console=console,
        )
        judge = make_judge("embedded", config.evaluate.arena)
        index = summarize(config, results, folder, judge=judge, seed=0, console=console)
    except (ValueError, OSError, FloatingPointError, RewardError, ScoringError) as error:
        advice = report_advice(config, folder)
        sys.exit(f"error: the run is over, but its report failed: {error}\n{advice}")
    print(f"report: {index}")


def rewrite_here(config: ConfigDict, folder: str, prompts: Sequence[str]) -> list[str]:
    """Return the likeliest rewrites by the rewriter in a folder, as evaluate.py's program does.

    In this process: JAX has claimed the memory of its devices, and another would find none.
    """
    rewriter = open_rewriter(folder)
    settings = rewriter.settings
    window = open_window(
        config.pretrained.model, find_family(config.pretrained).encoders, config.prompts.max_tokens
    )
    mesh = make_mesh(**config.mesh, devices=start_devices())
    model, state = load_with_adapter(rewriter.model, rewriter.adapter, settings.dtype, mesh)
    writer = Writer(
        model=model,
        state=state,
        tokenizer=ChatTokenizer(rewriter.model, system=settings.system, thinking=settings.thinking),
        settings=settings,
        fits=window.fits,
        temperature=0.0,
        top_p=1.0,
        batch=whole_batch(min(REWRITES, len(prompts)), mesh),
    )
    return rewrite_all(writer, prompts, jax.random.key(0))


def entry_kind(config: ConfigDict) -> str:
    """The flag of scripts/evaluate.py that accepts what a run leaves."""
    return "rewriter" if config.stage == "rewriter" else make_trainable(config.train).entry


def report_advice(config: ConfigDict, folder: Path) -> str:
    """How to make the report of a run whose weights are saved."""
    kind = entry_kind(config)
    weights = folder / OUTPUTS[config.stage]
    return (
        f"the trained weights are in {weights}; to make the report: "
        f"python scripts/evaluate.py --config ... --{kind} {weights} --judge embedded"
    )


def main() -> None:
    app.run(run_training, flags_parser=parse_flags)


if __name__ == "__main__":
    main()
