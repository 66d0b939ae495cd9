"""Rewrite the prompts of a file with a trained rewriter, for training or sampling an image model.

    python scripts/rewrite.py --rewriter runs/NAME/rewriter --prompts short.txt --out long.jsonl \\
        --pipeline models/FLUX.1-dev

The output has one JSON object a line: "prompt", the rewrite, and "original", the user's prompt. The
share --keep of the lines stays as it is. A rewrite that cannot be drawn is never written: the
user's prompt stands in its place, and the program says how many there were. An interrupted call
continues where it stopped. A rewrite depends only on --seed, its line and its copy.
"""

from realgen_jax import process

process.begin(__name__)  # before the imports that take seconds

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from realgen_jax.data import read_prompts
from realgen_jax.files import content_digest, file_lock
from realgen_jax.hosts import start_devices
from realgen_jax.models import get_family
from realgen_jax.models.language import load_with_adapter
from realgen_jax.models.sources import pipeline_class
from realgen_jax.rewriter.files import Rewriter, open_rewriter
from realgen_jax.rewriter.output import WRITTEN, Line, Output, plan_lines
from realgen_jax.rewriter.writer import Fits, Rewrite, Writer, whole_batch
from realgen_jax.sharding import make_mesh
from realgen_jax.training.programs import keep_compiled
from realgen_jax.training.progress import plain_console, progress_bars
from reward_bridge.chat import ChatTokenizer
from reward_bridge.encoders import open_window


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rewriter", type=Path, required=True, help="a run's rewriter/: weights and rewriter.json")
    add("--prompts", required=True, help="prompt file (.txt, .jsonl)")
    add("--out", type=Path, required=True, help="output file, .jsonl")
    add("--model", default="", help="folder of the language model that was trained, if it moved")
    add("--pipeline", default="", help="image model: longer rewrites than it reads are not written")
    add("--max_tokens", type=int, default=512, help="tokens that it reads (config.prompts)")
    add("--per_prompt", type=int, default=1, help="lines of each prompt")
    add("--keep", type=float, default=0.25, help="share of the lines that are not rewritten")
    add("--seed", type=int, default=0, help="root of the rewrites' noise and of --keep's choice")
    add("--temperature", type=float, help="0: the most probable words; default: that of training")
    add("--top_p", type=float, default=1.0, help="share of the probability that is drawn from")
    add("--batch", type=int, default=32, help="prompts of one call")
    add("--remake", action="store_true", help="replace an output made with other settings")
    add("--quiet", action="store_true", help="print errors and progress only")
    add("--compilation_cache", default="", help="folder for compiled programs")
    args = parser.parse_args()
    for problem in wrong_options(args):
        parser.error(problem)
    return args


def wrong_options(args: argparse.Namespace) -> list[str]:
    """Return what is wrong with the values of options."""
    problems = []
    if args.out.suffix != ".jsonl":
        problems.append(f"--out is {args.out}; expected a name that ends in .jsonl")
    for name in ("per_prompt", "batch", "max_tokens"):
        if getattr(args, name) < 1:
            problems.append(f"--{name} is {getattr(args, name)}; expected 1 or more")
    if not 0 <= args.keep <= 1:
        problems.append(f"--keep is {args.keep}; expected 0 to 1")
    if not 0 <= args.seed < 2**32:
        problems.append(f"--seed is {args.seed}; expected 0 to {2**32 - 1}")
    if args.temperature is not None and not 0 <= args.temperature < math.inf:
        problems.append(f"--temperature is {args.temperature}; expected 0 or more")
    if not 0 < args.top_p <= 1:
        problems.append(f"--top_p is {args.top_p}; expected above 0, at most 1")
    return problems


