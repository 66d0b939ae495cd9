"""Stability's names of an SD3 transformer, written out by hand."""

from typing import Any

import numpy as np

OUTSIDE = (
    ("pos_embed.proj", "x_embedder.proj"),
    ("context_embedder", "context_embedder"),
    ("time_text_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
    ("time_text_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
    ("time_text_embed.text_embedder.linear_1", "y_embedder.mlp.0"),
    ("time_text_embed.text_embedder.linear_2", "y_embedder.mlp.2"),
    ("proj_out", "final_layer.linear"),
)
# A stream in Stability's block, the attention in it, and diffusers' names of its projections.
ATTENTIONS = (
    ("x_block", "attn", ("attn.to_q", "attn.to_k", "attn.to_v"), "attn.to_out.0"),
    (
        "context_block",
        "attn",
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "attn.to_add_out",
    ),
    ("x_block", "attn2", ("attn2.to_q", "attn2.to_k", "attn2.to_v"), "attn2.to_out.0"),
)
NORMS = {
    ("x_block", "attn"): ("attn.norm_q", "attn.norm_k"),
    ("context_block", "attn"): ("attn.norm_added_q", "attn.norm_added_k"),
    ("x_block", "attn2"): ("attn2.norm_q", "attn2.norm_k"),
}


def stability_transformer(weights: dict[str, np.ndarray], config: Any) -> dict[str, np.ndarray]:
    """Stability's file, from diffusers' tensors and their config. Every tensor is used once."""
    left = dict(weights)
    out = {"pos_embed": left.pop("pos_embed.pos_embed")}

    def put(theirs, *ours, swapped=False):
        for kind in (".weight", ".bias"):
            array = np.concatenate([left.pop(name + kind) for name in ours])
            out[theirs + kind] = np.roll(array, len(array) // 2, axis=0) if swapped else array

    for ours, theirs in OUTSIDE:
        put(theirs, ours)
    put("final_layer.adaLN_modulation.1", "norm_out.linear", swapped=True)

    for i in range(config.num_layers):
        d, s = f"transformer_blocks.{i}.", f"joint_blocks.{i}."
        last = i == config.num_layers - 1
        put(s + "x_block.adaLN_modulation.1", d + "norm1.linear")
        put(s + "context_block.adaLN_modulation.1", d + "norm1_context.linear", swapped=last)
        for stream, attention, qkv, output in ATTENTIONS:
            if attention == "attn2" and i not in config.dual_attention_layers:
                continue
            put(s + f"{stream}.{attention}.qkv", *(d + name for name in qkv))
            if not (last and stream == "context_block"):
                put(s + f"{stream}.{attention}.proj", d + output)
            if config.qk_norm:
                for norm, letter in zip(NORMS[stream, attention], "qk", strict=True):
                    key = s + f"{stream}.{attention}.ln_{letter}.weight"
                    out[key] = left.pop(d + norm + ".weight")
        for ours, stream in (("ff", "x_block"), ("ff_context", "context_block")):
            if not (last and ours == "ff_context"):
                put(s + f"{stream}.mlp.fc1", d + f"{ours}.net.0.proj")
                put(s + f"{stream}.mlp.fc2", d + f"{ours}.net.2")
    assert not left, sorted(left)
    return out
