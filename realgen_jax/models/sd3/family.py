"""Stable Diffusion 3 and 3.5 as a model family."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import Array

from realgen_jax.models.family import Encoder, Family, Published
from realgen_jax.models.schedule import STATIC_ENTRIES, shifted, static_sigmas
from realgen_jax.models.sd3 import cost
from realgen_jax.models.sd3.tables import (
    RULES,
    diffusers_table,
    lora_targets,
    stability_table,
)
from realgen_jax.models.sd3.transformer import Cond, SD3Config, SD3Transformer
from realgen_jax.nn.tensors import Tensors, config_from

CLIP_TOKENS = 77  # tokens of both CLIPs, padding included


@dataclass(frozen=True)
class SD3Schedule:
    """SD3's `scheduler/scheduler_config.json` under diffusers' names."""

    shift: float = 3.0

    def sigmas(self, steps: int, image_tokens: int) -> np.ndarray:
        """Return float32 [steps + 1] from 1 to 0: a uniform grid shifted towards noise.

        As in diffusers, the grid ends at the level of the last of 1000 training steps, which is
        shifted already; it is shifted again.
        """
        return static_sigmas(steps, self.shift, last=shifted(0.001, self.shift))


def make_cond(arrays: Mapping[str, Any], guidance: Array) -> Cond:
    """Join the states of the three text encoders. The network does not read the guidance scale.

    The channels of the two CLIPs stand side by side and are filled up with zeros to T5's.
    """
    side = np.concatenate([arrays["clip_l"], arrays["clip_g"]], axis=-1)
    missing = arrays["t5"].shape[-1] - side.shape[-1]
    side = np.pad(side, ((0, 0), (0, 0), (0, missing)))
    return Cond(
        text=np.concatenate([side, arrays["t5"]], axis=1),
        pooled=np.concatenate([arrays["pooled_l"], arrays["pooled_g"]], axis=-1),
    )


def text_tokens(max_tokens: int) -> int:
    """Tokens of a prompt: the CLIPs', then T5's."""
    return CLIP_TOKENS + max_tokens


def cond_shapes(config: SD3Config, n: int, max_tokens: int, dtype: Any) -> Cond:
    """The conditioning of n prompts as jax.ShapeDtypeStructs."""
    tokens = text_tokens(max_tokens)
    return Cond(
        text=jax.ShapeDtypeStruct((n, tokens, config.joint_attention_dim), dtype),
        pooled=jax.ShapeDtypeStruct((n, config.pooled_projection_dim), dtype),
    )


def single_config(tensors: Tensors, base: Mapping[str, Any], **overrides: Any) -> SD3Config:
    """Return the sizes that Stability's file has in its shapes; it has no config.

    Raises ValueError for a file that is not Stability's SD3 or SD3.5.
    """

    def blocks_with(end: str) -> list[int]:
        numbers = {
            int(key.split(".")[1])
            for key in tensors.keys()  # noqa: SIM118
            if key.startswith("joint_blocks.") and key.endswith(end)
        }
        return sorted(numbers)

    try:
        hidden, in_channels = tensors.shape("x_embedder.proj.weight")[:2]
        joint = tensors.shape("context_embedder.weight")[1]
        pooled = tensors.shape("y_embedder.mlp.0.weight")[1]
        positions = tensors.shape("pos_embed")[1]
    except KeyError as error:
        raise ValueError(
            f"{tensors.path} has no key {error}; expected Stability's file of SD3 or SD3.5, or a "
            "diffusers folder"
        ) from error

    # Heads have 64 channels in all published models; a file with norms says so itself.
    norms = blocks_with("x_block.attn.ln_q.weight")
    head_dim = 64
    if norms:
        head_dim = tensors.shape("joint_blocks.0.x_block.attn.ln_q.weight")[0]
    sizes = {
        "in_channels": in_channels,
        "out_channels": in_channels,
        "num_layers": len(blocks_with("x_block.attn.qkv.weight")),
        "attention_head_dim": head_dim,
        "num_attention_heads": hidden // head_dim,
        "joint_attention_dim": joint,
        "caption_projection_dim": hidden,
        "pooled_projection_dim": pooled,
        "pos_embed_max_size": round(positions**0.5),
        "dual_attention_layers": tuple(blocks_with("x_block.attn2.qkv.weight")),
        "qk_norm": "rms_norm" if norms else None,
    }
    return config_from(SD3Config, tensors.path, sizes, {}, **overrides)


# Sizes of the published models, where they differ from SD3-Medium's.
MEDIUM = {
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
LARGE = {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
}

SD3 = Family(
    pipeline="StableDiffusion3Pipeline",
    transformer="SD3Transformer2DModel",
    published=(
        Published("SD3.5-M", MEDIUM),
        Published("SD3.5-L", LARGE),
        Published("SD3-M"),
    ),
    Config=SD3Config,
    Module=SD3Transformer,
    Schedule=SD3Schedule,
    table=diffusers_table,
    lora_targets=lora_targets,
    rules=RULES,
    blocks=("dual", "joint", "last"),
    encoders=(
        Encoder(
            ("clip_l", "pooled_l"),
            "clip_projected",
            tokenizer="tokenizer",
            model="text_encoder",
            padding="<|endoftext|>",
        ),
        Encoder(
            ("clip_g", "pooled_g"),
            "clip_projected",
            tokenizer="tokenizer_2",
            model="text_encoder_2",
            padding="!",
        ),
        Encoder(
            ("t5",),
            "t5_states",
            tokenizer="tokenizer_3",
            model="text_encoder_3",
            padding="<pad>",
        ),
    ),
    text_tokens=text_tokens,
    cond=make_cond,
    cond_shapes=cond_shapes,
    cost=cost,
    negative_prompt="",
    config_entries={"patch_size": 2},
    schedule_entries=STATIC_ENTRIES,
    single_table=stability_table,
    single_config=single_config,
    download=(
        "For SD3.5-M accept its licence on the Hugging Face hub, run\n"
        "    hf download stabilityai/stable-diffusion-3.5-medium --local-dir models/SD3.5-M\n"
        "and name the folder with --config.pretrained.model=models/SD3.5-M"
    ),
)
