"""What published checkpoints call our modules. Data only; `convert.py` reads it, `lora.py` names its files by it.

A table maps a module of ours to the torch modules that fill it, side by side along the output axis. "{}" stands for
the layer of a stacked block.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A torch module, or the share [start, stop) of its outputs, in `of`-ths."""

    module: str
    start: int = 0
    stop: int = 1
    of: int = 1


Table = Mapping[str, tuple[Part, ...]]


def table(rows: Mapping[str, str | tuple[str | Part, ...]]) -> Table:
    """Spell out the short forms: a string is a whole module, a bare one is a tuple of one."""
    return {
        ours: tuple(
            Part(p) if isinstance(p, str) else p
            for p in ((theirs,) if isinstance(theirs, str) else theirs)
        )
        for ours, theirs in rows.items()
    }


_DOUBLE, _SINGLE, _EMBED = (
    "transformer_blocks.{}.",
    "single_transformer_blocks.{}.",
    "time_text_embed.",
)
DIFFUSERS = table({
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.fc1": _EMBED + "timestep_embedder.linear_1",
    "time_in.fc2": _EMBED + "timestep_embedder.linear_2",
    "guidance_in.fc1": _EMBED + "guidance_embedder.linear_1",
    "guidance_in.fc2": _EMBED + "guidance_embedder.linear_2",
    "vector_in.fc1": _EMBED + "text_embedder.linear_1",
    "vector_in.fc2": _EMBED + "text_embedder.linear_2",
    "double_img_mod": _DOUBLE + "norm1.linear",
    "double_txt_mod": _DOUBLE + "norm1_context.linear",
    "double.img.qkv": (_DOUBLE + "attn.to_q", _DOUBLE + "attn.to_k", _DOUBLE + "attn.to_v"),
    "double.txt.qkv": (_DOUBLE + "attn.add_q_proj", _DOUBLE + "attn.add_k_proj", _DOUBLE + "attn.add_v_proj"),
    "double.img.norm.query": _DOUBLE + "attn.norm_q",
    "double.img.norm.key": _DOUBLE + "attn.norm_k",
    "double.txt.norm.query": _DOUBLE + "attn.norm_added_q",
    "double.txt.norm.key": _DOUBLE + "attn.norm_added_k",
    "double.img.proj": _DOUBLE + "attn.to_out.0",
    "double.txt.proj": _DOUBLE + "attn.to_add_out",
    "double.img.mlp.fc1": _DOUBLE + "ff.net.0.proj",
    "double.img.mlp.fc2": _DOUBLE + "ff.net.2",
    "double.txt.mlp.fc1": _DOUBLE + "ff_context.net.0.proj",
    "double.txt.mlp.fc2": _DOUBLE + "ff_context.net.2",
    "single_mod": _SINGLE + "norm.linear",
    "single.qkv": (_SINGLE + "attn.to_q", _SINGLE + "attn.to_k", _SINGLE + "attn.to_v"),
    "single.norm.query": _SINGLE + "attn.norm_q",
    "single.norm.key": _SINGLE + "attn.norm_k",
    "single.mlp": _SINGLE + "proj_mlp",
    "single.proj": _SINGLE + "proj_out",
    "final_mod": "norm_out.linear",
    "proj_out": "proj_out",
})  # fmt: skip

_DOUBLE, _SINGLE = "double_blocks.{}.", "single_blocks.{}."
BFL = table({
    "img_in": "img_in",
    "txt_in": "txt_in",
    "time_in.fc1": "time_in.in_layer",
    "time_in.fc2": "time_in.out_layer",
    "guidance_in.fc1": "guidance_in.in_layer",
    "guidance_in.fc2": "guidance_in.out_layer",
    "vector_in.fc1": "vector_in.in_layer",
    "vector_in.fc2": "vector_in.out_layer",
    "double_img_mod": _DOUBLE + "img_mod.lin",
    "double_txt_mod": _DOUBLE + "txt_mod.lin",
    "double.img.qkv": _DOUBLE + "img_attn.qkv",
    "double.txt.qkv": _DOUBLE + "txt_attn.qkv",
    "double.img.norm.query": _DOUBLE + "img_attn.norm.query_norm",
    "double.img.norm.key": _DOUBLE + "img_attn.norm.key_norm",
    "double.txt.norm.query": _DOUBLE + "txt_attn.norm.query_norm",
    "double.txt.norm.key": _DOUBLE + "txt_attn.norm.key_norm",
    "double.img.proj": _DOUBLE + "img_attn.proj",
    "double.txt.proj": _DOUBLE + "txt_attn.proj",
    "double.img.mlp.fc1": _DOUBLE + "img_mlp.0",
    "double.img.mlp.fc2": _DOUBLE + "img_mlp.2",
    "double.txt.mlp.fc1": _DOUBLE + "txt_mlp.0",
    "double.txt.mlp.fc2": _DOUBLE + "txt_mlp.2",
    "single_mod": _SINGLE + "modulation.lin",
    "single.qkv": (Part(_SINGLE + "linear1", 0, 3, 7),),
    "single.mlp": (Part(_SINGLE + "linear1", 3, 7, 7),),
    "single.proj": _SINGLE + "linear2",
    "single.norm.query": _SINGLE + "norm.query_norm",
    "single.norm.key": _SINGLE + "norm.key_norm",
    # BFL's last modulation is (shift, scale); diffusers' and ours is (scale, shift)
    "final_mod": (Part("final_layer.adaLN_modulation.1", 1, 2, 2), Part("final_layer.adaLN_modulation.1", 0, 1, 2)),
    "proj_out": "final_layer.linear",
})  # fmt: skip

# Our arrays that keep the parts of a fused projection apart, and on which axis (counted from the end); in the files it
# is one with the axis after it: qkv [in, 3, D], the two ways into and out of the single blocks' feed-forward [in, 4, D]
# and [5, D, out].
PARTS_AXIS = {
    "qkv.kernel": -2, "qkv.bias": -2, "single.mlp.kernel": -2, "single.mlp.bias": -2, "single.proj.kernel": -3,
}  # fmt: skip

# BFL's autoencoder as edits of diffusers' names, which are also ours. Its decoder counts levels the other way round.
BFL_VAE_EDITS = (
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

# Subfolders of the pipeline whose files decide the text embeddings
ENCODERS = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")
