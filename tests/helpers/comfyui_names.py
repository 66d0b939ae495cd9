"""ComfyUI's names of a Z-Image transformer, written out by hand."""

import re

import numpy as np

OUTSIDE = {"all_x_embedder.2-1.": "x_embedder.", "all_final_layer.2-1.": "final_layer."}


def comfyui_zimage(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """ComfyUI's file, from diffusers' tensors. Every tensor is used once."""
    out = {}
    fused = {}
    for key, array in weights.items():
        for theirs, ours in OUTSIDE.items():
            key = key.replace(theirs, ours)
        key = re.sub(r"norm_([qk])\.weight", r"\1_norm.weight", key)
        key = key.replace("attention.to_out.0.", "attention.out.")
        projection = re.fullmatch(r"(.*attention)\.to_([qkv])\.weight", key)
        if projection:
            fused.setdefault(projection[1], {})[projection[2]] = array
        else:
            out[key] = array
    for attention, parts in fused.items():
        out[f"{attention}.qkv.weight"] = np.concatenate([parts[letter] for letter in "qkv"])
    return out
