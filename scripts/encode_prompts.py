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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from rich.console import Console
from transformers import AutoTokenizer, CLIPTextModel, PreTrainedTokenizerBase, T5EncoderModel
from transformers.utils.logging import disable_progress_bar

from realgen_jax.data import read_prompts
from realgen_jax.files import expand_home
from realgen_jax.models import get_family
from realgen_jax.models.family import Encoder
from realgen_jax.models.loading import pipeline_class
from realgen_jax.text_cache import TextCache, encoders_from_json, open_cache
from realgen_jax.training.progress import progress_bars
from reward_bridge.devices import resolve
from reward_bridge.weights import torch_dtype

BATCH = 16  # prompts per forward pass

Encode = Callable[[list[str]], torch.Tensor]  # n prompts -> [n, ...]


@dataclass(frozen=True)
class Settings:
    """How the encoders run. max_tokens: per prompt, for encoders without a fixed length."""

    max_tokens: int
    dtype: torch.dtype
    device: str


def t5_states(tokenizer: Path, model: Path, settings: Settings) -> Encode:
    """The last states of T5's encoder, [n, max_tokens, d].

    There is no attention mask, as in FLUX: T5 attends to its padding.
    """
    tokenize = AutoTokenizer.from_pretrained(tokenizer)
    t5 = T5EncoderModel.from_pretrained(model, dtype=settings.dtype).eval().to(settings.device)

    def encode(prompts: list[str]) -> torch.Tensor:
        ids = token_ids(tokenize, prompts, settings.max_tokens)
        return t5(ids.to(settings.device)).last_hidden_state

    return encode


def clip_pooled(tokenizer: Path, model: Path, settings: Settings) -> Encode:
    """CLIP's pooled vector without its projection, [n, d]."""
    tokenize = AutoTokenizer.from_pretrained(tokenizer)
    clip = CLIPTextModel.from_pretrained(model, dtype=settings.dtype).eval().to(settings.device)
    length = clip.config.max_position_embeddings

    def encode(prompts: list[str]) -> torch.Tensor:
        ids = token_ids(tokenize, prompts, length)
        return clip(ids.to(settings.device)).pooler_output

    return encode


# The encoders of a model family (realgen_jax/models) name their recipe here.
RECIPES = {"t5_states": t5_states, "clip_pooled": clip_pooled}


def token_ids(tokenizer: PreTrainedTokenizerBase, prompts: list[str], length: int) -> torch.Tensor:
    """Tokenize prompts to exactly `length` tokens, cut or padded: int64 [n, length]."""
    tokens = tokenizer(
        prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    return tokens.input_ids


def load_encoders(
    folder: Path, encoders: Sequence[Encoder], settings: Settings
) -> dict[str, Encode]:
    """Load {array: its encoder} from a pipeline folder. Raises ValueError for unknown recipes."""
    loaded = {}
    for encoder in encoders:
        if encoder.recipe not in RECIPES:
            raise ValueError(
                f"there is no text encoder {encoder.recipe!r}; choose one of {', '.join(RECIPES)}"
            )
        load = RECIPES[encoder.recipe]
        loaded[encoder.array] = load(folder / encoder.tokenizer, folder / encoder.model, settings)
    return loaded


def cut_rows(
    folder: Path, encoders: Sequence[Encoder], prompts: list[str], max_tokens: int
) -> list[int]:
    """The prompts with more than `max_tokens` tokens.

    Only T5's tokens count. CLIP's are always cut at 77, as in FLUX.
    """
    rows = set()
    for encoder in encoders:
        if encoder.recipe == "t5_states":
            tokenize = AutoTokenizer.from_pretrained(folder / encoder.tokenizer)
            ids = tokenize(prompts, verbose=False).input_ids
            rows |= {row for row, tokens in enumerate(ids) if len(tokens) > max_tokens}
    return sorted(rows)


@torch.inference_mode()
def encode_missing(cache: TextCache, encoders: Sequence[Encoder], args: argparse.Namespace) -> None:
    """Encode the prompts that the cache does not hold yet."""
    if cache.complete:
        return
    settings = Settings(args.max_tokens, torch_dtype(args.dtype), resolve(args.device))
    loaded = load_encoders(args.model, encoders, settings)
    cache.keep_cut(cut_rows(args.model, encoders, cache.prompts, args.max_tokens))

    starts = range(cache.rows_done, len(cache.prompts), BATCH)
    # Without --folder, standard output is for the folder's name alone.
    with progress_bars(Console(stderr=not args.folder, highlight=False)) as bars:
        advance = bars("encoding", len(cache.prompts) - cache.rows_done, "prompts")
        for start in starts:
            prompts = cache.prompts[start : start + BATCH]
            cache.append({name: to_numpy(encode(prompts)) for name, encode in loaded.items()})
            advance(len(prompts))


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
    parser.add_argument("--max_tokens", type=int, default=512, help="tokens of a prompt (T5)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument(
        "--device", default="auto", help="auto (the last GPU, or the CPU if none), cpu, cuda:N"
    )
    args = parser.parse_args()
    if args.folder is None and not args.prompts:
        parser.error("name the prompt files with --prompts")
    if args.folder is None and str(expand_home(args.cache)).startswith("~"):
        parser.error(
            f"--cache is {args.cache}, but this user has no home folder; set HOME or --cache"
        )
    if args.max_tokens < 1:
        parser.error(f"--max_tokens is {args.max_tokens}; expected 1 or more")
    return args


def find_encoders(args: argparse.Namespace) -> Sequence[Encoder]:
    """The encoders named by --encoders, or else those of the pipeline's family."""
    if args.encoders:
        return encoders_from_json(args.encoders)
    pipeline = pipeline_class(args.model)
    return get_family(pipeline).encoders


def main() -> None:
    args = parse_args()
    disable_progress_bar()
    try:
        encoders = find_encoders(args)
        if args.folder:
            prompts = json.loads((args.folder / "prompts.json").read_text())
            cache = TextCache(args.folder, prompts)
        else:
            prompts = [prompt for file in args.prompts for prompt in read_prompts(file)]
            cache = open_cache(prompts, args.model, encoders, args)

        # Another process may be encoding the same prompts; if so, wait for it.
        with cache.lock():
            encode_missing(cache, encoders, args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if not args.folder:
        message = cache.cut_message(args.max_tokens)
        if message:
            print(message, file=sys.stderr)
        print(cache.folder)


if __name__ == "__main__":
    main()
