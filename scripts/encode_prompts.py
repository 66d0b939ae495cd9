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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from rich.console import Console
from transformers import CLIPTextModel, PreTrainedTokenizerBase, T5EncoderModel
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from realgen_jax.data import read_prompts
from realgen_jax.files import expand_home
from realgen_jax.models import get_family
from realgen_jax.models.family import Encoder
from realgen_jax.models.loading import pipeline_class
from realgen_jax.text_cache import TextCache, encoders_from_json, open_cache
from realgen_jax.training.progress import progress_bars
from reward_bridge.devices import resolve
from reward_bridge.text_encoders import load_model, load_tokenizer
from reward_bridge.weights import torch_dtype

BATCH = 16  # prompts per forward pass

# Tensors that files for another use of the same encoders hold too: T5's decoder, and the rest of a
# whole CLIP.
T5_UNUSED = r"decoder\..+|lm_head\.weight"
CLIP_UNUSED = r"vision_model\..+|(visual|text)_projection\.weight|logit_scale"

Encode = Callable[[list[str]], torch.Tensor]  # n prompts -> [n, ...]


@dataclass(frozen=True)
class Settings:
    """How the encoders run. max_tokens: per prompt, for encoders without a fixed length."""

    max_tokens: int
    dtype: torch.dtype
    device: str


@dataclass(frozen=True)
class Loaded:
    """A text encoder and its tokenizer. cut: whether prompts are cut at max_tokens."""

    encode: Encode
    tokenizer: PreTrainedTokenizerBase
    cut: bool


def t5_states(tokenizer: Path, model: Path, settings: Settings) -> Loaded:
    """The last states of T5's encoder, [n, max_tokens, d].

    There is no attention mask, as in FLUX: T5 attends to its padding.
    """
    t5 = load_model(T5EncoderModel, model, T5_UNUSED, settings.dtype, settings.device)
    tokenize = load_tokenizer(tokenizer, t5)

    def encode(prompts: list[str]) -> torch.Tensor:
        ids = token_ids(tokenize, prompts, settings.max_tokens)
        return t5(ids.to(settings.device)).last_hidden_state

    return Loaded(encode, tokenize, cut=True)


def clip_pooled(tokenizer: Path, model: Path, settings: Settings) -> Loaded:
    """CLIP's pooled vector without its projection, [n, d]. Prompts are cut at 77, as in FLUX."""
    clip = load_model(CLIPTextModel, model, CLIP_UNUSED, settings.dtype, settings.device)
    tokenize = load_tokenizer(tokenizer, clip)
    length = clip.config.max_position_embeddings

    def encode(prompts: list[str]) -> torch.Tensor:
        ids = token_ids(tokenize, prompts, length)
        return clip(ids.to(settings.device)).pooler_output

    return Loaded(encode, tokenize, cut=False)


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
) -> dict[str, Loaded]:
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


def check_words(loaded: Sequence[Loaded], prompts: Sequence[str]) -> None:
    """Raise ValueError for a prompt of which a tokenizer knows no word; it would mean nothing."""
    for prompt in prompts:
        for encoder in loaded:
            tokenizer = encoder.tokenizer
            ids = set(tokenizer(prompt, verbose=False).input_ids) - set(tokenizer.all_special_ids)
            words = [token.strip("▁") for token in tokenizer.convert_ids_to_tokens(sorted(ids))]
            if prompt.strip() and not any(words):
                raise ValueError(
                    f"the tokenizer in {tokenizer.name_or_path} knows no word of the prompt "
                    f"{prompt!r}; write it in a language of the model, or remove it"
                )


def cut_rows(loaded: Sequence[Loaded], prompts: list[str], max_tokens: int) -> list[int]:
    """The prompts with more than `max_tokens` tokens, for the encoders that cut them there."""
    rows = set()
    for encoder in loaded:
        if encoder.cut:
            ids = encoder.tokenizer(prompts, verbose=False).input_ids
            rows |= {row for row, tokens in enumerate(ids) if len(tokens) > max_tokens}
    return sorted(rows)


@torch.inference_mode()
def encode_batch(loaded: Mapping[str, Loaded], prompts: list[str]) -> dict[str, np.ndarray]:
    """Return {array: [n, ...]} of n prompts. Raises ValueError if an encoder gives NaN."""
    arrays = {}
    for name, encoder in loaded.items():
        embeddings = encoder.encode(prompts)
        if not embeddings.isfinite().all():
            raise ValueError(
                f"the text encoder of {name} gave NaN or infinity for one of the prompts from "
                f"{prompts[0]!r} on; are its weights damaged?"
            )
        arrays[name] = to_numpy(embeddings)
    return arrays


def encode_missing(cache: TextCache, encoders: Sequence[Encoder], args: argparse.Namespace) -> None:
    """Encode the prompts that the cache does not hold.

    A batch with a missing prompt is encoded as a whole, so that its rows are bit-identical.
    """
    missing = cache.missing_rows()
    if not missing:
        return

    # Check everything before anything is stored.
    settings = Settings(args.max_tokens, torch_dtype(args.dtype), resolve(args.device))
    loaded = load_encoders(args.model, encoders, settings)
    check_words(list(loaded.values()), cache.prompts)
    cache.keep_cut(cut_rows(list(loaded.values()), cache.prompts, args.max_tokens))

    starts = sorted({row // BATCH * BATCH for row in missing})
    # Without --folder, standard output is for the folder's name alone.
    with progress_bars(Console(stderr=not args.folder, highlight=False)) as bars:
        advance = bars("encoding", len(missing), "prompts")
        for start in starts:
            cache.write(start, encode_batch(loaded, cache.prompts[start : start + BATCH]))
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
        encoders = find_encoders(args)
        if args.folder:
            cache = TextCache(args.folder, stored_prompts(args.folder))
        else:
            prompts = [prompt for file in args.prompts for prompt in read_prompts(file)]
            cache = open_cache(prompts, args.model, encoders, args)

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
