"""Loading the autoencoder: a `vae/` folder of diffusers, or one file such as `ae.safetensors`."""

import re
from pathlib import Path
from typing import Any

from flax import nnx

from realgen_jax.nn.convert import Sharding, Table, abstract, leaves, load, table_rows
from realgen_jax.nn.tensors import VAE_PREFIXES, Tensors, config_from, read_config
from realgen_jax.nn.vae import Autoencoder, VaeConfig

# BFL's names as edits of diffusers' names, which are also ours. BFL's decoder numbers its levels in
# reverse.
BFL_EDITS = (
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    ("mid_block.attentions.0", "mid.attn_1"),
    ("group_norm", "norm"),
    ("to_out.0", "proj_out"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("down_blocks.", "down."),
    ("resnets.", "block."),
    ("downsamplers.0", "downsample"),
    ("upsamplers.0", "upsample"),
    ("conv_shortcut", "nin_shortcut"),
    ("conv_norm_out", "norm_out"),
)

# Entries of config.json other than the sizes. Quantisation convolutions are diffusers' default.
QUANT_CONVS = ("use_quant_conv", "use_post_quant_conv")
FIXED = {
    **dict.fromkeys(QUANT_CONVS, False),
    "act_fn": "silu",
    "in_channels": 3,
    "out_channels": 3,
    "mid_block_add_attention": True,
    "latents_mean": None,
    "latents_std": None,
}
NOT_IN_SHAPES = ("norm_num_groups", "scaling_factor", "shift_factor")
NO_EFFECT = ("sample_size", "force_upcast")  # a training size; config.pretrained.vae_dtype decides


def _bfl_name(name: str, last_level: int) -> str:
    """BFL's name of one of our modules."""
    name = re.sub(r"up_blocks\.(\d)", lambda match: f"up.{last_level - int(match[1])}", name)
    for ours, theirs in BFL_EDITS:
        name = name.replace(ours, theirs)
    return name


def vae_table(config: VaeConfig, layout: str) -> Table:
    """Return the autoencoder's table for the layout "diffusers" (names are the same) or "bfl"."""
    last_level = len(config.block_out_channels) - 1
    rows = {}
    for path in leaves(abstract(Autoencoder, config)[1]):
        module = path.rpartition(".")[0]
        rows[module] = module if layout == "diffusers" else _bfl_name(module, last_level)
    return Table(table_rows(rows))


def vae_config(folder: Path, **overrides: Any) -> VaeConfig:
    """Return the sizes in the config.json of diffusers' `vae/`; `overrides` are VaeConfig fields.

    Raises ValueError for an autoencoder that ours does not compute.
    """
    values = dict.fromkeys(QUANT_CONVS, True) | read_config(folder, "AutoencoderKL")
    levels = len(values.get("block_out_channels", ()))
    fixed = FIXED | {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    sizes = {name: value for name, value in values.items() if name not in NO_EFFECT}
    file = folder / "config.json"
    return config_from(VaeConfig, file, sizes, fixed, NOT_IN_SHAPES, **overrides)


def vae_tensors(path: Path, config: VaeConfig) -> tuple[Tensors, Table]:
    """Return the tensors of a folder or file and their table, by the names in it.

    A file has diffusers' or BFL's names; ComfyUI's file of a whole pipeline holds BFL's.
    """
    tensors = Tensors(path, prefixes=VAE_PREFIXES)
    is_diffusers = any(key.startswith("encoder.down_blocks.") for key in tensors.keys())  # noqa: SIM118
    return tensors, vae_table(config, "diffusers" if is_diffusers else "bfl")


def load_vae(
    path: str | Path,
    base: Path,
    sharding: Sharding = lambda leaf, shape: None,
    **overrides: Any,
) -> tuple[VaeConfig, nnx.State]:
    """Return the autoencoder's config and weights; `overrides` are VaeConfig fields.

    base: the `vae/` folder of diffusers with the sizes of a file. Raises the errors of `load` and
    `vae_config`.
    """
    path = Path(path)
    config = vae_config(base if path.is_file() else path, **overrides)
    tensors, table = vae_tensors(path, config)
    return config, load(tensors, abstract(Autoencoder, config)[1], table, sharding)
