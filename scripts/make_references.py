"""Make reference pictures for rewards that learn, with any text-to-image pipeline of diffusers.

    python scripts/make_references.py --model models/Qwen-Image --prompts dataset/train.txt \\
        --out dataset/references --variations 8 --width 512 --height 512 --argument true_cfg_scale=4

The folder then has the pictures and references.json, {prompt: [files]} as Adv-GRPO has it, for
config.reward.references.path. The same command continues where it was stopped; prompts and
variations can be added later. Needs diffusers (extra "references") and a GPU with room for the
pipeline: run it before the training, not beside it.
"""

from realgen_jax import process

process.begin(__name__)  # before the imports that take seconds

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from realgen_jax.data import read_prompts
from realgen_jax.files import content_digest, expand_home
from realgen_jax.training.progress import plain_console, progress_bars
from realgen_jax.training.run_folder import run_lock
from reward_bridge.devices import resolve
from reward_bridge.reference_maker import (
    check_arguments,
    check_settings,
    load_pipeline,
    make_pictures,
    missing_slots,
    write_table,
)
from reward_bridge.weights import DTYPES


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="pipeline folder of diffusers")
    parser.add_argument("--prompts", required=True, help="prompt file (.txt, .jsonl)")
    parser.add_argument("--out", required=True, help="folder of the pictures and references.json")
    parser.add_argument("--variations", type=positive, default=8, help="pictures of each prompt")
    parser.add_argument("--width", type=positive, help="pixels; default: the pipeline's own")
    parser.add_argument("--height", type=positive, help="pixels; default: the pipeline's own")
    parser.add_argument("--steps", type=positive, help="default: the pipeline's own")
    parser.add_argument(
        "--argument",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another argument of the pipeline's call, such as guidance_scale=3.5 or "
        'negative_prompt=" "; a value is JSON, or else text',
    )
    parser.add_argument("--batch_size", type=positive, default=1, help="pictures in one call")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument(
        "--device", default="auto", help="auto (the last GPU, or the CPU if none), cpu, cuda:N"
    )
    return parser.parse_args()


def positive(text: str) -> int:
    """The number of an option, 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {number}; expected 1 or more")
    return number


def arguments_of(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of the pipeline's call. Raises ValueError for one without "="."""
    arguments: dict[str, Any] = {}
    for name, value in (
        ("width", args.width),
        ("height", args.height),
        ("num_inference_steps", args.steps),
    ):
        if value is not None:
            arguments[name] = value
    for text in args.argument:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--argument is {text!r}; expected NAME=VALUE")
        try:
            arguments[name] = json.loads(value)
        except ValueError:
            arguments[name] = value
    return arguments


def make(args: argparse.Namespace) -> Path:
    """Make the missing pictures and write the table. Returns its path."""
    # -- Check everything that does not need the model.
    if importlib.util.find_spec("diffusers") is None:
        raise ValueError("diffusers is not installed; pip install 'realgen_jax[references]'")
    prompts = read_prompts(args.prompts)
    arguments = arguments_of(args)
    device = resolve(args.device)
    model = expand_home(args.model)
    if not model.is_dir():
        raise FileNotFoundError(f"{args.model} is no folder; expected a pipeline of diffusers")
    folder = expand_home(args.out)

    with run_lock(folder):
        settings = {
            "model": content_digest([model]),
            "arguments": arguments,
            "seed": args.seed,
            "dtype": args.dtype,
        }
        check_settings(folder, settings)
        slots = missing_slots(folder, prompts, args.variations)
        total = len(dict.fromkeys(prompts)) * args.variations
        print(f"{total} pictures in {folder}, {len(slots)} of them still to make")

        # -- Make the missing pictures.
        if slots:
            pipeline = load_pipeline(model, device, DTYPES[args.dtype])
            check_arguments(pipeline, arguments)
            with progress_bars(plain_console()) as bars:
                make_pictures(
                    pipeline,
                    slots,
                    folder,
                    seed=args.seed,
                    batch_size=args.batch_size,
                    arguments=arguments,
                    advance=bars("references", len(slots), "pictures"),
                )
        return write_table(folder, prompts, args.variations)


def main() -> None:
    args = parse_args()
    process.when_stopped(lambda: "stopped; the same command continues")
    try:
        table = make(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"references: config.reward.references.path = {str(table)!r}")


if __name__ == "__main__":
    main()
