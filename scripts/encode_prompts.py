"""Encode prompts with the text encoders of a pipeline, once, and keep the embeddings on disk.

    python scripts/encode_prompts.py --model models/FLUX.1-dev --prompts prompts.txt

train.py, sample.py and evaluate.py run this program themselves, in a process of its own, so that
the encoders (T5-XXL has 10 GB) never share memory with the trainer. An interrupted call continues
where it stopped. The program prints the cache folder, which is named after prompts and encoders.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from rich.progress import track
from transformers import AutoTokenizer, CLIPTextModel, PreTrainedTokenizerBase, T5EncoderModel
from transformers.utils.logging import disable_progress_bar

from realgen_jax.data import read_prompts
from realgen_jax.models.flux.tables import ENCODERS as FLUX_ENCODERS
from realgen_jax.text_cache import TextCache, open_cache
from reward_bridge.bridge import resolve
from reward_bridge.weights import torch_dtype

BATCH = 16  # prompts of one forward pass

Encode = Callable[[list[str]], dict[str, torch.Tensor]]  # n prompts -> named arrays [n, ...]


def load_flux(model: Path, max_tokens: int, dtype: torch.dtype, device: str) -> Encode:
    """Load the encoders of FLUX.1: "t5" [n, max_tokens, joint_dim] and "clip" [n, pooled_dim]."""
    clip_tokenizer = AutoTokenizer.from_pretrained(model / "tokenizer")
    t5_tokenizer = AutoTokenizer.from_pretrained(model / "tokenizer_2")
    clip = CLIPTextModel.from_pretrained(model / "text_encoder", dtype=dtype).eval().to(device)
    t5 = T5EncoderModel.from_pretrained(model / "text_encoder_2", dtype=dtype).eval().to(device)
    clip_tokens = clip.config.max_position_embeddings

    def encode(prompts: list[str]) -> dict[str, torch.Tensor]:
        clip_ids = token_ids(clip_tokenizer, prompts, clip_tokens).to(device)
        t5_ids = token_ids(t5_tokenizer, prompts, max_tokens).to(device)
        # No attention mask, as in FLUX: T5 attends to its padding.
        return {"t5": t5(t5_ids).last_hidden_state, "clip": clip(clip_ids).pooler_output}

    return encode


def token_ids(tokenizer: PreTrainedTokenizerBase, prompts: list[str], length: int) -> torch.Tensor:
    """Tokenize prompts to exactly `length` tokens, cut or padded: int64 [n, length]."""
    tokens = tokenizer(
        prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    return tokens.input_ids


@dataclass(frozen=True)
class Encoders:
    """How to encode for one kind of pipeline."""

    folders: tuple[str, ...]  # subfolders of the pipeline whose files decide the embeddings
    load: Callable[[Path, int, torch.dtype, str], Encode]


# By the "_class_name" in the pipeline's model_index.json
PIPELINES = {"FluxPipeline": Encoders(FLUX_ENCODERS, load_flux)}


def encoders_of(model: Path) -> Encoders:
    """Return the table's entry for a pipeline folder. Raises ValueError if there is none."""
    index = model / "model_index.json"
    if not index.exists():
        raise ValueError(f"--model is {model}, which holds no model_index.json of diffusers")

    name = json.loads(index.read_text()).get("_class_name")
    if name not in PIPELINES:
        raise ValueError(
            f'{index} has "_class_name" {name!r}; this program can encode for '
            f"{', '.join(sorted(PIPELINES))}"
        )
    return PIPELINES[name]


@torch.inference_mode()
def encode_missing(cache: TextCache, encoders: Encoders, args: argparse.Namespace) -> None:
    """Encode the prompts that the cache does not hold yet."""
    if cache.complete:
        return
    dtype = torch_dtype(args.dtype)
    encode = encoders.load(args.model, args.max_tokens, dtype, resolve(args.device))

    starts = range(cache.rows_done, len(cache.prompts), BATCH)
    description = f"encoding {len(cache.prompts)} prompts"
    for start in track(starts, description=description, transient=True):
        tensors = encode(cache.prompts[start : start + BATCH])
        cache.append({name: to_numpy(tensor) for name, tensor in tensors.items()})


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
    parser.add_argument("--max_tokens", type=int, default=512, help="tokens of a prompt (T5)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument(
        "--device", default="auto", help="auto (the last GPU, or the CPU if none), cpu, cuda:N"
    )
    args = parser.parse_args()
    if args.folder is None and not args.prompts:
        parser.error("name the prompt files with --prompts")
    return args


def main() -> None:
    args = parse_args()
    disable_progress_bar()
    try:
        encoders = encoders_of(args.model)
        if args.folder:
            prompts = json.loads((args.folder / "prompts.json").read_text())
            cache = TextCache(args.folder, prompts)
        else:
            prompts = [prompt for file in args.prompts for prompt in read_prompts(file)]
            cache = open_cache(prompts, args.model, encoders.folders, args)

        # Another process may be encoding the same prompts; the lock waits until it is done.
        with cache.lock():
            encode_missing(cache, encoders, args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if not args.folder:
        print(cache.folder)


if __name__ == "__main__":
    main()
