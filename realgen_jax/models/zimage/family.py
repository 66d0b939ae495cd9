"""Z-Image (base and Turbo) as a model family."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from realgen_jax.models.family import Encoder, Family, Published
from realgen_jax.models.schedule import STATIC_ENTRIES, static_sigmas
from realgen_jax.models.zimage import cost
from realgen_jax.models.zimage.tables import COMFYUI, DIFFUSERS, LORA_TARGETS, RULES
from realgen_jax.models.zimage.transformer import Cond, ZImageConfig, ZImageTransformer, padded


@dataclass(frozen=True)
class ZImageSchedule:
    """Z-Image's `scheduler/scheduler_config.json`. The default is Turbo's; the base model has 6."""

    shift: float = 3.0

    def sigmas(self, steps: int, image_tokens: int) -> np.ndarray:
        """Return float32 [steps + 1] from 1 to 0: a uniform grid shifted towards noise.

        RealGen V2 and diffusers up to 0.36 use the grid of one step less: with sigma_min 0, the
        last of their steps goes from 0 to 0. Their 9 and 40 steps are 8 and 39 here.
        """
        return static_sigmas(steps, self.shift, last=1.0 / steps)


# Entries of transformer/config.json that would make another network. The Omni model, which also
# takes pictures, has a siglip_feat_dim.
CONFIG_ENTRIES = {
    "all_patch_size": [2],
    "all_f_patch_size": [1],
    "norm_eps": 1e-5,
    "qk_norm": True,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
    "siglip_feat_dim": None,
}


def make_cond(arrays: Mapping[str, Any], guidance: Array) -> Cond:
    """Return the conditioning. The network does not read the guidance scale."""
    return Cond(arrays["caption"], arrays["length"].astype(np.int32))


def cond_shapes(config: ZImageConfig, n: int, max_tokens: int, dtype: Any) -> Cond:
    """The conditioning of n prompts as jax.ShapeDtypeStructs."""
    return Cond(
        caption=jax.ShapeDtypeStruct((n, padded(max_tokens), config.cap_feat_dim), dtype),
        length=jax.ShapeDtypeStruct((n,), jnp.int32),
    )


Z_IMAGE = Family(
    pipeline="ZImagePipeline",
    transformer="ZImageTransformer2DModel",
    published=(
        Published("Z-Image", schedule={"shift": 6.0}),
        Published("Z-Image-Turbo"),
    ),
    Config=ZImageConfig,
    Module=ZImageTransformer,
    Schedule=ZImageSchedule,
    table=lambda config: DIFFUSERS,
    lora_targets=lambda config: LORA_TARGETS,
    rules=RULES,
    blocks=("noise", "context", "layers"),
    encoders=(
        Encoder(("caption", "length"), "qwen3_chat", tokenizer="tokenizer", model="text_encoder"),
    ),
    text_tokens=padded,
    cond=make_cond,
    cond_shapes=cond_shapes,
    cost=cost,
    negative_prompt="",
    guidance_offset=1.0,
    config_entries=CONFIG_ENTRIES,
    schedule_entries=STATIC_ENTRIES,
    single_table=lambda config: COMFYUI,
    diffusers_key="all_x_embedder.",
    download=(
        "Run\n"
        "    hf download Tongyi-MAI/Z-Image-Turbo --local-dir models/Z-Image-Turbo\n"
        "and name the folder with --config.pretrained.model=models/Z-Image-Turbo"
    ),
)
