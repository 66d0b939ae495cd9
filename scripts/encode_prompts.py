"""Encode prompts with the text encoders of a pipeline, once, and keep the embeddings on disk.

    python scripts/encode_prompts.py --model models/FLUX.1-dev --prompts prompts.txt

train.py, sample.py and evaluate.py run this program themselves, in a process of its own, so that
the encoders (T5-XXL has 10 GB) never share memory with the trainer. An interrupted call continues
where it stopped. The program prints the cache folder, which is named after prompts and encoders.
"""

from realgen_jax import process

process.begin(__name__)  # before the imports that take seconds

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from realgen_jax.data import read_prompts
from realgen_jax.files import expand_home
from realgen_jax.models import get_family
from realgen_jax.models.family import Encoder
from realgen_jax.models.prompts import check_max_tokens
from realgen_jax.models.sources import pipeline_class
from realgen_jax.text_cache import TextCache, encoders_from_json, open_cache
from realgen_jax.training.progress import progress_bars
from reward_bridge.devices import resolve
from reward_bridge.encoders import BATCH, check_words, encode_batch, load, prepare
from reward_bridge.weights import torch_dtype


def encode_missing(cache: TextCache, encoders: Sequence[Encoder], args: argparse.Namespace) -> None:
    """Encode the prompts that the cache does not hold.

    A batch with a missing prompt is encoded as a whole, so that its rows are bit-identical.
    """
    missing = cache.missing_rows()
    if not missing:
        return

    # Check all files and prompts before weights are read.
    everything = [prepare(args.model, encoder) for encoder in encoders]
    tokens = [prepared.tokens(cache.prompts, args.max_tokens) for prepared in everything]
    check_words([prepared.tokenizer for prepared in everything], cache.prompts)

    # Check all weights before anything is stored.
    dtype = torch_dtype(args.dtype)
    device = resolve(args.device)
    loaded = [(prepared, load(prepared, dtype, device)) for prepared in everything]
    cache.keep_cut(sorted({row for own in tokens for row in own.cut}))

    starts = sorted({row // BATCH * BATCH for row in missing})
    # Without --folder, standard output is for the folder's name alone.
    with progress_bars(Console(stderr=not args.folder, highlight=False)) as bars:
        advance = bars("encoding", len(missing), "prompts")
        for start in starts:
            rows = slice(start, start + BATCH)
            cache.write(start, encode_batch(loaded, tokens, rows, cache.prompts))
            advance(sum(start <= row < start + BATCH for row in missing))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="pipeline folder of diffusers")
    parser.add_argument("--prompts", nargs="+", help="prompt files (.txt, .jsonl)")
    parser.add_argument("--cache", default="~/.cache/realgen_jax/text", help="root of all caches")
    parser.add_argument(
        "--folder", type=Path, help="instead of --prompts: a cache folder that holds prompts.json"
    )
    parser.add_argument(
        "--encoders", help="with --folder: the text encoders as JSON; default: the pipeline's own"
    )
    parser.add_argument("--max_tokens", type=int, default=512, help="tokens of a prompt (not CLIP)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument(
        "--device", default="auto", help="auto (the last GPU, or the CPU if none), cpu, cuda:N"
    )
    args = parser.parse_args()
    if args.folder is None and not args.prompts:
        parser.error("name the prompt files with --prompts")
    if args.folder is None and args.encoders:
        parser.error("--encoders goes with --folder")
    if args.folder is None and str(expand_home(args.cache)).startswith("~"):
        parser.error(
            f"--cache is {args.cache}, but this user has no home folder; set HOME or --cache"
        )
    if args.max_tokens < 1:
        parser.error(f"--max_tokens is {args.max_tokens}; expected 1 or more")
    return args


def find_cache(args: argparse.Namespace) -> tuple[TextCache, Sequence[Encoder]]:
    """The cache that the options name, and its encoders.

    The negative prompt of the pipeline's family is encoded beside those of --prompts, as train.py
    and the others want it.
    """
    if args.encoders:
        encoders = encoders_from_json(args.encoders)
        return TextCache(args.folder, stored_prompts(args.folder)), encoders

    family = get_family(pipeline_class(args.model))
    check_max_tokens(family, args.max_tokens)
    if args.folder:
        return TextCache(args.folder, stored_prompts(args.folder)), family.encoders

    prompts = [prompt for file in args.prompts for prompt in read_prompts(file)]
    if family.negative_prompt is not None:
        prompts.append(family.negative_prompt)
    return open_cache(prompts, args.model, family.encoders, args), family.encoders


def stored_prompts(folder: Path) -> list[str]:
    """The prompts of a cache folder. Raises ValueError if their file is damaged."""
    file = folder / "prompts.json"
    try:
        return json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); remove the folder") from error


def main() -> None:
    args = parse_args()
    disable_progress_bar()
    set_verbosity_error()  # what it would warn of is an error here
    try:
        cache, encoders = find_cache(args)

        # Another process may be encoding the same prompts; if so, wait for it.
        with cache.lock():
            encode_missing(cache, encoders, args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError as error:
        sys.exit(
            f"error: no room for the text encoders ({str(error).splitlines()[0]}); choose another "
            "device, --device (config.prompts.device)"
        )
    if not args.folder:
        message = cache.cut_message(args.max_tokens)
        if message:
            print(message, file=sys.stderr)
        print(cache.folder)


if __name__ == "__main__":
    main()
