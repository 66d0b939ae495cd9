"""Operations and bytes of a language model (Qwen3): rewriting, replay and update.

Operations count a multiplication and an addition as two. Bytes are those of the largest arrays that
are alive at once; what is smaller is left out.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

F32 = 4


@dataclass(frozen=True)
class LanguageWork:
    """The sizes of an epoch's rewrites. model: the language model's sizes (models/qwen).

    rank: of the LoRA; 0: all weights train. rows: rewrites. prompt, new: tokens of a prompt and of
    a rewrite, padding included. microbatch: rows of one forward and backward pass. chunk: tokens of
    a row whose logits are in memory at a time. reference: whether the base model replays too.
    recompute: whether old log-probs are replayed. fsdp, tensor: sizes of the mesh's axes that split
    the weights. flash: whether attention keeps its scores on chip, as on NVIDIA GPUs.
    """

    model: Any
    rank: int
    rows: int
    prompt: int
    new: int
    microbatch: int
    chunk: int
    reference: bool
    recompute: bool
    inner_epochs: int
    fsdp: int = 1
    tensor: int = 1
    flash: bool = True

    @property
    def length(self) -> int:
        return self.prompt + self.new


def block_weights(model: Any) -> int:
    """Weights of the projections of all blocks."""
    width = model.hidden_size
    queries = model.num_attention_heads * model.head_dim
    keys = model.num_key_value_heads * model.head_dim
    attention = 2 * width * queries + 2 * width * keys
    return model.num_hidden_layers * (attention + 3 * width * model.intermediate_size)


def adapter_weights(model: Any, rank: int) -> int:
    """Weights of the adapters on all seven projections."""
    width = model.hidden_size
    queries = model.num_attention_heads * model.head_dim
    keys = model.num_key_value_heads * model.head_dim
    sides = 2 * (width + queries) + 2 * (width + keys) + 3 * (width + model.intermediate_size)
    return model.num_hidden_layers * rank * sides


def head_flops(model: Any) -> float:
    """Operations of one token's logits."""
    return 2.0 * model.hidden_size * model.vocab_size


def token_flops(work: LanguageWork, context: float) -> float:
    """Operations of one token's way through the blocks, with `context` tokens to attend to."""
    model = work.model
    heads = model.num_attention_heads * model.head_dim
    attention = 4.0 * model.num_hidden_layers * heads * context
    return 2.0 * (block_weights(model) + adapter_weights(model, work.rank)) + attention


def epoch_flops(work: LanguageWork) -> dict[str, float]:
    """Operations of an epoch over all devices, by part."""
    tokens = work.rows * work.length
    new = work.rows * work.new
    head = head_flops(work.model)

    # Each token attends to those before it: on average to half of the row in a replay.
    blocks = tokens * token_flops(work, work.length / 2)
    replay = blocks + new * head

    # Rewriting: the prompt at once, then token by token over the whole cache.
    prefill = work.rows * work.prompt * token_flops(work, work.prompt / 2)
    decode = new * (token_flops(work, work.length) + head)

    # The update: forward, forward again (rematerialisation) and backward. Frozen weights have no
    # gradient; trained ones take as much again.
    backward = replay * (2.0 if work.rank == 0 else 1.0)
    update = work.inner_epochs * (2 * replay + backward)
    if work.recompute:
        update += 2 * replay + backward
    return {
        "rewrite": prefill + decode,
        "reference": replay if work.reference else 0.0,
        "update": update,
    }


def decode_bytes_read(work: LanguageWork, parts: int) -> float:
    """Bytes that one device reads from its memory while rewrites are sampled.

    Each token reads all weights, and the keys and values of all tokens (padding included).
    """
    weights = copied_bytes(work) + head_bytes(work)
    return work.new * (weights + cache_bytes(work, parts, work.length))


def head_bytes(work: LanguageWork) -> float:
    """Bytes of the head, or of the embedding that it is tied to, in the compute dtype."""
    model = work.model
    return jnp.dtype(model.dtype).itemsize * model.hidden_size * model.vocab_size / work.tensor


