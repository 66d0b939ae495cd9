"""What FLUX costs: floating-point operations and bytes of memory, by formula. Nothing is compiled.

A multiplication and an addition count as two operations. Only products are counted (projections,
attention, convolutions); elementwise operations add less than 2 % at FLUX's sizes.

Symbols: n images, s image tokens, l text tokens, T = s + l, D channels, L double and G single
blocks, r the rank of the LoRA, u the bytes of one activation [n, T, D].

tests/realgen_jax/models/flux/test_cost.py compares the formulas with XLA's own figures, also where
weights are split over fsdp. A mesh with `tensor` needs less memory than stated here, because the
formulas do not count that axis's split of the activations.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from realgen_jax.models.flux.transformer import TIME_CHANNELS, FluxConfig
from realgen_jax.nn.vae import VaeConfig, decoded_at_once

F32 = 4  # bytes


@dataclass(frozen=True)
class Work:
    """The sizes of one run, as far as its costs depend on them."""

    model: FluxConfig
    vae: VaeConfig
    image_tokens: int  # s, of one image
    text_tokens: int  # l, of one prompt
    rank: int  # of the LoRA; 0: all weights train
    images: int  # of one call, over all devices
    slots: int  # of one call, over all devices; each becomes several images at the window's start
    steps: int  # from noise to image
    window: int  # steps that are trained on
    prefix: float  # mean number of steps before the window; these run on slots
    calls: int  # of an epoch
    inner_epochs: int
    reference: bool  # whether the update needs the reference model (beta > 0)
    recompute: bool  # train.recompute_old
    flash: bool = True  # attention keeps its scores on the chip; a CPU writes them out
    weight_parts: int = 1  # devices that share each weight, fsdp x tensor

    @property
    def tokens(self) -> int:
        """T, the length of the joint sequence."""
        return self.image_tokens + self.text_tokens

    @property
    def pixels(self) -> int:
        """Pixels of an image: a token is 2 x 2 latents; all VAE levels but one double h and w."""
        return self.image_tokens * 4 ** len(self.vae.block_out_channels)


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

    # Projections: every token meets 12 D^2 weights in a block. Double: qkv 3, proj 1, feed-forward
    # 8. Single: qkv 3, mlp 4, proj 5. Then the projections in and out of the transformer.
    matmul = 24.0 * dim * dim * tokens * blocks + _ends_flops(work)

    # Q K' and P V: 2 T^2 D each.
    attention = 4.0 * tokens * tokens * dim * blocks

    # Once an image: the AdaLN projections (12 D^2 weights a double block, 3 a single one, 2 at the
    # end), and the embedders of sigma, guidance and pooled text.
    sinusoids = 1 + model.guidance_embeds
    embedders = sinusoids * (TIME_CHANNELS + dim) + model.pooled_projection_dim + dim
    modulation = 2.0 * dim * (dim * (12 * double + 3 * single + 2) + embedders)

    # r (in + out) weights of every adapted projection: 18 D r a double block, 6 D r a single one.
    lora = 2.0 * (18 * double + 6 * single) * dim * work.rank * tokens

    return {"matmul": matmul, "attention": attention, "modulation": modulation, "lora": lora}


def _ends_flops(work: Work) -> float:
    """Operations of the projections in (latents, text) and out (latents) for one image."""
    latents = work.image_tokens * 2 * work.model.in_channels
    text = work.text_tokens * work.model.joint_attention_dim
    return 2.0 * work.model.hidden_dim * (latents + text)


def update_flops(work: Work) -> dict[str, float]:
    """Operations of one image at one step of the window, by purpose.

    forward: the policy. backward: its gradient. remat: what is computed a second time.
    reference: the forward pass of the base model, where beta > 0.
    """
    model = work.model
    tokens = work.tokens
    dim = model.hidden_dim
    flops = forward_flops(work)
    full = work.rank == 0
    scores_written = not work.flash

    # Gradients of activations: as much as the forward products, twice the attention (dV, dP, dQ,
    # dK; a flash kernel computes Q K' once more) and twice the adapters. Frozen weights need no
    # gradient; trained ones take as much again as their forward products.
    backward = (
        flops["matmul"] * (1 + full)
        + flops["attention"] * (2.0 if scores_written else 2.5)
        + 2 * flops["lora"]
        + 2 * flops["modulation"] * full
    )

    # Rematerialisation repeats the blocks' products. The product that ends a block (double: fc2,
    # single: proj) is repeated only where weights train: otherwise nothing reads its output again.
    last = 2.0 * dim * dim * tokens * (4 * model.num_layers + 5 * model.num_single_layers)
    products = flops["matmul"] - _ends_flops(work) - last * (not full) + flops["lora"]
    remat = {
        "full": products + flops["attention"],
        "attention": products + flops["attention"] * scores_written,
        "dots": flops["attention"] * scores_written + flops["lora"],
        "none": 0.0,
    }[model.remat]

    forward = sum(flops.values())
    return {
        "forward": forward,
        "backward": backward,
        "remat": remat,
        "reference": forward - flops["lora"] if work.reference else 0.0,
    }


def decode_flops(work: Work) -> float:
    """Operations of decoding one image.

    A k x k convolution takes 2 k^2 in out for each position; one behind an upsampling counts as
    k = 2 with four times the outputs (see vae.Upsample).
    """
    vae = work.vae
    widths = vae.block_out_channels[::-1]
    width = widths[0]

    # The coarsest level: conv_in, and two residual blocks with two convolutions each.
    positions = work.image_tokens * 4
    total = 18.0 * positions * width * (vae.latent_channels + 4 * width)

    # Its attention over all positions, and that attention's four projections.
    total += 4.0 * positions * positions * width + 8.0 * positions * width**2

    for level, out in enumerate(widths):
        # Residual blocks, with a 1x1 convolution as shortcut where the width changes.
        for _ in range(vae.layers_per_block + 1):
            shortcut = 2.0 * positions * width * out if width != out else 0.0
            total += 18.0 * positions * (width * out + out * out) + shortcut
            width = out

        # Upsampling, on all levels but the last.
        if level < len(widths) - 1:
            positions *= 4
            total += 8.0 * positions * width * width

    # conv_out, to three colours.
    return total + 18.0 * positions * width * 3


def epoch_flops(work: Work) -> dict[str, float]:
    """Operations of one epoch over all devices.

    useful: without what rematerialisation, flash attention's backward pass and `recompute_old`
    compute a second time. These are the operations that MFU counts.
    """
    flops = forward_flops(work)
    forward = sum(flops.values())
    update = update_flops(work)
    images = work.calls * work.images

    # The steps before the window run on slots, all others on images.
    steps = work.prefix * work.slots + (work.steps - work.prefix) * work.images
    rollout = forward * work.calls * steps
    decode = images * decode_flops(work)

    # An update replays every call at every step of the window.
    replays = images * work.window * work.inner_epochs
    step = sum(update.values())
    recompute = images * work.window * step if work.recompute else 0.0

    useful_step = step - update["remat"]
    if work.flash:
        useful_step -= flops["attention"] / 2

    return {
        "rollout": rollout,
        "decode": decode,
        "update": replays * step + recompute,
        "total": rollout + decode + replays * step + recompute,
        "useful": rollout + decode + replays * useful_step,
    }


def _block_sizes(work: Work, images: float) -> tuple[float, float, float]:
    """Bytes of the arrays that the formulas below count in.

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
    """Bytes of the modulations of all blocks: 2 x 6 D a double block, 3 D a single one."""
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

    # What a flash kernel returns: its output, and the sums of its softmax [n, heads, T].
    flash = 0.0
    if work.flash:
        flash = u + images * model.num_attention_heads * work.tokens * F32

    # A block of either kind, (double, single). Trained weights also need what a gate multiplies:
    # proj's output, and in a double block fc2's.
    double, single = {
        # The block's input.
        "full": (u, u),
        # Also what the flash kernel returns.
        "attention": (u + flash, u + flash),
        # Also the projections' outputs without adapters. Double: qkv 3, proj 1, fc1 4.
        # Single: qkv 3, mlp 4.
        "dots": ((9 + full) * u + flash, (8 + full) * u + flash),
        # Everything. Double: norms 5; q and k before and after the rotation, and v and the
        # attention's output, 6; fc1's output and the steps of GELU 24. Single: 2, 6 and 20. Also
        # the exponentials of the scores, and the fused kernels as reshaped, 6 and 12 D^2.
        "none": ((35 + 2 * full) * u + scores + 6 * d2, (28 + full) * u + scores + 12 * d2),
    }[model.remat]
    return model.num_layers * double, model.num_single_layers * single


