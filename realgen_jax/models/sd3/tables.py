"""The names of our modules in published SD3 checkpoints, which nn/convert.py reads."""

from functools import partial
from typing import Any

import numpy as np
from jax.sharding import PartitionSpec as P

from realgen_jax.models.sd3.transformer import SD3Config, central, position_table
from realgen_jax.nn.convert import Cut, Part, Table, table_rows

# Arrays with a separate axis for the parts of a fused projection, and that axis from the end:
# qkv [in, 3, D].
FUSED = {"qkv.kernel": -2, "qkv.bias": -2}

_EMBED = "time_text_embed."
_DIFFUSERS_ENDS = {
    "img_in": "pos_embed.proj",
    "pos": "pos_embed.pos_embed",
    "txt_in": "context_embedder",
    "time_in.fc1": _EMBED + "timestep_embedder.linear_1",
    "time_in.fc2": _EMBED + "timestep_embedder.linear_2",
    "vector_in.fc1": _EMBED + "text_embedder.linear_1",
    "vector_in.fc2": _EMBED + "text_embedder.linear_2",
    "final_mod": "norm_out.linear",
    "proj_out": "proj_out",
}
_DIFFUSERS_BLOCK = {
    "_img_mod": "norm1.linear",
    "_txt_mod": "norm1_context.linear",
    ".img.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    ".txt.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    ".img.norm.query": "attn.norm_q",
    ".img.norm.key": "attn.norm_k",
    ".txt.norm.query": "attn.norm_added_q",
    ".txt.norm.key": "attn.norm_added_k",
    ".img.proj": "attn.to_out.0",
    ".txt.proj": "attn.to_add_out",
    ".img.mlp.fc1": "ff.net.0.proj",
    ".img.mlp.fc2": "ff.net.2",
    ".txt.mlp.fc1": "ff_context.net.0.proj",
    ".txt.mlp.fc2": "ff_context.net.2",
    ".second.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    ".second.norm.query": "attn2.norm_q",
    ".second.norm.key": "attn2.norm_k",
    ".second.proj": "attn2.to_out.0",
}