def copied_bytes(work: LanguageWork) -> float:
    """Bytes of the blocks, layer by layer: weights that are not split over fsdp, and adapters."""
    model = work.model
    weights = jnp.dtype(model.dtype).itemsize * block_weights(model) / work.tensor
    return weights + F32 * adapter_weights(model, work.rank)


def cache_bytes(work: LanguageWork, parts: int, tokens: int) -> float:
    """Bytes of the keys and values of so many tokens of each of one device's rewrites."""
    model = work.model
    item = jnp.dtype(model.dtype).itemsize
    width = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim
    return item * width * tokens * work.rows / parts


def rewrite_bytes(work: LanguageWork, parts: int) -> dict[str, float]:
    """Bytes on one device while rewrites are sampled, besides weights and optimizer state.

    The largest of three moments: the prompts are read, their keys and values move into the cache,
    tokens are drawn. Before the second, the weights are copied layer by layer (LanguageModel
    .decoder); those that are split over fsdp are gathered, and the head with them.
    """
    rows = work.rows / parts
    prompts = cache_bytes(work, parts, work.prompt)
    cache = cache_bytes(work, parts, work.length)
    weights = copied_bytes(work) + head_bytes(work) * (work.fsdp > 1)
    moments = (
        {
            "keys and values": prompts,
            "activations": block_bytes(work, rows, work.prompt, backward=False),
        },
        {"copy of the weights": weights, "keys and values": prompts + cache},
        {
            "copy of the weights": weights,
            "keys and values": cache,
            # The logits of the next token, and the noise that is added to them.
            "logits": 2 * F32 * rows * work.model.vocab_size,
        },
    )
    return max(moments, key=lambda parts: sum(parts.values()))


def update_bytes(work: LanguageWork, parts: int, trained: float) -> dict[str, float]:
    """Bytes on one device during an update, besides weights and optimizer state.

    The larger of two moments, the backward pass of the head and that of the blocks. trained: bytes
    of the trained arrays on this device.
    """
    model = work.model
    full = work.rank == 0
    rows = work.microbatch / parts
    states = jnp.dtype(model.dtype).itemsize * rows * work.length * model.hidden_size
    inputs = model.num_hidden_layers * states

    # The logits and their gradient, and a constant of their size if chunks are looped over. If the
    # head is trained, the gradient alone is left when the head's own, in float32, is computed.
    looped = work.new > work.chunk
    chunk = F32 * rows * min(work.chunk, work.new) * model.vocab_size
    weights = F32 * model.vocab_size * model.hidden_size / work.tensor

    # A split head is gathered, and turned. A loop adds up its gradient in two layouts.
    head = 2 * head_bytes(work) * (work.fsdp > 1) + weights * full
    added = 2 * weights / work.fsdp * (looped and full)
    moments = (
        {
            "block inputs": inputs,
            "logits": (2 + looped - full) * chunk,
            "head": head,
            # The sum.
            "gradients": trained + added,
        },
        {
            "block inputs": inputs,
            "activations": block_bytes(work, rows, work.length, backward=True),
            # The sum and the current microbatch's.
            "gradients": 2 * trained,
        },
    )
    return max(moments, key=lambda parts: sum(parts.values()))


def block_bytes(work: LanguageWork, rows: float, tokens: int, backward: bool) -> float:
    """Bytes of one block's activations; a backward pass has their gradients too.

    Without a flash kernel, the scores of attention, [rows, heads, tokens, tokens], are in memory in
    float32.
    """
    model = work.model
    item = jnp.dtype(model.dtype).itemsize
    queries = model.num_attention_heads * model.head_dim
    keys = model.num_key_value_heads * model.head_dim
    channels = 3 * model.hidden_size + 2 * queries + 2 * keys + 3 * model.intermediate_size
    scores = F32 * rows * model.num_attention_heads * tokens**2 * (not work.flash)
    return (1 + backward) * (item * rows * tokens * channels + scores)
