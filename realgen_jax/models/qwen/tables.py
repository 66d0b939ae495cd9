"""The names of our modules in Hugging Face's Qwen3 folders. Data only; nn/convert.py reads it."""

from jax.sharding import PartitionSpec as P

from realgen_jax.nn.convert import Table, table_rows

_LAYER = "model.layers.{}."
_ROWS = {
    "embedding": "model.embed_tokens.weight",
    "layers.input_norm": _LAYER + "input_layernorm",
    "layers.q": _LAYER + "self_attn.q_proj",
    "layers.k": _LAYER + "self_attn.k_proj",
    "layers.v": _LAYER + "self_attn.v_proj",
    "layers.q_norm": _LAYER + "self_attn.q_norm",
    "layers.k_norm": _LAYER + "self_attn.k_norm",
    "layers.o": _LAYER + "self_attn.o_proj",
    "layers.mlp_norm": _LAYER + "post_attention_layernorm",
    "layers.gate": _LAYER + "mlp.gate_proj",
    "layers.up": _LAYER + "mlp.up_proj",
    "layers.down": _LAYER + "mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head.weight",
}
# The embedding and the head, both [V, D], are stored in torch's layout.
TRANSFORMERS = Table(table_rows(_ROWS), bare=frozenset({"embedding", "head"}))
EMBEDDING = _ROWS["embedding"]
HEAD = _ROWS["head"]

# How each array is sharded, by a pattern of its path; exactly one rule matches. The layer axis is
# never split. Projections into the heads or the feed-forward split their outputs over `tensor`, in
# whole heads; projections out of them split their inputs.
RULES = (
    (r"embedding|head", P("tensor", "fsdp")),
    (r"layers\.(q|k|v|gate|up)\.kernel", P(None, "fsdp", "tensor")),
    (r"layers\.(o|down)\.kernel", P(None, ("tensor", "fsdp"))),
    (r"norm|layers\.(input|mlp|q|k)_norm", P()),
)

# All projections of a block.
LORA_TARGETS = tuple(f"layers.{name}" for name in ("q", "k", "v", "o", "gate", "up", "down"))