_STABILITY_ENDS = {
    "img_in": "x_embedder.proj",
    "pos": "pos_embed",
    "txt_in": "context_embedder",
    "time_in.fc1": "t_embedder.mlp.0",
    "time_in.fc2": "t_embedder.mlp.2",
    "vector_in.fc1": "y_embedder.mlp.0",
    "vector_in.fc2": "y_embedder.mlp.2",
    "final_mod": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_STABILITY_BLOCK = {
    "_img_mod": "x_block.adaLN_modulation.1",
    "_txt_mod": "context_block.adaLN_modulation.1",
    ".img.qkv": "x_block.attn.qkv",
    ".txt.qkv": "context_block.attn.qkv",
    ".img.norm.query": "x_block.attn.ln_q",
    ".img.norm.key": "x_block.attn.ln_k",
    ".txt.norm.query": "context_block.attn.ln_q",
    ".txt.norm.key": "context_block.attn.ln_k",
    ".img.proj": "x_block.attn.proj",
    ".txt.proj": "context_block.attn.proj",
    ".img.mlp.fc1": "x_block.mlp.fc1",
    ".img.mlp.fc2": "x_block.mlp.fc2",
    ".txt.mlp.fc1": "context_block.mlp.fc1",
    ".txt.mlp.fc2": "context_block.mlp.fc2",
    ".second.qkv": "x_block.attn2.qkv",
    ".second.norm.query": "x_block.attn2.ln_q",
    ".second.norm.key": "x_block.attn2.ln_k",
    ".second.proj": "x_block.attn2.proj",
}
# Stability's final and last text modulations are (shift, scale); diffusers' and ours are the other
# way round.
_SWAPPED = ("final_mod", "last_txt_mod")


def stacks(config: SD3Config) -> dict[str, int]:
    """Our stacks of blocks and the number of the first block of each in a checkpoint."""
    first = {}
    if config.dual_layers:
        first["dual"] = 0
    if config.joint_layers:
        first["joint"] = config.dual_layers
    first["last"] = config.num_layers - 1
    return first


def diffusers_table(config: SD3Config) -> Table:
    """The table of diffusers' transformer/ folder."""
    rows = _rows(config, _DIFFUSERS_ENDS, "transformer_blocks.{}.", _DIFFUSERS_BLOCK)
    return _table(config, rows)


def stability_table(config: SD3Config) -> Table:
    """The table of Stability's single file."""
    rows = _rows(config, _STABILITY_ENDS, "joint_blocks.{}.", _STABILITY_BLOCK)
    for name in _SWAPPED:
        (whole,) = rows[name]
        rows[name] = (
            Part(whole.module, 1, 2, 2, first=whole.first),
            Part(whole.module, 0, 1, 2, first=whole.first),
        )
    return _table(config, rows)


def _rows(
    config: SD3Config, ends: dict[str, Any], prefix: str, block: dict[str, Any]
) -> dict[str, tuple[Part, ...]]:
    """The rows of a table: our modules outside the blocks, and those of each stack."""
    rows = table_rows(ends)
    for stack, first in stacks(config).items():
        theirs = {}
        for ours, names in block.items():
            parts = names if isinstance(names, tuple) else (names,)
            theirs[stack + ours] = tuple(prefix + part for part in parts)
        rows |= table_rows(theirs, first)
    return rows


def _table(config: SD3Config, rows: dict[str, tuple[Part, ...]]) -> Table:
    side = config.pos_embed_max_size
    positions = Cut(
        shape=(1, side * side, config.hidden_dim),
        cut=partial(_cut_positions, config),
        restore=partial(_restore_positions, config),
    )
    return Table(rows, FUSED, windows={"img_in": (2, 2)}, cuts={"pos": positions})


def _cut_positions(config: SD3Config, table: np.ndarray) -> np.ndarray:
    """The positions of the run's pictures: [1, m m, D] -> [s, D], m = pos_embed_max_size."""
    side = config.pos_embed_max_size
    rows, columns = central(config)
    return table.reshape(side, side, -1)[np.ix_(rows, columns)].reshape(-1, table.shape[-1])


def _restore_positions(config: SD3Config, ours: np.ndarray) -> np.ndarray:
    """A whole table: our positions in the centre of those by the formula, [s, D] -> [1, m m, D]."""
    side = config.pos_embed_max_size
    everywhere = np.arange(side)
    table = position_table(config, everywhere, everywhere).astype(ours.dtype)
    table = table.reshape(side, side, -1)
    rows, columns = central(config)
    table[np.ix_(rows, columns)] = ours.reshape(len(rows), len(columns), -1)
    return table.reshape(1, side * side, -1)


# How each array is sharded, by a pattern of its path; exactly one rule matches. Stacked arrays have
# a leading layer axis and fused projections an axis for their parts; the layer axis is never split.
# Projections into the heads or the feed-forward split their outputs (and bias) over `tensor`;
# projections out of them split their inputs.
_STREAM = r"(dual|joint|last)\.(img|txt|second)"
RULES = (
    (_STREAM + r"\.qkv\.kernel", P(None, "fsdp", None, "tensor")),
    (_STREAM + r"\.mlp\.fc1\.kernel", P(None, "fsdp", "tensor")),
    (_STREAM + r"\.(proj|mlp\.fc2)\.kernel", P(None, ("tensor", "fsdp"))),
    (r"(dual|joint|last)_(img|txt)_mod\.kernel", P(None, None, ("fsdp", "tensor"))),
    (r"(dual|joint|last)_(img|txt)_mod\.bias", P(None, ("fsdp", "tensor"))),
    (r"(img|txt)_in\.kernel", P(None, "fsdp")),
    (r"(time|vector)_in\.fc1\.kernel", P("fsdp", "tensor")),
    (r"(time|vector)_in\.fc2\.kernel", P("tensor", "fsdp")),
    (r"final_mod\.kernel", P("fsdp", "tensor")),
    (r"proj_out\.kernel", P("fsdp", None)),
    (_STREAM + r"\.qkv\.bias", P(None, None, "tensor")),
    (_STREAM + r"\.mlp\.fc1\.bias", P(None, "tensor")),
    (r"(time|vector)_in\.fc1\.bias", P("tensor")),
    (r"((img|txt)_in|final_mod|.*\.proj|proj_out|.*\.fc2)\.bias", P()),
    (_STREAM + r"\.norm\.(query|key)|pos", P()),
)


def lora_targets(config: SD3Config) -> tuple[str, ...]:
    """The targets of RealGen, Flow-GRPO and Adv-GRPO: the projections of the joint attention.

    Neither the second attention nor the feed-forwards are among them. The last block's text has no
    output projection; its queries are adapted like their fused keys and values, but never learn.
    """
    targets = []
    for stack in stacks(config):
        targets += [f"{stack}.img.qkv", f"{stack}.img.proj", f"{stack}.txt.qkv"]
        if stack != "last":
            targets.append(f"{stack}.txt.proj")
    return tuple(targets)