def manifest(
    args: argparse.Namespace, rewriter: Rewriter, prompts: Sequence[str]
) -> dict[str, Any]:
    """Return everything that determines the rewrites."""
    weights = [args.rewriter]
    pipeline = ""
    if args.pipeline:
        family = get_family(pipeline_class(Path(args.pipeline)))
        tokenizers = {encoder.tokenizer for encoder in family.encoders}
        pipeline = content_digest(Path(args.pipeline) / name for name in sorted(tokenizers))
    return {
        "rewriter": content_digest(weights),
        "base": rewriter.settings.base_digest,
        "prompts": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
        "pipeline": pipeline,
        "max_tokens": args.max_tokens if args.pipeline else 0,
        "per_prompt": args.per_prompt,
        "keep": args.keep,
        "seed": args.seed,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "batch": args.batch,
    }


def open_writer(args: argparse.Namespace, rewriter: Rewriter, prompts: Sequence[str]) -> Writer:
    """Check the prompts, then load the language model."""
    # -- Everything that needs no weight.
    settings = rewriter.settings
    tokenizer = ChatTokenizer(rewriter.model, system=settings.system, thinking=settings.thinking)
    tokenizer.encode(prompts, settings.max_prompt_tokens, f"{args.prompts}, line")
    fits: Fits | None = None
    if args.pipeline:
        family = get_family(pipeline_class(Path(args.pipeline)))
        fits = open_window(Path(args.pipeline), family.encoders, args.max_tokens).fits

    # -- The model, and the adapters on it.
    mesh = make_mesh(data=-1, fsdp=1, tensor=1, devices=start_devices())
    model, state = load_with_adapter(rewriter.model, rewriter.adapter, settings.dtype, mesh)
    batch = whole_batch(args.batch, mesh)
    return Writer(model, state, tokenizer, settings, fits, args.temperature, args.top_p, batch)


def write(args: argparse.Namespace, rewriter: Rewriter, prompts: list[str], output: Output) -> None:
    """Write the rewrites that the output lacks, and the output."""
    key = jax.random.key(args.seed)
    lines = plan_lines(len(prompts), args.per_prompt, args.keep, key)
    chosen = [line for line in lines if line.rewritten]
    rewrites: list[Rewrite] = []
    if chosen:
        writer = open_writer(args, rewriter, prompts)
        rewrites = output.resume(writer.batch, len(chosen))
        noise = jax.random.fold_in(key, WRITTEN)
        with progress_bars(plain_console()) as bars:
            advance = bars("rewriting", len(chosen), "prompts")
            advance(len(rewrites))
            for start in range(len(rewrites), len(chosen), writer.batch):
                part = chosen[start : start + writer.batch]
                new = writer.rewrite([prompts[line.number] for line in part], numbers(part), noise)
                output.add(new)
                rewrites += new
                advance(len(new))
    output.finish(lines, prompts, rewrites)
    if not args.quiet:
        print(summary(args.out, lines, rewrites))


def numbers(lines: Sequence[Line]) -> np.ndarray:
    """The lines and copies, int32 [n, 2]."""
    return np.array([(line.number, line.copy) for line in lines], np.int32)


def summary(out: Path, lines: Sequence[Line], rewrites: Sequence[Rewrite]) -> str:
    """One line about what the output holds."""
    useless = sum(not rewrite.usable for rewrite in rewrites)
    text = f"{len(lines)} prompts in {out}: {len(rewrites) - useless} rewritten"
    if len(lines) > len(rewrites):
        text += f", {len(lines) - len(rewrites)} left as they are (--keep)"
    if useless:
        text += f", {useless} left as they are because their rewrites cannot be drawn"
    return text


def main() -> None:
    args = parse_args()
    disable_progress_bar()
    set_verbosity_error()  # what it would warn of is an error here
    try:
        prompts = read_prompts(args.prompts)
        rewriter = open_rewriter(args.rewriter, args.model)
        if args.temperature is None:
            args.temperature = rewriter.settings.temperature

        # Another process may be rewriting the same prompts; if so, wait for it.
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(args.out.with_name(args.out.name + ".lock")):
            output = Output(args.out, manifest(args, rewriter, prompts), args.remake)
            if output.is_whole:
                if not args.quiet:
                    print(f"{args.out} is there, made with the same settings")
                return
            keep_compiled(args.compilation_cache)
            write(args, rewriter, prompts, output)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
