"""The cost of Z-Image: floating-point operations and memory, by formula.

As in models/flux/cost.py; these are the costs of one pass. Symbols: n images, s image tokens and
l caption tokens, both with their padding, T = s + l, D channels, F channels in the feed-forward,
r the rank of the LoRA, u the bytes of one activation [n, T, D].

tests/realgen_jax/models/zimage/test_cost.py compares the formulas with XLA's own figures.
"""

import jax.numpy as jnp

from realgen_jax.models.cost import F32, Work, fused_attention, replay_flops
from realgen_jax.models.zimage.transformer import TIME_HIDDEN, padded
from realgen_jax.nn.layers import TIME_CHANNELS
from realgen_jax.nn.tokens import PATCH


def _stacks(work: Work) -> tuple[tuple[int, int], ...]:
    """(blocks, tokens of each) of the image's refiner, the caption's refiner and the layers."""
    image = padded(work.image_tokens)
    refiners = work.model.n_refiner_layers
    return (
        (refiners, image),
        (refiners, work.text_tokens),
        (work.model.n_layers, image + work.text_tokens),
    )


def forward_flops(work: Work) -> dict[str, float]:
    """Operations of one pass for one image, by kind.

    At 4096 + 512 tokens: matmul 51.6 and attention 10.9 TFLOP.
    """
    model = work.model
    dim = model.dim
    hidden = model.mlp_dim
    level = model.modulation_dim
    token_blocks = sum(blocks * tokens for blocks, tokens in _stacks(work))
    pairs = sum(blocks * tokens**2 for blocks, tokens in _stacks(work))

    # Projections: qkv 3 D^2, proj D^2, and three of the feed-forward, D F each.
    matmul = 2.0 * token_blocks * (4 * dim * dim + 3 * dim * hidden) + _ends_flops(work)

    # Q K' and P V: 2 T^2 D each.
    attention = 4.0 * pairs * dim

    # Once per image: the AdaLN projections, 4 D from the embedded noise level, and its embedder.
    blocks = model.n_layers + model.n_refiner_layers
    embedder = TIME_HIDDEN * (TIME_CHANNELS + level)
    modulation = 2.0 * (level * dim * (4 * blocks + 1) + embedder)

    # Each adapted projection adds r (in + out) weights.
    lora = 2.0 * token_blocks * work.rank * (8 * dim + 3 * (dim + hidden))

    return {"matmul": matmul, "attention": attention, "modulation": modulation, "lora": lora}


def _ends_flops(work: Work) -> float:
    """Operations of the input (latents, caption) and output (latents) projections for one image."""
    latents = work.image_tokens * 2 * PATCH**2 * work.model.in_channels
    caption = work.text_tokens * work.model.cap_feat_dim
    return 2.0 * work.model.dim * (latents + caption)


def update_flops(work: Work) -> dict[str, float]:
    """Operations of one image at one step of the window, by purpose.

    The norm behind fc2, which ends a block, reads its output again: all products are repeated.
    """
    return replay_flops(work, forward_flops(work), _ends_flops(work), last=0.0)


def _block_sizes(work: Work, images: float, tokens: int) -> tuple[float, float, float]:
    """Bytes of the arrays that the formulas below use as units, for a sequence of `tokens`.

    u: an activation [n, tokens, D]. scores: [n, heads, tokens, tokens] in float32, 0 with flash
    attention. d2: a weight matrix [D, D].
    """
    model = work.model
    itemsize = jnp.dtype(model.dtype).itemsize
    u = images * tokens * model.dim * itemsize
    scores = 0.0 if work.flash else images * model.n_heads * tokens**2 * F32
    return u, scores, model.dim**2 * itemsize


def _modulation(work: Work, images: float) -> float:
    """Bytes of the modulations of all blocks, 4 D each."""
    model = work.model
    rows = 4 * (model.n_layers + model.n_refiner_layers)
    return images * rows * model.dim * jnp.dtype(model.dtype).itemsize


def saved_bytes(work: Work, images: float) -> float:
    """Bytes that the forward pass of `images` on one device saves for the backward pass."""
    model = work.model
    full = work.rank == 0
    width = model.mlp_dim / model.dim

    total = 0.0
    for blocks, tokens in _stacks(work):
        u, scores, d2 = _block_sizes(work, images, tokens)

        # The outputs of a flash kernel: the attention output and the softmax sums [n, heads, T].
        flash = 0.0
        if work.flash:
            flash = u + images * model.n_heads * tokens * F32

        block = {
            # The block's input.
            "full": u,
            # Also the outputs of the flash kernel.
            "attention": u + flash,
            # Also the projections' outputs without adapters: qkv 3, proj 1, fc1 2 F, fc2 1.
            "dots": (6 + 2 * width) * u + flash,
            # Everything. Norms and their inputs, q, k and v before and after the rotation, the
            # attention's output; fc1's outputs and the steps of the gate, 6 F; where weights train
            # also the inputs of all projections, scales and gates. Also the exponentials of the
            # scores, and the reshaped fused kernels, 3 D^2 and 2 D F.
            "none": (13 + 10 * full + 6 * width) * u + scores + (3 + 2 * width) * d2,
        }[model.remat]
        total += blocks * block
    return total


def update_bytes(work: Work, images: float) -> float:
    """Bytes of activations at the peak of an update with `images` on one device.

    The peak is in the backward pass of a layer on the joint sequence.
    """
    model = work.model
    width = model.mlp_dim / model.dim
    u, scores, d2 = _block_sizes(work, images, padded(work.image_tokens) + work.text_tokens)

    # What a layer recomputes and its gradients: 16, and 12 F in the gated feed-forward, less what
    # is saved; or 20 and 2 scores in its attention. Sliced weights, 8 D^2.
    known = {"full": 0, "attention": work.flash, "dots": 7 + work.flash, "none": 11}[model.remat]
    # Where elementwise steps are fused, 4 and 2 F less.
    known += (4 + 2 * width) * work.fused
    block = max((16 + 12 * width - known) * u + scores, 20 * u + 2 * scores) + 8 * d2

    saved = saved_bytes(work, images)
    return _modulation(work, images) + saved + block + _fetched(work, d2)


def _fetched(work: Work, d2: float) -> float:
    """Bytes of a layer's gathered weights, 4 D^2 and 3 D F, if weights are split over devices."""
    matrices = 4 + 3 * work.model.mlp_dim / work.model.dim
    return matrices * d2 * (work.weight_parts > 1)


def forward_bytes(work: Work, images: float) -> float:
    """Bytes of activations at the peak of one pass without gradient, in a layer."""
    width = work.model.mlp_dim / work.model.dim
    u, scores, d2 = _block_sizes(work, images, padded(work.image_tokens) + work.text_tokens)

    # Where elementwise steps are fused, in the gated feed-forward: the input and 5 F; or in the
    # attention.
    if work.fused:
        block = max((1 + 5 * width) * u, fused_attention(work, u, scores))
        return _modulation(work, images) + block + _fetched(work, d2)

    # In the gated feed-forward: 4 (the input, the norm, the adapters' products) and 5 F; or in the
    # attention, 6 and 2 scores. Sliced weights, 2 D^2.
    block = max((4 + 5 * width) * u, 6 * u + 2 * scores) + 2 * d2
    return _modulation(work, images) + block + _fetched(work, d2)
