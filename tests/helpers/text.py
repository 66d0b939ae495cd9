"""The text encoders of the golden SD3 and Z-Image pipelines, and the program that runs them."""

import json
from types import SimpleNamespace

from realgen_jax.models.family import Encoder
from realgen_jax.text_cache import open_cache
from realgen_scripts import encode_prompts
from tests.helpers.goldens import GOLDENS

SD3 = GOLDENS / "12_sd3" / "pipeline"
SD3_ENCODERS = (
    Encoder(
        ("clip_l", "clip_l_pooled"),
        "clip_projected",
        "tokenizer",
        "text_encoder",
        padding="<|endoftext|>",
    ),
    Encoder(
        ("clip_g", "clip_g_pooled"),
        "clip_projected",
        "tokenizer_2",
        "text_encoder_2",
        padding="!",
    ),
    Encoder(("t5",), "t5_states", "tokenizer_3", "text_encoder_3", padding="<pad>"),
)

ZIMAGE = GOLDENS / "13_zimage" / "pipeline"
ZIMAGE_ENCODERS = (Encoder(("caption", "length"), "qwen3_chat", "tokenizer", "text_encoder"),)


def golden_prompts(model):
    """The prompts of a golden pipeline and the negative one, as in its text.npz."""
    content = json.loads((model.parent / "prompts.json").read_text())
    return [*content["prompts"], content["negative_prompt"]]


def settings(root, max_tokens, dtype="float32"):
    return SimpleNamespace(cache=root, max_tokens=max_tokens, dtype=dtype, device="cpu")


def fill(root, model, encoders, prompts, max_tokens, dtype="float32"):
    """Fill a cache in this process; return it."""
    chosen = settings(root, max_tokens, dtype)
    cache = open_cache(prompts, model, encoders, chosen)
    args = SimpleNamespace(model=model, folder=None, **vars(chosen))
    encode_prompts.encode_missing(cache, encoders, args)
    return cache
