"""The cost of FLUX: floating-point operations and memory, by formula. Nothing is compiled.

A multiplication and an addition count as two operations. Only products are counted (projections,
attention, convolutions); elementwise operations add less than 2 % at FLUX's sizes.

Symbols: n images, s image tokens, l text tokens, T = s + l, D channels, L double and G single
blocks, r the rank of the LoRA, u the bytes of one activation [n, T, D].

tests/realgen_jax/models/flux/test_cost.py compares the formulas with XLA's own figures, including
weights that are split over fsdp. A mesh with `tensor` needs less memory than stated here, because
the formulas ignore how that axis splits the activations.
"""

import jax.numpy as jnp

from realgen_jax.models.cost import F32, Work, fused_attention, replay_flops
from realgen_jax.nn.layers import TIME_CHANNELS


def forward_flops(work: Work) -> dict[str, float]:
    """Operations of one velocity for one image, by kind.

    FLUX.1-dev at 4096 + 512 tokens: matmul 59.5 and attention 14.9 TFLOP.
    """
    model = work.model
    tokens = work.tokens
    dim = model.hidden_dim
    double = model.num_layers
    single = model.num_single_layers
    blocks = double + single

    # Projections: each block multiplies every token by 12 D^2 weights. Double: qkv 3, proj 1,
    # feed-forward 8. Single: qkv 3, mlp 4, proj 5. Then the transformer's input and output
    # projections.
    matmul = 24.0 * dim * dim * tokens * blocks + _ends_flops(work)

    # Q K' and P V: 2 T^2 D each.
    attention = 4.0 * tokens * tokens * dim * blocks

    # Once per image: the AdaLN projections (12 D^2 weights per double block, 3 per single block, 2
    # at the end), and the embedders of sigma, guidance and pooled text.
    sinusoids = 1 + model.guidance_embeds
    embedders = sinusoids * (TIME_CHANNELS + dim) + model.pooled_projection_dim + dim
    modulation = 2.0 * dim * (dim * (12 * double + 3 * single + 2) + embedders)

    # Each adapted projection adds r (in + out) weights: 18 D r per double block, 6 D r per single
    # block.
    lora = 2.0 * (18 * double + 6 * single) * dim * work.rank * tokens

    return {"matmul": matmul, "attention": attention, "modulation": modulation, "lora": lora}


def _ends_flops(work: Work) -> float:
    """Operations of the input (latents, text) and output (latents) projections for one image."""
    latents = work.image_tokens * 2 * work.model.in_channels
    text = work.text_tokens * work.model.joint_attention_dim
    return 2.0 * work.model.hidden_dim * (latents + text)


def update_flops(work: Work) -> dict[str, float]:
    """Operations of one image at one step of the window, by purpose."""
    # The products that end a block: fc2 in a double block, proj in a single one.
    model = work.model
    last = 4 * model.num_layers + 5 * model.num_single_layers
    last *= 2.0 * model.hidden_dim**2 * work.tokens
    return replay_flops(work, forward_flops(work), _ends_flops(work), last)


def _block_sizes(work: Work, images: float) -> tuple[float, float, float]:
    """Bytes of the arrays that the formulas below use as units.

    u: an activation [n, T, D]. scores: [n, heads, T, T] in float32, 0 with flash attention.
    d2: a weight matrix [D, D].
    """
    model = work.model
    tokens = work.tokens
    dim = model.hidden_dim
    itemsize = jnp.dtype(model.dtype).itemsize

    u = images * tokens * dim * itemsize
    scores = 0.0 if work.flash else images * model.num_attention_heads * tokens * tokens * F32
    d2 = dim * dim * itemsize
    return u, scores, d2


def _modulation(work: Work, images: float) -> float:
    """Bytes of the modulations of all blocks: 2 x 6 D per double block, 3 D per single block."""
    model = work.model
    rows = 12 * model.num_layers + 3 * model.num_single_layers
    return images * rows * model.hidden_dim * jnp.dtype(model.dtype).itemsize


