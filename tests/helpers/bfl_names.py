"""BFL's names of a FLUX.1 transformer, written out by hand."""

from typing import Any

import numpy as np


def bfl_transformer(weights: dict[str, np.ndarray], config: Any) -> dict[str, np.ndarray]:
    """BFL's file, from diffusers' tensors and their config."""
    out = {}

    def put(theirs, *ours):
        for kind in (".weight", ".bias"):
            out[theirs + kind] = np.concatenate([weights[name + kind] for name in ours])

    for ours, theirs in (
        ("x_embedder", "img_in"),
        ("context_embedder", "txt_in"),
        ("proj_out", "final_layer.linear"),
    ):
        put(theirs, ours)
    for ours, theirs in (("timestep", "time"), ("guidance", "guidance"), ("text", "vector")):
        put(f"{theirs}_in.in_layer", f"time_text_embed.{ours}_embedder.linear_1")
        put(f"{theirs}_in.out_layer", f"time_text_embed.{ours}_embedder.linear_2")
    for kind in (".weight", ".bias"):
        scale, shift = np.split(weights["norm_out.linear" + kind], 2)
        out["final_layer.adaLN_modulation.1" + kind] = np.concatenate([shift, scale])
    for i in range(config.num_layers):
        d, b = f"transformer_blocks.{i}.", f"double_blocks.{i}."
        put(b + "img_mod.lin", d + "norm1.linear")
        put(b + "txt_mod.lin", d + "norm1_context.linear")
        put(b + "img_attn.qkv", d + "attn.to_q", d + "attn.to_k", d + "attn.to_v")
        put(b + "txt_attn.qkv", d + "attn.add_q_proj", d + "attn.add_k_proj", d + "attn.add_v_proj")
        put(b + "img_attn.proj", d + "attn.to_out.0")
        put(b + "txt_attn.proj", d + "attn.to_add_out")
        for mine, stream in (("ff", "img"), ("ff_context", "txt")):
            put(b + f"{stream}_mlp.0", d + f"{mine}.net.0.proj")
            put(b + f"{stream}_mlp.2", d + f"{mine}.net.2")
        for stream, infix in (("img", ""), ("txt", "added_")):
            for norm, letter in (("query", "q"), ("key", "k")):
                out[b + f"{stream}_attn.norm.{norm}_norm.scale"] = weights[
                    d + f"attn.norm_{infix}{letter}.weight"
                ]
    for i in range(config.num_single_layers):
        d, b = f"single_transformer_blocks.{i}.", f"single_blocks.{i}."
        put(b + "modulation.lin", d + "norm.linear")
        put(b + "linear1", d + "attn.to_q", d + "attn.to_k", d + "attn.to_v", d + "proj_mlp")
        put(b + "linear2", d + "proj_out")
        out[b + "norm.query_norm.scale"] = weights[d + "attn.norm_q.weight"]
        out[b + "norm.key_norm.scale"] = weights[d + "attn.norm_k.weight"]
    return out
