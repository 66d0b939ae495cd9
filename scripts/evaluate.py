"""RealBench: how real the pictures of models, LoRAs and folders look, in one report.

    python scripts/evaluate.py --config configs/flux_grpo.py --lora runs/NAME/lora
    python scripts/evaluate.py --config configs/flux_grpo.py:flux_dev_8xh200 --lora runs/NAME/lora \\
        --pictures gpt=pictures/gpt-image --photographs dataset/realbench/photographs --judge api

Prompts, pictures of a prompt, rewards and intervals are the config's (`config.evaluate`). Pictures and scores are kept
in runs/NAME/evaluation, and a call that was stopped goes on where it was. The report is runs/NAME/report/index.html.
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
from realgen_jax.realbench.benchmark import build_report, evaluate
from realgen_jax.realbench.entries import read_entries
from realgen_jax.realbench.prompts import read_sets
from realgen_jax.training.preemption import connect_by_flags
from realgen_jax.training.run import keep_compiled
from realgen_jax.training.run_folder import run_lock
from reward_bridge.bridge import RewardError

FLAGS = flags.FLAGS
ENCODE = [sys.executable, str(Path(__file__).with_name("encode_prompts.py"))]
config_flags.DEFINE_config_file(
    "config", None, "configs/flux_grpo.py, or configs/flux_grpo.py:PRESET"
)
flags.DEFINE_multi_string(
    "lora", [], "[NAME=]PATH of a LoRA: a run's lora/ or best/, a peft folder, diffusers' file"
)
flags.DEFINE_multi_string(
    "model", [], "[NAME=]FOLDER of another FluxPipeline, or of a run's exported transformer"
)
flags.DEFINE_multi_string(
    "pictures", [], "[NAME=]FOLDER of pictures made by something else: 00000.png, 00001.png, ..."
)
flags.DEFINE_string(
    "photographs", None, "[NAME=]FOLDER of photographs: 00000.jpg belongs to line 0 of the prompts"
)
flags.DEFINE_bool("base", True, "the config's own model is an entry too; --nobase leaves it out")
flags.DEFINE_integer(
    "seed", 0, "root of the pictures' noise, of the intervals and of the arena's order"
)
flags.DEFINE_bool("remake", False, "make pictures again that were made with something else")
flags.DEFINE_enum(
    "judge", "none", ["none", "embedded", "api", "human"], "who compares pictures in the arena"
)


def main(_: Sequence[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    config, console, folder = FLAGS.config, Console(highlight=False), None
    with contextlib.ExitStack() as leave:
        try:
            connect_by_flags()
            sets = read_sets(config.evaluate.prompts)
            named = (FLAGS.lora, FLAGS.model, FLAGS.pictures, FLAGS.photographs, FLAGS.base)
            entries = read_entries(config.pretrained, *named)
            if FLAGS.judge != "none":
                from realgen_jax.realbench.arena import check_arena

                check_arena(entries, config.evaluate.arena, FLAGS.judge)
            folder = evaluation_folder(config, [*FLAGS.lora, *FLAGS.model])
            if process_index() == 0:
                print(f"preset {config.preset} -> {folder}")
                leave.enter_context(run_lock(folder))
            keep_compiled(config.compilation_cache)
            options = {"seed": FLAGS.seed, "console": console}
            evaluated = evaluate(
                config, entries, sets, folder, remake=FLAGS.remake, encode=ENCODE, **options
            )
            if process_index() == 0:
                index = build_report(config, evaluated, folder, judge=FLAGS.judge, **options)
                print(f"report: {index}")
            wait_for_all("evaluated")
        except (ValueError, OSError, RewardError) as error:  # what a person can mend
            sys.exit(f"error: {error}")
        except jax.errors.JaxRuntimeError as error:
            if process_count() == 1:
                raise
            sys.exit(
                f"error: the connection to another process broke ({str(error).splitlines()[0]})"
            )
        except KeyboardInterrupt:
            sys.exit(
                f"stopped; to go on: the same command with --config.run_name={folder.name if folder else 'NAME'}"
            )


def evaluation_folder(config: ConfigDict, words: Sequence[str]) -> Path:
    """config.run_name's, else that of the run which the first LoRA or model lies in, else preset, date and time."""
    if config.run_name:
        return Path(config.run_root) / config.run_name
    for word in words:
        path = Path(word.partition("=")[2] if "=" in word.partition("/")[0] else word).expanduser()
        for run in path.parents:
            if (run / "metrics.jsonl").exists() and (run / "config.json").exists():
                return run
    if process_count() > 1:
        raise ValueError("several processes need one folder: set --config.run_name")
    return Path(config.run_root) / f"{config.preset}-{datetime.now():%Y%m%d-%H%M%S}"


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