def _fetched(work: Work, images: float) -> float:
    """Bytes of a double block's gathered weights, 24 D^2, where weights are split over devices."""
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

    # Single blocks: what all blocks saved, sliced weights 7 D^2, and the values of one block. These
    # are 21 u between its halves (the hidden layer's gradient 5, the steps of GELU, and q, k, v and
    # their adapters 3 each), or 11 u and 2 scores in its attention (the exponentials and their
    # gradient).
    block = max(21 * u, 11 * u + 2 * scores)
    # Trained weights: their gradients are computed late, so the 14 u that these read still exist.
    late = 14 * u * full
    in_single = double + single + block + late + 7 * d2

    # Double blocks: what these saved, sliced weights 16 D^2, and the values of one block, in the
    # gradient of its feed-forward or of its attention.
    block = max(40 * u + scores, 13 * u + 2 * scores)
    # Trained weights: the single blocks' gradients, 12 D^2 in float32, are in the sum by then.
    added = 12 * model.hidden_dim**2 * F32 * model.num_single_layers / work.weight_parts * full
    in_double = double + block + 16 * d2 - added

    return _modulation(work, images) + max(in_single, in_double) + _fetched(work, images)


def forward_bytes(work: Work, images: float) -> float:
    """Bytes of activations at the peak of one velocity without gradient, in a single block."""
    u, scores, d2 = _block_sizes(work, images)

    # Between its halves 12 u (the input, the norm, q, k, v before and after the rotation, the
    # hidden layer) and the adapters' 3, or in its attention 6 u and 2 scores.
    between = (15 if work.rank else 12) * u
    attention = 6 * u + 2 * scores

    # The sliced weights of proj, 5 D^2.
    block = max(between, attention) + 5 * d2
    return _modulation(work, images) + block + _fetched(work, images)


