"""What FLUX costs: floating-point operations and bytes, by formula. Shapes times loop trips, nothing is compiled.

A multiplication and an addition are two operations; only products (projections, attention, convolutions) are counted,
as their elementwise neighbours are below 2 % at FLUX's sizes. n images, s image and l text tokens, T = s + l, D
channels, L double and G single blocks, r the LoRA's rank. tests/test_cost.py holds it against XLA's own figures, also
where weights are split over fsdp. A mesh with `tensor` needs less than this, as its split of the activations is not
counted.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from realgen_jax.models.flux.transformer import FluxConfig
from realgen_jax.nn.vae import VaeConfig, decoded_at_once

F32 = 4  # bytes


@dataclass(frozen=True)
class Work:
    """One run's sizes. images and slots are those of one call over all devices; rank 0 means that all weights train.

    prefix: mean number of steps before the window, which slots take; all others are images'. flash: whether attention
    keeps its scores on the chip (GPU, TPU) or writes them out, [n, heads, T, T] (CPU).
    """

    model: FluxConfig
    vae: VaeConfig
    image_tokens: int
    text_tokens: int
    rank: int
    images: int
    slots: int
    steps: int
    window: int
    prefix: float
    calls: int  # of an epoch
    inner_epochs: int
    reference: bool  # beta > 0
    recompute: bool  # train.recompute_old
    flash: bool = True
    weight_parts: int = 1  # over how many devices a weight is split, fsdp x tensor

    @property
    def tokens(self) -> int:
        return self.image_tokens + self.text_tokens

    @property
    def pixels(self) -> int:
        """Of one picture: every level of the autoencoder but the last doubles, and a token is 2 x 2 latents."""
        return self.image_tokens * 4 ** len(self.vae.block_out_channels)


def forward_flops(work: Work) -> dict[str, float]:
    """One velocity for one image.

    matmul: 2 (12 D^2) T for each block (qkv 3 D^2, then proj 1 and feed-forward 8 in a double block, mlp 4 and proj 5
    in a single one), and the projections in and out. attention: 4 T^2 D for each block, QK' and PV. modulation: what
    runs once an image. lora: 2 r (in + out) T of every adapted projection, 18 D r in a double block, 6 D r in a single
    one. FLUX.1-dev at 4096 + 512 tokens: 59.5 + 14.9 TFLOP without adapters.
    """
    m, t, d = work.model, work.tokens, work.model.hidden_dim
    blocks = m.num_layers + m.num_single_layers
    ends = work.image_tokens * 2 * m.in_channels + work.text_tokens * m.joint_attention_dim
    embedders = (1 + m.guidance_embeds) * (256 + d) + m.pooled_projection_dim + d
    return {
        "matmul": 24.0 * d * d * t * blocks + 2.0 * d * ends,
        "attention": 4.0 * t * t * d * blocks,
        "modulation": 2.0 * d * (d * (12 * m.num_layers + 3 * m.num_single_layers + 2) + embedders),
        "lora": 2.0 * (18 * m.num_layers + 6 * m.num_single_layers) * d * work.rank * t,
    }


def update_flops(work: Work) -> dict[str, float]:
    """One image at one step of the window, by what the operations are for.

    forward: the policy's. backward: of activations, as much as the forward's products and twice its attention (dV, dP,
    dQ, dK; a flash kernel computes QK' once more) and twice its adapters; frozen weights need no gradient, trained ones
    as much again as their forward. remat: what is computed a second time, by `remat`. reference: the base model's
    forward, where beta > 0.
    """
    f = forward_flops(work)
    full = work.rank == 0
    attention = f["attention"] * (2.5 if work.flash else 2.0)
    backward = f["matmul"] * (1 + full) + attention + 2 * f["lora"] + 2 * f["modulation"] * full
    # a single block's proj and a double one's fc2 end their blocks: nothing reads their outputs a second time
    m, t, d = work.model, work.tokens, work.model.hidden_dim
    last = 2.0 * d * d * t * (4 * m.num_layers + 5 * m.num_single_layers)
    ends = (
        2.0 * d * (work.image_tokens * 2 * m.in_channels + work.text_tokens * m.joint_attention_dim)
    )
    products = f["matmul"] - ends - last * (not full) + f["lora"]
    again = {
        "full": products + f["attention"],
        "attention": products + f["attention"] * (not work.flash),
        "dots": f["attention"] * (not work.flash) + f["lora"],
        "none": 0.0,
    }[m.remat]
    base = sum(f.values()) - f["lora"]
    return {
        "forward": sum(f.values()),
        "backward": backward,
        "remat": again,
        "reference": base if work.reference else 0.0,
    }


def decode_flops(work: Work) -> float:
    """One picture out of the autoencoder: 2 k^2 in out for each position of a convolution (k^2 = 4 after an upsampling,
    see vae.Upsample), 4 P^2 C + 8 P C^2 for the attention over the P positions of the lowest resolution.
    """
    widths, vae = work.vae.block_out_channels[::-1], work.vae
    p = work.image_tokens * 4
    total = (
        18.0 * p * widths[0] * (vae.latent_channels + 4 * widths[0])
    )  # conv_in and two residual blocks
    total += 4.0 * p * p * widths[0] + 8.0 * p * widths[0] ** 2
    width = widths[0]
    for i, out in enumerate(widths):
        for _ in range(vae.layers_per_block + 1):
            total += 18.0 * p * (width * out + out * out) + (
                2.0 * p * width * out if width != out else 0.0
            )
            width = out
        if i < len(widths) - 1:
            p *= 4
            total += 8.0 * p * width * width
    return total + 18.0 * p * width * 3


def epoch_flops(work: Work) -> dict[str, float]:
    """One iteration over all devices: rollout, decode, update, and `useful`, which leaves out what rematerialisation
    and `recompute_old` compute a second time: the operations that MFU counts.

    The prefix runs on slots, window and suffix on images. An update replays every call at every step of the window.
    """
    forward, update = sum(forward_flops(work).values()), update_flops(work)
    images = work.calls * work.images
    rollout = (
        forward * work.calls * (work.prefix * work.slots + (work.steps - work.prefix) * work.images)
    )
    replays = images * work.window * work.inner_epochs
    step, useful = sum(update.values()), sum(update.values()) - update["remat"]
    if work.flash:
        useful -= forward_flops(work)["attention"] / 2
    recompute = images * work.window * step if work.recompute else 0.0
    decode = images * decode_flops(work)
    return {
        "rollout": rollout,
        "decode": decode,
        "update": replays * step + recompute,
        "total": rollout + decode + replays * step + recompute,
        "useful": rollout + decode + replays * useful,
    }


def _block_sizes(work: Work, images: float) -> tuple[float, float, float]:
    """(u, scores, d2) in bytes: u one array [n, T, D], scores [n, heads, T, T] or 0, d2 a weight matrix [D, D]."""
    m, t, d = work.model, work.tokens, work.model.hidden_dim
    u = images * t * d * jnp.dtype(m.dtype).itemsize
    # dot_product_attention computes its scores in float32
    scores = 0.0 if work.flash else images * m.num_attention_heads * t * t * F32
    return u, scores, d * d * jnp.dtype(m.dtype).itemsize


def _modulation(work: Work, images: float) -> float:
    """Bytes of all blocks' modulations, [layers, n, 6 D or 3 D]."""
    m = work.model
    return (
        images
        * (12 * m.num_layers + 3 * m.num_single_layers)
        * m.hidden_dim
        * jnp.dtype(m.dtype).itemsize
    )


def saved_bytes(work: Work, images: float) -> tuple[float, float]:
    """What the forward pass of `images` on one device leaves for the backward one, in the (double, single) blocks.

    In units of u = [n, T, D]. full: a block's input, 1. attention: also what a GPU's flash kernel gives, its output 1
    and the sums of its softmax [n, heads, T]; without one nothing more. dots: the same, and the projections' outputs
    without adapters, of a double block qkv 3, proj 1, fc1 4, of a single one qkv 3 and mlp 4. none: all that autodiff
    keeps, in a double block norms 5, q and k before and after the rotation, v and the attention's output 6, fc1's
    output and GELU's steps 24; in a single one 2, 6 and 20; the exponentials of the scores; and the kernels of fused
    projections as they were reshaped, 6 and 12 D^2. Trained weights also need what a gate multiplies: proj's output,
    and fc2's in a double block.
    """
    m, full = work.model, work.rank == 0
    u, scores, d2 = _block_sizes(work, images)
    flash = u + images * m.num_attention_heads * work.tokens * F32 if work.flash else 0.0
    double, single = {
        "full": (u, u),
        "attention": (u + flash, u + flash),
        "dots": ((9 + full) * u + flash, (8 + full) * u + flash),
        "none": ((35 + 2 * full) * u + scores + 6 * d2, (28 + full) * u + scores + 12 * d2),
    }[m.remat]
    return m.num_layers * double, m.num_single_layers * single


def _fetched(work: Work, images: float) -> float:
    """A double block's weights, 24 D^2, where they are split and each device fetches them."""
    return 24 * _block_sizes(work, images)[2] * (work.weight_parts > 1)


def update_bytes(work: Work, images: float) -> float:
    """Peak activations of an update with `images` on one device: the larger of two moments.

    Backward through the single blocks: what all blocks saved, and one block's own values: between its two halves 21 u
    (the hidden layer's gradient 5, GELU's steps, q, k, v and their adapters' 3 each), or in its attention 11 u and 2
    scores (the exponentials and their gradient), whichever is more, and sliced weights, 7 D^2. Where weights train, the
    products for their gradients come late, and what these read, 14 u, is still there. Backward through the double
    blocks: what those saved, and 40 u and the scores in the feed-forward's gradient, or 13 u and 2 scores in the
    attention's, and 16 D^2; the single blocks' gradients, 12 D^2 in float32, have been added to the sum by then. The
    modulations are there all the time, and so are fetched weights.
    """
    m, full = work.model, work.rank == 0
    u, scores, d2 = _block_sizes(work, images)
    double, single = saved_bytes(work, images)
    late, added = (
        14 * u * full,
        12 * m.hidden_dim**2 * F32 * m.num_single_layers / work.weight_parts * full,
    )
    moments = (
        double + single + max(21 * u, 11 * u + 2 * scores) + late + 7 * d2,
        double + max(40 * u + scores, 13 * u + 2 * scores) + 16 * d2 - added,
    )
    return _modulation(work, images) + max(moments) + _fetched(work, images)


def forward_bytes(work: Work, images: float) -> float:
    """Peak activations of one velocity without gradient: a single block's 12 u (its input, the norm, q, k, v before and
    after the rotation, the hidden layer) and its adapters' 3, or 6 u and 2 scores where that is more, and proj's sliced
    weights 5 D^2; the modulations; and fetched weights.
    """
    u, scores, d2 = _block_sizes(work, images)
    block = max((15 if work.rank else 12) * u, 6 * u + 2 * scores) + 5 * d2
    return _modulation(work, images) + block + _fetched(work, images)


def decode_bytes(work: Work, images: float) -> float:
    """Peak activations of the autoencoder's decoder, for those of `images` that it decodes together: three feature maps
    of the last level's input at full size; or the scores [P, P] of its attention, which no flash kernel takes: the
    logits, the weights and, for several images, a copy.
    """
    vae, images = work.vae, decoded_at_once(work.vae, work.image_tokens, int(images))
    wide = vae.block_out_channels[min(1, len(vae.block_out_channels) - 1)]
    maps = 3 * work.pixels * wide * jnp.dtype(vae.dtype).itemsize
    return images * max(maps, (4 * work.image_tokens) ** 2 * F32 * (2 + (images > 1)))


def rollout_bytes(work: Work, parts: int) -> dict[str, float]:
    """Per device, over `parts` parts of the batch: one call's trajectory and what is kept of an epoch's calls.

    trajectory: latents [w + 1] and means [w] of [n, s, c] float32. embeddings: one row of [l, joint] a slot.
    """
    m = work.model
    latent = work.images / parts * work.image_tokens * m.in_channels * F32
    embedding = (
        work.slots / parts * (work.text_tokens * m.joint_attention_dim + m.pooled_projection_dim)
    )
    return {
        "noise": latent * work.window,
        "trajectory": latent * (2 * work.window + 1),
        "means": latent * work.window,
        "embeddings": embedding * jnp.dtype(m.dtype).itemsize,
        "pictures": work.images / parts * work.pixels * 3,
    }


def phase_bytes(work: Work, parts: int, trainable: float) -> dict[str, dict[str, float]]:
    """Per device, what an iteration's two phases need beside weights and optimizer state: {phase: {what: bytes}}.

    trainable: bytes of the trained arrays on this device, float32. sample: all trajectories, embeddings and pictures
    (scored late, in the worst case) of an epoch, and the larger of the velocity's and the decoder's activations.
    update: trajectories and embeddings twice (the calls, and the steps' batches stacked from them), the gradient's sum
    and the present call's gradient (later the optimizer's step, in their place), and the activations.
    """
    images, one = work.images / parts, rollout_bytes(work, parts)
    trajectories, embeddings = work.calls * one["trajectory"], work.calls * one["embeddings"]
    recomputed = work.calls * one["means"] if work.recompute else 0.0
    return {
        "sample": {
            "trajectories": trajectories,
            "embeddings": embeddings,
            "pictures": work.calls * one["pictures"],
            "activations": one["noise"]
            + max(forward_bytes(work, images), decode_bytes(work, images)),
        },
        "update": {
            "trajectories": 2 * trajectories + recomputed,
            "embeddings": 2 * embeddings,
            "gradients": 2 * trainable,
            "activations": update_bytes(work, images),
        },
    }
