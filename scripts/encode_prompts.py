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
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from realgen_jax.data import read_prompts
from realgen_jax.files import expand_home
from realgen_jax.models import get_family
from realgen_jax.models.family import Encoder
from realgen_jax.models.loading import pipeline_class
from realgen_jax.models.prompts import check_max_tokens
from realgen_jax.text_cache import TextCache, encoders_from_json, open_cache
from realgen_jax.training.progress import progress_bars
from reward_bridge.devices import resolve
from reward_bridge.text_encoders import load_model, load_tokenizer, read_config, weights_file
from reward_bridge.text_recipes import Recipe, Tokens, get_recipe
from reward_bridge.weights import torch_dtype

BATCH = 16  # prompts per forward pass


@dataclass(frozen=True)
class Prepared:
    """A text encoder whose files have been checked, with the tokens of all prompts."""

    encoder: Encoder
    recipe: Recipe
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    tokens: Tokens


def prepare(model: Path, encoder: Encoder, prompts: list[str], max_tokens: int) -> Prepared:
    """Tokenize all prompts for an encoder of a pipeline folder, before its weights are read.

    Raises ValueError or OSError for files that are missing or another model's.
    """
    recipe = get_recipe(encoder.recipe)
    folder = model / encoder.model
    config = read_config(recipe.model, folder)
    weights_file(folder)
    tokenizer = load_tokenizer(
        model / encoder.tokenizer, recipe.model, config.vocab_size, encoder.padding
    )
    tokens = recipe.tokens(tokenizer, config, prompts, max_tokens)
    return Prepared(encoder, recipe, folder, tokenizer, tokens)


def load(prepared: Prepared, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """Load a text encoder, without the parts that are not run."""
    recipe = prepared.recipe
    model = load_model(recipe.model, prepared.folder, recipe.unused, dtype, device)
    recipe.trim(model)
    return model


def check_words(tokenizers: Sequence[PreTrainedTokenizerBase], prompts: Sequence[str]) -> None:
    """Raise ValueError for a prompt of which a tokenizer knows no word; it would mean nothing."""
    for prompt in prompts:
        for tokenizer in tokenizers:
            # The padding is not among these: CLIP-G's is "!", a word.
            special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
            ids = set(tokenizer(prompt, verbose=False).input_ids) - special
            words = [token.strip("▁") for token in tokenizer.convert_ids_to_tokens(sorted(ids))]
            if prompt.strip() and not any(words):
                raise ValueError(
                    f"the tokenizer in {tokenizer.name_or_path} knows no word of the prompt "
                    f"{prompt!r}; write it in a language of the model, or remove it"
                )


@torch.inference_mode()
def encode_batch(
    encoders: Sequence[tuple[Prepared, PreTrainedModel]], rows: slice, prompts: Sequence[str]
) -> dict[str, np.ndarray]:
    """Return {array: [n, ...]} of n rows of the prompts.

    Raises ValueError if an encoder gives NaN.
    """
    arrays = {}
    for prepared, model in encoders:
        ids = prepared.tokens.ids[rows].to(model.device)
        lengths = prepared.tokens.lengths[rows].to(model.device)
        results = prepared.recipe.arrays(model, ids, lengths)
        for name, array in zip(prepared.encoder.arrays, results, strict=True):
            if not array.isfinite().all():
                raise ValueError(
                    f"the text encoder of {name} gave NaN or infinity for one of the prompts from "
                    f"{prompts[rows.start]!r} on; are its weights damaged?"
                )
            arrays[name] = to_numpy(array)
    return arrays


def encode_missing(cache: TextCache, encoders: Sequence[Encoder], args: argparse.Namespace) -> None:
    """Encode the prompts that the cache does not hold.

    A batch with a missing prompt is encoded as a whole, so that its rows are bit-identical.
    """
    missing = cache.missing_rows()
    if not missing:
        return

    # Check all files and prompts before weights are read.
    everything = [
        prepare(args.model, encoder, cache.prompts, args.max_tokens) for encoder in encoders
    ]
    check_words([prepared.tokenizer for prepared in everything], cache.prompts)

    # Check all weights before anything is stored.
    dtype = torch_dtype(args.dtype)
    device = resolve(args.device)
    loaded = [(prepared, load(prepared, dtype, device)) for prepared in everything]
    cache.keep_cut(sorted({row for prepared in everything for row in prepared.tokens.cut}))

    starts = sorted({row // BATCH * BATCH for row in missing})
    # Without --folder, standard output is for the folder's name alone.
    with progress_bars(Console(stderr=not args.folder, highlight=False)) as bars:
        advance = bars("encoding", len(missing), "prompts")
        for start in starts:
            rows = slice(start, start + BATCH)
            cache.write(start, encode_batch(loaded, rows, cache.prompts))
            advance(sum(start <= row < start + BATCH for row in missing))


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Copy a tensor to the host; numpy has bfloat16 only through ml_dtypes."""
    tensor = tensor.cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


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