def decode_bytes(work: Work, images: float) -> float:
    """Bytes of activations at the peak of decoding, for the images that are decoded together."""
    vae = work.vae
    at_once = decoded_at_once(vae, work.image_tokens, int(images))

    # Three feature maps of the last level's input at full size.
    widths = vae.block_out_channels
    wide = widths[min(1, len(widths) - 1)]
    maps = 3 * work.pixels * wide * jnp.dtype(vae.dtype).itemsize

    # Or the scores [P, P] of the attention over P positions, which no flash kernel computes: the
    # logits, the weights and, for several images, a copy.
    positions = 4 * work.image_tokens
    scores = positions**2 * F32 * (2 + (at_once > 1))

    return at_once * max(maps, scores)


def rollout_bytes(work: Work, parts: int) -> dict[str, float]:
    """Bytes of one call's rollout on one device, with the batch split into `parts`."""
    model = work.model
    images = work.images / parts
    slots = work.slots / parts

    # Latents [n, s, c] in float32.
    latent = images * work.image_tokens * model.in_channels * F32

    # T5 states [l, joint_attention_dim] and the pooled CLIP state of a slot.
    embedding = work.text_tokens * model.joint_attention_dim + model.pooled_projection_dim

    return {
        "noise": latent * work.window,
        # The latents at all window + 1 points, and the mean of every step.
        "trajectory": latent * (2 * work.window + 1),
        "means": latent * work.window,
        "embeddings": slots * embedding * jnp.dtype(model.dtype).itemsize,
        # RGB, one byte each.
        "pictures": images * work.pixels * 3,
    }


def phase_bytes(work: Work, parts: int, trainable: float) -> dict[str, dict[str, float]]:
    """Bytes on one device beside weights and optimizer state: {phase: {part: bytes}}.

    parts: into how many the batch is split. trainable: bytes of the trained arrays on this device.
    """
    images = work.images / parts
    call = rollout_bytes(work, parts)
    trajectories = work.calls * call["trajectory"]
    embeddings = work.calls * call["embeddings"]
    means = work.calls * call["means"] if work.recompute else 0.0

    # Sampling: an epoch's trajectories, embeddings and images (in the worst case none is scored
    # before the last call), and the activations of the velocity or of the decoder.
    activations = max(forward_bytes(work, images), decode_bytes(work, images))
    sample = {
        "trajectories": trajectories,
        "embeddings": embeddings,
        "pictures": work.calls * call["pictures"],
        "activations": call["noise"] + activations,
    }

    # Update: trajectories and embeddings twice (the calls', and stacked for the optimizer steps),
    # and two gradients: their sum and the present call's (later the optimizer's step).
    update = {
        "trajectories": 2 * trajectories + means,
        "embeddings": 2 * embeddings,
        "gradients": 2 * trainable,
        "activations": update_bytes(work, images),
    }
    return {"sample": sample, "update": update}
