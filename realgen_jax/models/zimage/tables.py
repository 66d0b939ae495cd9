"""The names of our modules in published Z-Image checkpoints. Data only; nn/convert.py reads it."""

from collections.abc import Mapping

from jax.sharding import PartitionSpec as P

from realgen_jax.nn.convert import Table, table_rows

# Our stacks of blocks -> diffusers' name of a block.
STACKS = {
    "noise": "noise_refiner.{}.",
    "context": "context_refiner.{}.",
    "layers": "layers.{}.",
}

# Arrays with a separate axis for the parts of a fused projection, and that axis from the end:
# qkv [in, 3, D]; into the feed-forward [in, 2, F].
FUSED = {"qkv.kernel": -2, "mlp.fc1.kernel": -2}

# Stored as a tensor [1, D] without a suffix.
BARE = frozenset({"x_pad", "cap_pad"})

# diffusers' names, and ComfyUI's where they differ.
_DIFFUSERS_ENDS = {
    "img_in": "all_x_embedder.2-1",
    "x_pad": "x_pad_token",
    "cap_norm": "cap_embedder.0",
    "cap_in": "cap_embedder.1",
    "cap_pad": "cap_pad_token",
    "time_in.fc1": "t_embedder.mlp.0",
    "time_in.fc2": "t_embedder.mlp.2",
    "final_mod": "all_final_layer.2-1.adaLN_modulation.1",
    "proj_out": "all_final_layer.2-1.linear",
}
_COMFYUI_ENDS = {
    "img_in": "x_embedder",
    "final_mod": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
# `context` has no modulation, and so no array reads that row.
_DIFFUSERS_BLOCK = {
    "_mod": "adaLN_modulation.0",
    ".qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    ".norm.query": "attention.norm_q",
    ".norm.key": "attention.norm_k",
    ".proj": "attention.to_out.0",
    ".mlp.fc1": ("feed_forward.w1", "feed_forward.w3"),
    ".mlp.fc2": "feed_forward.w2",
    ".norm1": "attention_norm1",
    ".norm2": "attention_norm2",
    ".norm3": "ffn_norm1",
    ".norm4": "ffn_norm2",
}
_COMFYUI_BLOCK = {
    ".qkv": "attention.qkv",
    ".norm.query": "attention.q_norm",
    ".norm.key": "attention.k_norm",
    ".proj": "attention.out",
}


def _table(
    ends: Mapping[str, str],
    block: Mapping[str, str | tuple[str, ...]],
    unused: frozenset[str] = frozenset(),
) -> Table:
    """The table of a naming: names outside the blocks, and inside."""
    rows = dict(ends)
    for stack, prefix in STACKS.items():
        for ours, names in block.items():
            parts = names if isinstance(names, tuple) else (names,)
            rows[stack + ours] = tuple(prefix + part for part in parts)
    return Table(table_rows(rows), FUSED, bare=BARE, unused=unused)


DIFFUSERS = _table(_DIFFUSERS_ENDS, _DIFFUSERS_BLOCK)
COMFYUI = _table(
    _DIFFUSERS_ENDS | _COMFYUI_ENDS,
    _DIFFUSERS_BLOCK | _COMFYUI_BLOCK,
    unused=frozenset({"norm_final.weight"}),
)

# How each array is sharded, by a pattern of its path; exactly one rule matches. Stacked arrays have
# a leading layer axis and fused projections an axis for their parts; the layer axis is never split.
# Projections into the heads or the feed-forward split their outputs over `tensor`; projections out
# of them split their inputs.
RULES = (
    (r"(noise|context|layers)\.qkv\.kernel", P(None, "fsdp", None, "tensor")),
    (r"(noise|context|layers)\.mlp\.fc1\.kernel", P(None, "fsdp", None, "tensor")),
    (r"(noise|context|layers)\.(proj|mlp\.fc2)\.kernel", P(None, ("tensor", "fsdp"))),
    (r"(noise|layers)_mod\.kernel", P(None, None, ("fsdp", "tensor"))),
    (r"(noise|layers)_mod\.bias", P(None, ("fsdp", "tensor"))),
    (r"(img|cap)_in\.kernel", P(None, "fsdp")),
    (r"time_in\.fc1\.kernel", P("fsdp", "tensor")),
    (r"time_in\.fc2\.kernel", P("tensor", "fsdp")),
    (r"final_mod\.kernel", P("fsdp", "tensor")),
    (r"proj_out\.kernel", P("fsdp", None)),
    (r"time_in\.fc1\.bias", P("tensor")),
    (r"((img|cap)_in|time_in\.fc2|final_mod|proj_out)\.bias", P()),
    (r"(noise|context|layers)\.(norm\.(query|key)|norm[1-4])|cap_norm|(x|cap)_pad", P()),
)

# RealGen V2's LoRA targets: attention and feed-forward of all blocks, the refiners included.
LORA_TARGETS = tuple(
    f"{stack}.{projection}"
    for stack in STACKS
    for projection in ("qkv", "proj", "mlp.fc1", "mlp.fc2")
)