def saved_bytes(work: Work, images: float) -> tuple[float, float]:
    """Bytes that the forward pass of `images` on one device saves for the backward pass.

    Returns the totals of all double and of all single blocks.
    """
    model = work.model
    full = work.rank == 0
    u, scores, d2 = _block_sizes(work, images)

    # The outputs of a flash kernel: the attention output and the softmax sums [n, heads, T].
    flash = 0.0
    if work.flash:
        flash = u + images * model.num_attention_heads * work.tokens * F32

    # For one block of each kind, (double, single). Trained weights also need the gates' inputs:
    # proj's output, and in a double block fc2's.
    double, single = {
        # The block's input.
        "full": (u, u),
        # Also the outputs of the flash kernel.
        "attention": (u + flash, u + flash),
        # Also the projections' outputs without adapters. Double: qkv 3, proj 1, fc1 4.
        # Single: qkv 3, mlp 4.
        "dots": ((9 + full) * u + flash, (8 + full) * u + flash),
        # Everything. Double: norms 5; q and k before and after the rotation, and v and the
        # attention's output, 6; fc1's output and the steps of GELU 24. Single: 2, 6 and 20. Also
        # the exponentials of the scores, and the reshaped fused kernels, 6 and 12 D^2.
        "none": ((35 + 2 * full) * u + scores + 6 * d2, (28 + full) * u + scores + 12 * d2),
    }[model.remat]
    return model.num_layers * double, model.num_single_layers * single


def _fetched(work: Work, images: float) -> float:
    """Bytes of a double block's gathered weights, 24 D^2, if weights are split over devices."""
    _, _, d2 = _block_sizes(work, images)
    return 24 * d2 * (work.weight_parts > 1)


def update_bytes(work: Work, images: float) -> float:
    """Bytes of activations at the peak of an update with `images` on one device.

    The peak is in the backward pass, in the single or in the double blocks. The modulations and the
    gathered weights exist throughout.
    """
    model = work.model
    full = work.rank == 0
    u, scores, d2 = _block_sizes(work, images)
    double, single = saved_bytes(work, images)

    # Single blocks: everything saved by all blocks, sliced weights 7 D^2, and the values of one
    # block. These are 21 u between its halves (the hidden layer's gradient 5, the steps of GELU,
    # and q, k, v and their adapters 3 each), or 11 u and 2 scores in its attention (the
    # exponentials and their gradient).
    block = max(21 * u, 11 * u + 2 * scores)
    # Trained weights: their gradients are computed late, so the 14 u that these read still exist.
    late = 14 * u * full
    in_single = double + single + block + late + 7 * d2

    # Double blocks: everything saved by these blocks, sliced weights 16 D^2, and the values of one
    # block, in the gradient of its feed-forward or of its attention.
    block = max(40 * u + scores, 13 * u + 2 * scores)
    # Trained weights: by then the sum holds the single blocks' gradients, 12 D^2 in float32.
    added = 12 * model.hidden_dim**2 * F32 * model.num_single_layers / work.weight_parts * full
    in_double = double + block + 16 * d2 - added

    return _modulation(work, images) + max(in_single, in_double) + _fetched(work, images)


def forward_bytes(work: Work, images: float) -> float:
    """Bytes of activations at the peak of one velocity without gradient, in a single block."""
    u, scores, d2 = _block_sizes(work, images)

    # Where elementwise steps are fused, between its halves: the input, the attention's output, the
    # hidden layer before GELU, and the input of proj.
    if work.fused:
        block = max(11 * u, fused_attention(work, u, scores))
        fetched = _fetched(work, images) / 2  # a single block's, 12 D^2
        return _modulation(work, images) + block + fetched

    # Between its halves 12 u (the input, the norm, q, k, v before and after the rotation, the
    # hidden layer) and the adapters' 3, or in its attention 6 u and 2 scores.
    between = (15 if work.rank else 12) * u
    attention = 6 * u + 2 * scores

    # The sliced weights of proj, 5 D^2.
    block = max(between, attention) + 5 * d2
    return _modulation(work, images) + block + _fetched(work, images)
