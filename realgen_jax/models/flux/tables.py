"""The names of our modules in published FLUX.1 checkpoints. Data only; nn/convert.py reads it."""

from jax.sharding import PartitionSpec as P

from realgen_jax.nn.convert import SUFFIXES, Part, Table, table_rows

# Arrays with a separate axis for the parts of a fused projection, and that axis from the end:
# qkv [in, 3, D]; into and out of the single blocks' feed-forward [in, 4, D] and [5, D, out].
FUSED = {
    "qkv.kernel": -2,
    "qkv.bias": -2,
    "single.mlp.kernel": -2,
    "single.mlp.bias": -2,
    "single.proj.kernel": -3,
}

_DOUBLE = "transformer_blocks.{}."
_SINGLE = "single_transformer_blocks.{}."
_EMBED = "time_text_embed."
_DIFFUSERS_ROWS = {
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
    "double.txt.qkv": (
        _DOUBLE + "attn.add_q_proj",
        _DOUBLE + "attn.add_k_proj",
        _DOUBLE + "attn.add_v_proj",
    ),
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
}
DIFFUSERS = Table(table_rows(_DIFFUSERS_ROWS), FUSED)

_DOUBLE = "double_blocks.{}."
_SINGLE = "single_blocks.{}."
_BFL_ROWS = {
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
    "final_mod": (
        Part("final_layer.adaLN_modulation.1", 1, 2, 2),
        Part("final_layer.adaLN_modulation.1", 0, 1, 2),
    ),
    "proj_out": "final_layer.linear",
}
BFL = Table(table_rows(_BFL_ROWS), FUSED, {**SUFFIXES, "scale": ".scale"})

# XLabs' names of the projections that its LoRAs are for. The factors of the single blocks' second
# projection take what linear2 takes.
_XLABS_ROWS = {
    "double.img.qkv": _DOUBLE + "processor.qkv_lora1",
    "double.txt.qkv": _DOUBLE + "processor.qkv_lora2",
    "double.img.proj": _DOUBLE + "processor.proj_lora1",
    "double.txt.proj": _DOUBLE + "processor.proj_lora2",
    "single.qkv": _SINGLE + "processor.qkv_lora",
    "single.proj": _SINGLE + "processor.proj_lora",
}
XLABS = Table(table_rows(_XLABS_ROWS), FUSED)

# Keys of files that are not FLUX.1's, though they are named like it, and words in files' names.
OTHER_MODELS = {
    "redux_up.weight": "FLUX.1-Redux, which takes a picture",
    "kontext": "FLUX.1-Kontext, which takes a picture",
    "double_stream_modulation_img.lin.weight": "FLUX.2",
    "distilled_guidance_layer.in_proj.weight": "Chroma, which has other modulations",
    "controlnet_blocks.0.weight": "a ControlNet",
    "double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight": "an IP-Adapter",
}

# How each array is sharded, by a pattern of its path; exactly one rule matches. Stacked arrays have
# a leading layer axis and fused projections an axis for their parts; the layer axis is never split.
# Projections into the heads or the feed-forward split their outputs (and bias) over `tensor`;
# projections out of them split their inputs.
RULES = (
    (r"(double\.(img|txt)|single)\.qkv\.kernel", P(None, "fsdp", None, "tensor")),
    (r"double\.(img|txt)\.mlp\.fc1\.kernel", P(None, "fsdp", "tensor")),
    (r"double\.(img|txt)\.(proj|mlp\.fc2)\.kernel", P(None, ("tensor", "fsdp"))),
    (r"single\.mlp\.kernel", P(None, "fsdp", None, "tensor")),
    (r"single\.proj\.kernel", P(None, None, ("tensor", "fsdp"))),
    (r"(double_(img|txt)|single)_mod\.kernel", P(None, None, ("fsdp", "tensor"))),
    (r"(double_(img|txt)|single)_mod\.bias", P(None, ("fsdp", "tensor"))),
    (r"(img|txt)_in\.kernel", P(None, "fsdp")),
    (r"(time|guidance|vector)_in\.fc1\.kernel", P("fsdp", "tensor")),
    (r"(time|guidance|vector)_in\.fc2\.kernel", P("tensor", "fsdp")),
    (r"final_mod\.kernel", P("fsdp", "tensor")),
    (r"proj_out\.kernel", P("fsdp", None)),
    (r"(double\.(img|txt)|single)\.qkv\.bias|single\.mlp\.bias", P(None, None, "tensor")),
    (r"double\.(img|txt)\.mlp\.fc1\.bias", P(None, "tensor")),
    (r"(time|guidance|vector)_in\.fc1\.bias", P("tensor")),
    (r"((img|txt)_in|final_mod|.*proj|proj_out|.*\.fc2)\.bias", P()),
    (r".*\.norm\.(query|key)", P()),
)

# RealGen's LoRA targets: the attention projections of all blocks and the feed-forwards of the
# double blocks. RealGen's suffix rule "attn.to_q" also matches the single blocks, but not their
# proj_mlp and proj_out.
LORA_TARGETS = (
    "double.img.qkv",
    "double.img.proj",
    "double.img.mlp.fc1",
    "double.img.mlp.fc2",
    "double.txt.qkv",
    "double.txt.proj",
    "double.txt.mlp.fc1",
    "double.txt.mlp.fc2",
    "single.qkv",
)
