"""RealBench: how real the pictures of models, LoRAs and folders look, in one report.

    python scripts/evaluate.py --config configs/flux_grpo.py --lora runs/NAME/lora
    python scripts/evaluate.py --config configs/flux_grpo.py:flux_dev_8xh200 \\
        --lora runs/NAME/lora --pictures gpt=pictures/gpt-image \\
        --photographs dataset/realbench/photographs --judge api

Prompts, pictures per prompt, rewards and intervals are set in the config (`config.evaluate`).
Pictures and scores are kept in runs/NAME/evaluation; the same command continues after a stop. The
report is runs/NAME/report/index.html. docs/realbench.md explains all of it.
"""

import contextlib
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags
from rich.console import Console

from realgen_jax.config import parse_flags
from realgen_jax.hosts import process_count, process_index, wait_for_all
from realgen_jax.realbench.arena import check_arena
from realgen_jax.realbench.entries import read_entries
from realgen_jax.realbench.evaluate import evaluate_entries
from realgen_jax.realbench.prompts import read_sets
from realgen_jax.realbench.scores import ScoringError
from realgen_jax.realbench.summarize import summarize
from realgen_jax.text_cache import TextCache, ensure_encoded
from realgen_jax.training.log import run_lock
from realgen_jax.training.preemption import connect_by_flags
from realgen_jax.training.run import keep_compiled, missing_rewards, reward_devices
from reward_bridge.bridge import RewardError
from reward_bridge.judges import make_judge
from reward_bridge.scorer import BridgeScorer, open_scorer

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file(
    "config", None, "configs/flux_grpo.py, or configs/flux_grpo.py:PRESET"
)
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
flags.DEFINE_bool("base", True, "include the config's own model; --nobase leaves it out")
flags.DEFINE_integer(
    "seed", 0, "seed of the pictures' noise, the intervals and the order of the arena's questions"
)
flags.DEFINE_bool("remake", False, "replace pictures that were made with other settings")
flags.DEFINE_enum(
    "judge",
    "none",
    ["none", "embedded", "api", "human"],
    "who compares pictures in the arena: the demo's held-out detector, a model behind an "
    "OpenAI-compatible endpoint, or you",
)


def run(_: Sequence[str]) -> None:
    """Evaluate, and end with a one-line error for what the user can mend."""
    logging.set_verbosity(logging.WARNING)
    try:
        connect_by_flags()
        evaluate(FLAGS.config, Console(highlight=False))
    except (ValueError, OSError, RewardError, ScoringError) as error:
        sys.exit(f"error: {error}")
    except jax.errors.JaxRuntimeError as error:
        if process_count() == 1:
            raise
        reason = str(error).splitlines()[0]
        sys.exit(f"error: lost the connection to another process ({reason})")
    except KeyboardInterrupt:
        sys.exit("stopped")


def evaluate(config: ConfigDict, console: Console) -> None:
    """Check the flags, evaluate the entries they name, and write the report."""
    # -- Check everything that needs no model.
    sets = read_sets(config.evaluate.prompts)
    entries = read_entries(
        config.pretrained, FLAGS.lora, FLAGS.model, FLAGS.pictures, FLAGS.photographs, FLAGS.base
    )
    judge = None
    if FLAGS.judge != "none":
        judge = make_judge(FLAGS.judge, config.evaluate.arena)
        check_arena(entries, config.evaluate.arena, judge)
    missing = missing_rewards(config.reward, config.evaluate.scores)
    if missing:
        raise ValueError("\n".join(missing))
    folder = evaluation_folder(config, [*FLAGS.lora, *FLAGS.model])

    with contextlib.ExitStack() as stack:
        if process_index() == 0:
            print(f"preset {config.preset} -> {folder}")
            stack.enter_context(run_lock(folder))
        keep_compiled(config.compilation_cache)

        try:
            # -- Make, read and score the pictures.
            results = evaluate_entries(
                config,
                entries,
                sets,
                folder,
                seed=FLAGS.seed,
                remake=FLAGS.remake,
                open_scorer=lambda: load_scorer(config),
                encode=lambda prompts, model: encode(prompts, model, config),
                console=console,
            )

            # -- Compare them.
            if process_index() == 0:
                index = summarize(
                    config, results, folder, judge=judge, seed=FLAGS.seed, console=console
                )
                print(f"report: {index}")
        except KeyboardInterrupt:
            sys.exit(
                f"stopped; to continue, run the same command with --config.run_name={folder.name}"
            )
        wait_for_all("evaluated")


def load_scorer(config: ConfigDict) -> BridgeScorer:
    """Load the rewards of config.evaluate.scores, in the first process only."""
    devices = reward_devices(config.reward, config.evaluate.scores)
    return open_scorer(config.reward, devices, load=process_index() == 0)


def encode(prompts: Sequence[str], model: str, config: ConfigDict) -> TextCache:
    """Return the prompts' embeddings by a model's text encoders."""
    return ensure_encoded(prompts, model, config.prompts)


def evaluation_folder(config: ConfigDict, values: Sequence[str]) -> Path:
    """Return the folder for pictures and report. values: those of --lora and --model.

    It is config.run_name's; otherwise that of the run to which the first LoRA or model belongs;
    otherwise a new one with preset, date and time. Raises ValueError if several processes would
    choose a new one each.
    """
    if config.run_name:
        return Path(config.run_root) / config.run_name
    for value in values:
        name, equals, path = value.partition("=")
        has_name = equals and "/" not in name
        for folder in Path(path if has_name else value).expanduser().parents:
            if (folder / "metrics.jsonl").exists() and (folder / "config.json").exists():
                return folder
    if process_count() > 1:
        raise ValueError("several processes need one folder: set --config.run_name")
    return Path(config.run_root) / f"{config.preset}-{datetime.now():%Y%m%d-%H%M%S}"


def main() -> None:
    app.run(run, flags_parser=parse_flags)


if __name__ == "__main__":
    main()
