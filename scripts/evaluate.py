"""RealBench: compare how real the pictures of models, LoRAs and folders look.

    python scripts/evaluate.py --config configs/flux_grpo.py --lora runs/NAME/lora
    python scripts/evaluate.py --config configs/flux_grpo.py:flux_dev_8xh200 \\
        --lora runs/NAME/lora --pictures gpt=pictures/gpt-image \\
        --photographs dataset/realbench/photographs --judge api
    python scripts/evaluate.py --config configs/rewriter_grpo.py --rewriter runs/ONE/rewriter \\
        --lora runs/TWO/lora

    python scripts/evaluate.py --config configs/sd3_grpo.py:flow_grpo_sd3_pickscore \\
        --lora runs/NAME/lora --benchmark geneval

With a rewriter, every model also draws the prompts that it rewrites; all are scored against the
prompts themselves.

Prompts, pictures per prompt, rewards and intervals are set in the config (`config.evaluate`).
Pictures and scores are kept in runs/NAME/evaluation; the same command continues an interrupted
evaluation. The report is runs/NAME/report/index.html. docs/realbench.md has the details.
"""

from realgen_jax import process

process.begin(__name__)  # before the imports that take seconds

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict
from rich.console import Console

from realgen_jax.command_line import define_config, parse_flags
from realgen_jax.data import overlaps, read_prompts
from realgen_jax.files import content_digest, expand_home
from realgen_jax.hosts import (
    hide_gpus,
    process_count,
    process_index,
    start_devices,
    wait_for_all,
)
from realgen_jax.models.prompts import embed_prompts
from realgen_jax.realbench.arena import check_arena
from realgen_jax.realbench.benchmarks import BENCHMARKS, open_benchmark
from realgen_jax.realbench.entries import read_entries
from realgen_jax.realbench.evaluate import evaluate_entries
from realgen_jax.realbench.prompts import read_sets
from realgen_jax.realbench.results import PromptSet
from realgen_jax.realbench.summarize import summarize
from realgen_jax.rewriter.child import RewriteProgram
from realgen_jax.text_cache import TextCache
from realgen_jax.training.preemption import connect_by_flags
from realgen_jax.training.programs import keep_compiled
from realgen_jax.training.progress import plain_console
from realgen_jax.training.run_folder import run_lock
from realgen_jax.training.scoring import ScoringError
from reward_bridge.bridge import RewardBridge
from reward_bridge.devices import gpus_for_jax
from reward_bridge.digests import score_keys, served_rewards
from reward_bridge.groups import report_problems
from reward_bridge.judges import make_judge
from reward_bridge.prompts import prompt_problems
from reward_bridge.reward import RewardError
from reward_bridge.setup import missing_rewards, open_rewards, reward_devices
from reward_bridge.terminal import show_messages

# The programs that compute text embeddings and rewrite prompts, in processes of their own.
ENCODE = (sys.executable, str(Path(__file__).with_name("encode_prompts.py")))
REWRITE = (sys.executable, str(Path(__file__).with_name("rewrite.py")))

FLAGS = flags.FLAGS
define_config()
flags.DEFINE_multi_string(
    "lora", [], "[NAME=]PATH of a LoRA: a run's lora/ or best/, a peft folder or a diffusers file"
)
flags.DEFINE_multi_string(
    "model", [], "[NAME=]FOLDER of another FluxPipeline, or of a run's exported transformer"
)
flags.DEFINE_multi_string(
    "pictures", [], "[NAME=]FOLDER of existing pictures: 00000.png, 00001.png, ..."
)
flags.DEFINE_string(
    "photographs", None, "[NAME=]FOLDER of photographs: 00000.jpg belongs to line 0 of the prompts"
)
flags.DEFINE_multi_string(
    "rewriter",
    [],
    "[NAME=]DIR of a run's rewriter/: every model also draws the prompts that it rewrites; only "
    "the set with the shortest prompts is used",
)
flags.DEFINE_bool("base", True, "include the config's own model; --nobase leaves it out")
flags.DEFINE_integer(
    "seed",
    0,
    "seed of the pictures' noise, the intervals and the order of the arena's questions",
    lower_bound=0,
    upper_bound=2**32 - 1,
)
flags.DEFINE_enum(
    "benchmark",
    None,
    sorted(BENCHMARKS),
    "evaluate a published benchmark: its prompts (config.evaluate.benchmarks), pictures per prompt "
    "and score",
)
flags.DEFINE_bool("remake", False, "replace pictures that were made with other settings")
flags.DEFINE_string(
    "judge",
    "none",
    "who compares pictures in the arena: none; embedded, the demo's held-out detector; api, a "
    "model behind an OpenAI-compatible endpoint; human, you; or module:Class of your own",
)


def run(_: Sequence[str]) -> None:
    """Evaluate. Errors that the user can fix end the program with one line."""
    logging.set_verbosity(logging.WARNING)
    show_messages()
    try:
        connect_by_flags()
        evaluate(FLAGS.config, plain_console())
    except (ValueError, OSError, RewardError, ScoringError) as error:
        sys.exit(f"error: {error}")
    except jax.errors.JaxRuntimeError as error:
        if process_count() == 1:
            raise
        reason = str(error).splitlines()[0]
        sys.exit(f"error: lost the connection to another process ({reason})")


