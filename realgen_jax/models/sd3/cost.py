"""The cost of Stable Diffusion 3: floating-point operations and memory, by formula.

As in models/flux/cost.py; these are the costs of one pass. Symbols: n images, s image tokens,
l text tokens, T = s + l, D channels, L blocks of which the first L2 have a second attention, r the
rank of the LoRA, u the bytes of one activation [n, T, D].

tests/realgen_jax/models/sd3/test_cost.py compares the formulas with XLA's own figures.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from realgen_jax.models.cost import F32, Work, fused_attention, replay_flops
from realgen_jax.nn.layers import TIME_CHANNELS
from realgen_jax.nn.tokens import PATCH


def forward_flops(work: Work) -> dict[str, float]:
    """Operations of one pass for one image, by kind.

    SD3.5-M at 1024 + 205 tokens: matmul 1.94 and attention 0.28 TFLOP.
    """
    model = work.model
    dim = model.hidden_dim
    blocks = model.num_layers
    image = work.image_tokens
    text = work.text_tokens
    tokens = work.tokens

    # Projections. A block multiplies every token by 12 D^2 weights: qkv 3, proj 1, feed-forward 8.
    # The last block has only qkv for the text. The second attention has 4 D^2 for image tokens.
    token_blocks = (blocks - 1) * tokens + image
    second = model.dual_layers * image
    matmul = 2.0 * dim * dim * (12 * token_blocks + 3 * text + 4 * second) + _ends_flops(work)

    # Q K' and P V: 2 T^2 D each. Only the image has queries in the last block.
    pairs = (blocks - 1) * tokens**2 + image * tokens + model.dual_layers * image**2
    attention = 4.0 * dim * pairs

    # Once per image: the AdaLN projections (12 D^2 weights per block, 3 more with a second
    # attention, 8 in the last block, 2 at the end), and the embedders of sigma and pooled text.
    embedders = TIME_CHANNELS + model.pooled_projection_dim + 2 * dim
    modulation = 2.0 * dim * (dim * (12 * blocks - 2 + 3 * model.dual_layers) + embedders)

    # The adapters of qkv and proj, 8 D r weights; in the last block those of the text's qkv, 6 D r.
    lora = 2.0 * dim * work.rank * (8 * token_blocks + 6 * text)

    return {"matmul": matmul, "attention": attention, "modulation": modulation, "lora": lora}


def _ends_flops(work: Work) -> float:
    """Operations of the input (latents, text) and output (latents) projections for one image."""
    latents = work.image_tokens * 2 * PATCH**2 * work.model.in_channels
    text = work.text_tokens * work.model.joint_attention_dim
    return 2.0 * work.model.hidden_dim * (latents + text)


def update_flops(work: Work) -> dict[str, float]:
    """Operations of one image at one step of the window, by purpose."""
    # fc2 ends a block, both streams of it.
    blocks = work.model.num_layers
    last = 8.0 * work.model.hidden_dim**2 * ((blocks - 1) * work.tokens + work.image_tokens)
    return replay_flops(work, forward_flops(work), _ends_flops(work), last)


@dataclass(frozen=True)
class _Sizes:
    """Bytes of the arrays that the formulas below use as units.

    u: an activation [n, T, D]; image, text: its parts. scores, second: the scores of the joint and
    of the second attention, [n, heads, T, T] and [n, heads, s, s] in float32; 0 with flash
    attention. d2: a weight matrix [D, D].
    """

    u: float
    image: float
    text: float
    scores: float
    second: float
    d2: float


def _sizes(work: Work, images: float) -> _Sizes:
    model = work.model
    itemsize = jnp.dtype(model.dtype).itemsize
    token = images * model.hidden_dim * itemsize
    pair = 0.0 if work.flash else images * model.num_attention_heads * F32
    return _Sizes(
        u=work.tokens * token,
        image=work.image_tokens * token,
        text=work.text_tokens * token,
        scores=work.tokens**2 * pair,
        second=work.image_tokens**2 * pair,
        d2=model.hidden_dim**2 * itemsize,
    )


def _modulation(work: Work, images: float) -> float:
    """Bytes of the modulations of all blocks."""
    model = work.model
    rows = 12 * model.num_layers - 4 + 3 * model.dual_layers
    return images * rows * model.hidden_dim * jnp.dtype(model.dtype).itemsize


def saved_bytes(work: Work, images: float) -> tuple[float, float]:
    """Bytes that the forward pass of `images` on one device saves for the backward pass.

    Returns the totals of the blocks with a second attention and of those without. The last block is
    not among them: its scan has one step, which XLA merges with the backward pass.
    """
    model = work.model
    full = work.rank == 0
    normed = model.qk_norm is not None
    size = _sizes(work, images)

    # The outputs of a flash kernel: the attention output and the softmax sums [n, heads, T].
    flash = second_flash = 0.0
    if work.flash:
        sums = images * model.num_attention_heads * F32
        flash = size.u + sums * work.tokens
        second_flash = size.image + sums * work.image_tokens

    # For one block, and what the second attention adds.
    block, second = {
        # The block's input.
        "full": (size.u, 0.0),
        # Also the outputs of the flash kernel.
        "attention": (size.u + flash, second_flash),
        # Also the projections' outputs without adapters: qkv 3, proj 1, fc1 4. Trained weights also
        # need fc2's, which its gate multiplies.
        "dots": ((9 + full) * size.u + flash, 4 * size.image + second_flash),
        # Everything. Norms 5, q, k (also normed), v and the attention's output 5, fc1's output and
        # the steps of GELU 20; the inputs of all projections where weights train. Also the
        # exponentials of the scores, and the reshaped fused kernel, 6 D^2 for both streams.
        "none": (
            (28 + 2 * normed + 11 * full) * size.u + size.scores + 6 * size.d2,
            (5 + 2 * normed + 6 * full) * size.image + size.second + 3 * size.d2,
        ),
    }[model.remat]
    return model.dual_layers * (block + second), model.joint_layers * block


def update_bytes(work: Work, images: float) -> float:
    """Bytes of activations at the peak of an update with `images` on one device.

    The peak is in the backward pass: in the last block, in those without a second attention or in
    those with one.
    """
    model = work.model
    full = work.rank == 0
    normed = model.qk_norm is not None
    size = _sizes(work, images)
    dual, joint = saved_bytes(work, images)

    # The last block: its feed-forward on the image's tokens, with what is recomputed of it.
    scores = size.scores * work.image_tokens / work.tokens
    last = {"full": 40, "attention": 40, "dots": 31, "none": 48}[model.remat]
    if work.fused:
        last = 20  # the hidden layer and its gradient 8, the rest as in any block
    in_last = dual + joint + last * size.image + scores

    # A block without a second attention: sliced weights 24 D^2, and what it recomputes and its
    # gradients, less what is saved.
    known = {"full": 0, "attention": work.flash, "dots": 8 + work.flash, "none": 5}[model.remat]
    block = (19 + 2 * normed - known) * size.u + 2 * size.scores
    in_joint = dual + joint + block + 24 * size.d2

    # A block with one: 4 D^2 more, and its heads, proj and scores.
    known = {"full": 0, "attention": work.flash, "dots": 4 + work.flash, "none": 5}[model.remat]
    second = (6 + 2 * normed - known) * size.image + size.second / 2
    in_dual = dual + block + second + 28 * size.d2

    # Trained weights: the gradients, in float32, of blocks that are still to come are not there
    # yet, and those of blocks that are done are in the sum already.
    gradient = model.hidden_dim**2 * F32 / work.weight_parts * full
    in_last -= (28 * model.dual_layers + 24 * model.joint_layers) * gradient
    in_joint -= 28 * model.dual_layers * gradient
    in_dual -= 24 * model.joint_layers * gradient

    peak = max(in_last, in_joint, in_dual if model.dual_layers else 0.0)
    return _modulation(work, images) + peak + _fetched(work, size) + _unsplit(work)


def _fetched(work: Work, size: _Sizes) -> float:
    """Bytes of a block's gathered weights, if weights are split over devices."""
    matrices = 28 if work.model.dual_layers else 24
    return matrices * size.d2 * (work.weight_parts > 1)


def _unsplit(work: Work) -> float:
    """Bytes of a block's gradient before it is split, and its sum; 0 where no weights train."""
    if work.rank or work.weight_parts == 1:
        return 0.0
    matrices = 28 if work.model.dual_layers else 24
    return 2 * matrices * work.model.hidden_dim**2 * F32


def forward_bytes(work: Work, images: float) -> float:
    """Bytes of activations at the peak of one pass without gradient."""
    size = _sizes(work, images)

    # Where elementwise steps are fused, in the attention.
    if work.fused:
        block = fused_attention(work, size.u, size.scores)
        return _modulation(work, images) + block + _fetched(work, size)

    # In the feed-forward of the longer stream: both streams, q, k, v, the adapters, the hidden
    # layer; or in the attention, 6 u and 2 scores.
    feed_forward = (6 if work.rank else 3) * size.u + 6.5 * max(size.image, size.text)
    block = max(feed_forward, 6 * size.u + 2 * size.scores)

    # The second attention: its output, q, k and v.
    if work.model.dual_layers:
        block += size.u + 1.4 * size.image

    # Sliced weights of the feed-forwards, 16 D^2.
    return _modulation(work, images) + block + 16 * size.d2 + _fetched(work, size)
