"""Prompts -> text embeddings on disk, once, by the model's own PyTorch encoders (CLIP and T5).

    python scripts/encode_prompts.py --model models/FLUX.1-dev --prompts prompts.txt --max_tokens 512

train.py, sample.py call it by themselves, as a process of its own: T5-XXL's 10 GB never share the trainer's memory.
An interrupted call goes on where it stopped; the folder it prints is named after the prompts and the encoders.
"""

import argparse
import json
from pathlib import Path

import ml_dtypes
import numpy as np

from realgen_jax.data import read_prompts
from realgen_jax.text_cache import TextCache, ensure_encoded

BATCH = 16  # prompts of one forward pass


def encode(cache: TextCache, model: Path, max_tokens: int, dtype: str, device: str) -> None:
    """Run both encoders over the prompts that are still missing."""
    if cache.complete:  # by another process, while this one waited for the lock
        return
    import torch
    from rich.progress import track
    from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel
    from transformers.utils.logging import disable_progress_bar

    from reward_bridge.devices import resolve
    from reward_bridge.weights import torch_dtype

    disable_progress_bar()
    device = resolve(device)
    clip = (
        CLIPTextModel.from_pretrained(model / "text_encoder", dtype=torch_dtype(dtype))
        .eval()
        .to(device)
    )
    t5 = (
        T5EncoderModel.from_pretrained(model / "text_encoder_2", dtype=torch_dtype(dtype))
        .eval()
        .to(device)
    )
    clip_tokenizer, t5_tokenizer = (
        AutoTokenizer.from_pretrained(model / n) for n in ("tokenizer", "tokenizer_2")
    )

    def ids(tokenizer, texts: list[str], length: int) -> "torch.Tensor":
        padded = tokenizer(
            texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return padded.input_ids.to(device)

    def to_numpy(x: "torch.Tensor") -> np.ndarray:
        x = x.cpu().contiguous()
        return (
            x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            if x.dtype == torch.bfloat16
            else x.numpy()
        )

    starts = range(cache.rows_done, len(cache.prompts), BATCH)
    for start in track(
        starts, description=f"encoding {len(cache.prompts)} prompts", transient=True
    ):
        texts = cache.prompts[start : start + BATCH]
        with torch.inference_mode():  # no attention mask, as in FLUX: T5 attends to its padding
            pooled = clip(
                ids(clip_tokenizer, texts, clip.config.max_position_embeddings)
            ).pooler_output
            states = t5(ids(t5_tokenizer, texts, max_tokens)).last_hidden_state
        cache.append(to_numpy(states), to_numpy(pooled))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, required=True, help="FluxPipeline folder of diffusers"
    )
    parser.add_argument("--prompts", nargs="+", help="prompt files (.txt, .jsonl)")
    parser.add_argument("--cache", default="~/.cache/realgen_jax/text")
    parser.add_argument(
        "--folder", type=Path, help="a cache folder that already holds prompts.json"
    )
    parser.add_argument("--max_tokens", type=int, default=512, help="T5 tokens")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument(
        "--device", default="auto", help="auto (the last GPU, else the CPU), cpu, cuda:N"
    )
    args = parser.parse_args()
    if args.folder is None:
        if not args.prompts:
            parser.error("name the prompt files with --prompts")
        prompts = [prompt for file in args.prompts for prompt in read_prompts(file)]
        cache = ensure_encoded(prompts, str(args.model), args)
        print(cache.folder)
        return
    cache = TextCache(args.folder, json.loads((args.folder / "prompts.json").read_text()))
    with cache.lock():
        encode(cache, args.model, args.max_tokens, args.dtype, args.device)


if __name__ == "__main__":
    main()