def evaluate(config: ConfigDict, console: Console) -> None:
    """Check the flags, evaluate the entries they name, and write the report."""
    # -- Check everything that does not need a model.
    facts = ()
    if FLAGS.benchmark:
        opened = open_benchmark(FLAGS.benchmark, config, FLAGS.seed)
        config, sets, facts = opened.config, opened.sets, opened.facts
    else:
        sets = read_sets(config.evaluate.prompts)
    if FLAGS.rewriter and len(sets) > 1:
        print(f"--rewriter: only the set {sets[0].name}, whose prompts are the shortest, is used")
        sets = sets[:1]
    entries = read_entries(
        config.pretrained,
        FLAGS.lora,
        FLAGS.model,
        FLAGS.pictures,
        FLAGS.photographs,
        FLAGS.base,
        FLAGS.rewriter,
    )
    judge = None
    if FLAGS.judge != "none":
        judge = make_judge(FLAGS.judge, config.evaluate.arena)
        check_arena(entries, config.evaluate.arena, judge)
        if hasattr(judge, "check_connection"):
            judge.check_connection()
    missing = missing_rewards(config.reward, config.evaluate.scores)
    missing += report_problems(config.reward, config.evaluate.scores)
    prompts = {source_of(part): part.prompts for part in sets}
    missing += prompt_problems(config.reward, config.evaluate.scores, prompts)
    if missing:
        raise ValueError("\n".join(missing))
    served = served_rewards(config.reward, config.evaluate.scores)
    # Without GPUs to share with the rewards, JAX can start now: absent devices are an error.
    devices = reward_devices(config.reward, config.evaluate.scores).values()
    if not gpus_for_jax(devices, jax.config.jax_platforms, config.reward.share_gpu):
        start_devices()
    keys = score_keys(config.reward, config.evaluate.scores, served, content_digest)
    folder = evaluation_folder(config, [*FLAGS.lora, *FLAGS.model, *FLAGS.rewriter])

    with contextlib.ExitStack() as stack:
        if process_index() == 0:
            print(f"preset {config.preset} -> {folder}")
            tell_overlaps(config, sets)
            stack.enter_context(run_lock(folder))
        keep_compiled(config.compilation_cache)

        def embed(prompts: Sequence[str], model: str) -> TextCache:
            return embed_prompts(prompts, config.pretrained, config.prompts, ENCODE, model)

        rewriting = RewriteProgram(
            command=REWRITE,
            pipeline=config.pretrained.model,
            max_tokens=config.prompts.max_tokens,
            compilation_cache=config.compilation_cache,
            remake=FLAGS.remake,
        )
        continuing = f"run the same command with --config.run_name={folder.name}"
        process.when_stopped(lambda: f"stopped; to continue, {continuing}")

        # -- Make, read and score the pictures.
        results = evaluate_entries(
            config,
            entries,
            sets,
            folder,
            seed=FLAGS.seed,
            remake=FLAGS.remake,
            score_keys=keys,
            open_scorer=lambda: load_scorer(config),
            encode=embed,
            rewrite=rewriting.rewrite,
            console=console,
        )

        # -- Compare them.
        if FLAGS.benchmark:
            results = replace(results, facts=facts, report=f"report-{FLAGS.benchmark}")
        if process_index() == 0:
            index = summarize(
                config, results, folder, judge=judge, seed=FLAGS.seed, console=console
            )
            print(f"report: {index}")
        wait_for_all("evaluated")


def tell_overlaps(config: ConfigDict, sets: Sequence[PromptSet]) -> None:
    """Print a warning for each set with prompts that the config trains on.

    The training prompts are not needed otherwise, and may be on another machine.
    """
    others = {source_of(prompts): prompts.prompts for prompts in sets}
    with contextlib.suppress(ValueError, OSError):
        trained = read_prompts(config.prompts.train)
        for line in overlaps("config.prompts.train", trained, others):
            print(f"warning: {line}")


def source_of(prompts: PromptSet) -> str:
    """The config's key for the file of a set."""
    group = "benchmarks" if prompts.name == FLAGS.benchmark else "prompts"
    return f"config.evaluate.{group}.{prompts.name}"


def load_scorer(config: ConfigDict) -> RewardBridge:
    """Load the rewards of config.evaluate.scores, in the first process only."""
    return open_rewards(
        config.reward,
        list(config.evaluate.scores),
        hide_from_jax=hide_gpus,
        jax_platforms=jax.config.jax_platforms,
        load=process_index() == 0,
    ).bridge


def evaluation_folder(config: ConfigDict, values: Sequence[str]) -> Path:
    """Return the folder for pictures and report. values: of --lora, --model and --rewriter.

    It is the folder of config.run_name; else that of the run to which the first LoRA or model
    belongs; else a new one, named by preset, date and time. Raises ValueError if each of several
    processes would choose a new one.
    """
    if config.run_name:
        return Path(config.run_root) / config.run_name
    for value in values:
        name, equals, path = value.partition("=")
        has_name = equals and "/" not in name
        for folder in expand_home(path if has_name else value).parents:
            if (folder / "metrics.jsonl").exists() and (folder / "config.json").exists():
                return folder
    if process_count() > 1:
        raise ValueError("several processes need one folder: set --config.run_name")
    return Path(config.run_root) / f"{config.preset}-{datetime.now():%Y%m%d-%H%M%S}"


def main() -> None:
    app.run(run, flags_parser=parse_flags)


if __name__ == "__main__":
    main()
