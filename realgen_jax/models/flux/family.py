"""FLUX.1 as a model family."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from realgen_jax.models.family import Encoder, Family, Published
from realgen_jax.models.flux import cost
from realgen_jax.models.flux.tables import (
    BFL,
    DIFFUSERS,
    LORA_TARGETS,
    OTHER_MODELS,
    RULES,
    XLABS,
)
from realgen_jax.models.flux.transformer import Cond, FluxConfig, FluxTransformer
from realgen_jax.models.schedule import SCHEDULE_ENTRIES
from realgen_jax.nn.tensors import Tensors, config_from


@dataclass(frozen=True)
class FluxSchedule:
    """FLUX's `scheduler/scheduler_config.json` under diffusers' names. Defaults: FLUX.1-dev."""

    use_dynamic_shifting: bool = True
    shift: float = 3.0
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096

    def sigmas(self, steps: int, image_tokens: int) -> np.ndarray:
        """Return float32 [steps + 1] from 1 to 0: a uniform grid shifted towards noise.

        FLUX.1-dev shifts by e^mu, with mu linear in the number of image tokens; schnell (without
        dynamic shifting) shifts by `shift`.
        """
        shift = self.shift
        if self.use_dynamic_shifting:
            tokens = self.max_image_seq_len - self.base_image_seq_len
            slope = (self.max_shift - self.base_shift) / tokens
            mu = self.base_shift + slope * (image_tokens - self.base_image_seq_len)
            shift = np.exp(mu)

        # Round the grid to float32, as diffusers does.
        grid = np.linspace(1.0, 1.0 / steps, steps).astype(np.float32).astype(np.float64)
        shifted = shift / (shift + 1.0 / grid - 1.0)
        return np.append(shifted, 0.0).astype(np.float32)


def make_cond(arrays: Mapping[str, Any], guidance: Array) -> Cond:
    """Return the conditioning. FLUX.1-dev is guidance-distilled: the network embeds the scale."""
    return Cond(arrays["t5"], arrays["clip"], guidance)


def cond_shapes(config: FluxConfig, n: int, max_tokens: int, dtype: Any) -> Cond:
    """The conditioning of n prompts as jax.ShapeDtypeStructs."""
    return Cond(
        t5=jax.ShapeDtypeStruct((n, max_tokens, config.joint_attention_dim), dtype),
        clip=jax.ShapeDtypeStruct((n, config.pooled_projection_dim), dtype),
        guidance=jax.ShapeDtypeStruct((n,), jnp.float32),
    )


def single_config(tensors: Tensors, base: Mapping[str, Any], **overrides: Any) -> FluxConfig:
    """Return the sizes that BFL's file has in its shapes; it has no config.

    The split of a head's channels over the axes of positions is that of `base`, if it fits.

    Raises ValueError for a file that is not BFL's FLUX.1.
    """
    try:
        head_dim = tensors.shape("single_blocks.0.norm.query_norm.scale")[0]
        hidden, in_channels = tensors.shape("img_in.weight")
        joint = tensors.shape("txt_in.weight")[1]
        pooled = tensors.shape("vector_in.in_layer.weight")[1]
        out_channels = tensors.shape("final_layer.linear.weight")[0]
    except KeyError as error:
        raise ValueError(
            f"{tensors.path} has no key {error}; expected BFL's FLUX.1 file or a diffusers folder"
        ) from error

    def layers(prefix: str) -> int:
        numbers = {key.split(".")[1] for key in tensors.keys() if key.startswith(prefix)}  # noqa: SIM118
        return len(numbers)

    # (16, 56, 56) of 128: an eighth for the index, the rest for row and column.
    axes = tuple(base.get("axes_dims_rope", ()))
    if sum(axes) != head_dim:
        index_axis = head_dim // 16 * 2
        side_axis = (head_dim - index_axis) // 2
        axes = (index_axis, side_axis, side_axis)
    sizes = {
        "in_channels": in_channels,
        "out_channels": None if out_channels == in_channels else out_channels,
        "num_layers": layers("double_blocks."),
        "num_single_layers": layers("single_blocks."),
        "attention_head_dim": head_dim,
        "num_attention_heads": hidden // head_dim,
        "joint_attention_dim": joint,
        "pooled_projection_dim": pooled,
        "guidance_embeds": "guidance_in.in_layer.weight" in tensors.keys(),  # noqa: SIM118
        "axes_dims_rope": axes,
    }
    return config_from(FluxConfig, tensors.path, sizes, {}, **overrides)


FLUX = Family(
    pipeline="FluxPipeline",
    transformer="FluxTransformer2DModel",
    published=(Published("FLUX.1-dev"),),
    Config=FluxConfig,
    Module=FluxTransformer,
    Schedule=FluxSchedule,
    table=lambda config: DIFFUSERS,
    lora_targets=lambda config: LORA_TARGETS,
    rules=RULES,
    blocks=("double", "single"),
    encoders=(
        Encoder(("t5",), "t5_states", "tokenizer_2", "text_encoder_2", padding="<pad>"),
        Encoder(("clip",), "clip_pooled", "tokenizer", "text_encoder"),
    ),
    text_tokens=lambda max_tokens: max_tokens,
    cond=make_cond,
    cond_shapes=cond_shapes,
    cost=cost,
    config_entries={"patch_size": 1},
    schedule_entries=SCHEDULE_ENTRIES,
    single_table=lambda config: BFL,
    lora_tables=(XLABS,),
    single_config=single_config,
    other_models=OTHER_MODELS,
    download=(
        "For FLUX.1-dev accept its licence on the Hugging Face hub, run\n"
        "    hf download black-forest-labs/FLUX.1-dev --local-dir models/FLUX.1-dev\n"
        "and name the folder with --config.pretrained.model=models/FLUX.1-dev"
    ),
)
