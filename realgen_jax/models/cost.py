"""The cost of an epoch: operations and bytes of memory, by formula. Nothing is compiled.

Each family provides the formulas for its transformer (`Formulas`, models/flux/cost.py). A
multiplication and an addition count as two operations, and only products are counted: projections,
attention and convolutions.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from realgen_jax.nn.tiles import tile_starts
from realgen_jax.nn.tokens import PATCH
from realgen_jax.nn.vae import VaeConfig, decoded_at_once
from realgen_jax.nn.vae_cost import decoder_flops, kernel_bytes

F32 = 4  # bytes


class Formulas(Protocol):
    """The costs of one pass of a family's transformer; `images` counts those on one device."""

    def forward_flops(self, work: "Work") -> dict[str, float]:
        """Operations of the forward pass of one image, by kind; one of them is "attention"."""

    def update_flops(self, work: "Work") -> dict[str, float]:
        """Operations of one image at one step of the window, by purpose.

        "forward" (the policy), "backward", "remat" (what is recomputed), "reference".
        """

    def forward_bytes(self, work: "Work", images: float) -> float:
        """Peak bytes of activations of a forward pass without gradient."""

    def update_bytes(self, work: "Work", images: float) -> float:
        """Peak bytes of activations of an update."""


@dataclass(frozen=True)
class Work:
    """The sizes of a run that determine its cost."""

    formulas: Formulas
    model: Any  # the transformer's sizes, a family's Config
    vae: VaeConfig
    image_tokens: int  # s, of one image
    text_tokens: int  # l, of one prompt
    text_bytes: int  # of one prompt's conditioning, including the negative prompt's
    rank: int  # of the LoRA; 0: all weights train
    images: int  # of one call, over all devices
    slots: int  # of one call, over all devices; each becomes several images at the window's start
    steps: float  # from noise to image, on average
    window: int  # steps with noise, which are recorded
    trained: int  # steps, or noise levels, of an image that are trained on
    prefix: float  # mean number of steps before the window; these run on slots
    calls: int  # per epoch
    inner_epochs: int
    reference: int  # passes of an update through frozen weights: base model, old policy
    recompute: bool  # train.recompute_old
    guided: bool = False  # classifier-free guidance: a velocity takes two passes
    free_gradient: bool = False  # whether the gradient goes through the negative prompt's pass too
    flash: bool = True  # attention keeps its scores on chip; a CPU writes them to memory
    fused: bool = True  # elementwise steps are part of other kernels; a CPU stores more of them
    turned: float = 0.0  # bytes of kernels that XLA copies into another layout, on TPUs
    previews: int = 0  # per epoch, which are sampled to select the images
    preview_steps: int = 0  # from noise to preview
    weight_parts: int = 1  # devices that share each weight, fsdp x tensor

    @property
    def passes(self) -> int:
        """Passes of the transformer that a velocity takes."""
        return 1 + self.guided

    @property
    def backward_passes(self) -> int:
        """Those of them that have a backward pass."""
        return 1 + (self.guided and self.free_gradient)

    @property
    def tokens(self) -> int:
        """T, the length of the joint sequence."""
        return self.image_tokens + self.text_tokens

    @property
    def pixels(self) -> int:
        """Pixels of an image: a token is 2 x 2 latents; all VAE levels but one double h and w."""
        return self.image_tokens * 4 ** len(self.vae.block_out_channels)


def replay_flops(work: Work, flops: dict[str, float], ends: float, last: float) -> dict[str, float]:
    """The `update_flops` of a family whose blocks are rematerialised (nn/stack.py).

    flops: its `forward_flops`. ends: those of the projections outside the blocks. last: those of
    the products that end a block and whose output nothing in the block reads again.
    """
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

    # Rematerialisation repeats the blocks' products, those in `last` only where weights train.
    products = flops["matmul"] - ends - last * (not full) + flops["lora"]
    remat = {
        "full": products + flops["attention"],
        "attention": products + flops["attention"] * scores_written,
        "dots": flops["attention"] * scores_written + flops["lora"],
        "none": 0.0,
    }[work.model.remat]

    forward = sum(flops.values())
    return {
        "forward": forward,
        "backward": backward,
        "remat": remat,
        "reference": forward - flops["lora"] if work.reference else 0.0,
    }


def fused_attention(work: Work, u: float, scores: float) -> float:
    """Peak bytes of a block's attention without gradient where elementwise steps are fused.

    The block's input u, and q, k and v three times: as projected, as their adapters add to them,
    and as the attention reads them. Without a flash kernel also its scores and their exponentials.
    """
    return (10 if work.rank else 7) * u + 2 * scores


def row_bytes(cond: Any) -> int:
    """Bytes of an abstract conditioning."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cond))


def velocity_flops(work: Work) -> dict[str, float]:
    """Operations of one velocity for one image, by kind; guidance takes two passes."""
    flops = work.formulas.forward_flops(work)
    return {kind: work.passes * number for kind, number in flops.items()}


def update_flops(work: Work) -> dict[str, float]:
    """Operations of one image at one step of the window, by purpose, as in `Formulas`."""
    flops = work.formulas.update_flops(work)
    passes = {
        "forward": work.passes,
        "backward": work.backward_passes,
        "remat": work.backward_passes,
        "reference": work.passes * work.reference,
    }
    return {purpose: passes[purpose] * flops[purpose] for purpose in passes}


def forward_bytes(work: Work, images: float) -> float:
    """Peak bytes of activations of one velocity without gradient.

    With the gradient through both passes, they are one pass over two rows per image. Otherwise
    neither needs the other, and XLA begins the second before the first is done: a quarter more.
    """
    if work.guided and not work.free_gradient:
        return work.turned + 1.25 * work.formulas.forward_bytes(work, images)
    return work.turned + work.formulas.forward_bytes(work, images * work.passes)


def update_bytes(work: Work, images: float) -> float:
    """Peak bytes of activations of an update."""
    rows = images * work.backward_passes
    update = work.turned + work.formulas.update_bytes(work, rows)
    return max(update, forward_bytes(work, images))


def decode_flops(work: Work) -> float:
    """Operations of decoding one image, which is taken as a square if it is decoded in tiles."""
    side = round((4 * work.image_tokens) ** 0.5)
    tile = work.vae.tile // work.vae.factor
    if not tile:
        return decoder_flops(work.vae, 4 * work.image_tokens)
    sides = [min(tile, side - start) for start in tile_starts(tile, side)]
    return sum(decoder_flops(work.vae, height * width) for height in sides for width in sides)


def epoch_flops(work: Work) -> dict[str, float]:
    """Operations of one epoch over all devices.

    "useful" leaves out operations that are repeated by rematerialisation, by flash attention's
    backward pass and by `recompute_old`. These are the operations that MFU counts.
    """
    flops = velocity_flops(work)
    forward = sum(flops.values())
    update = update_flops(work)
    images = work.calls * work.images

    # The steps before the window run on slots, all others on images.
    steps = work.prefix * work.slots + (work.steps - work.prefix) * work.images
    rollout = forward * work.calls * steps
    decode = images * decode_flops(work)
    previews = work.previews * (work.preview_steps * forward + decode_flops(work))

    # An update replays every call at every step, or noise level, that is trained on.
    replays = images * work.trained * work.inner_epochs
    step = sum(update.values())
    recompute = images * work.trained * step if work.recompute else 0.0

    useful_step = step - update["remat"]
    if work.flash:
        useful_step -= work.backward_passes * work.formulas.forward_flops(work)["attention"] / 2

    sampling = previews + rollout + decode
    return {
        **({"previews": previews} if previews else {}),
        "rollout": rollout,
        "decode": decode,
        "update": replays * step + recompute,
        "total": sampling + replays * step + recompute,
        "useful": sampling + replays * useful_step,
    }


def sampling_flops(work: Work) -> float:
    """Operations of sampling and decoding the images of one call, over all devices."""
    steps = work.steps * sum(velocity_flops(work).values())
    return work.images * (steps + decode_flops(work))


def decode_bytes(work: Work, images: float) -> float:
    """Bytes of activations at the peak of decoding `images` that are decoded together."""
    vae = work.vae
    at_once = decoded_at_once(vae, work.image_tokens, int(images))

    # All of an image, or a tile and the decoded tiles in float32.
    pixels = work.pixels
    positions = 4 * work.image_tokens
    whole = 0.0
    if vae.tile:
        whole = 2 * 3 * F32 * pixels
        pixels = min(pixels, vae.tile**2)
        positions = min(positions, (vae.tile // vae.factor) ** 2)

    # Feature maps of the last level's input at full size: three on a CPU; XLA's compiler for GPUs
    # keeps 2 to 2.5 of them, by its schedule.
    widths = vae.block_out_channels
    wide = widths[min(1, len(widths) - 1)]
    maps = (2.2 if work.fused else 3) * pixels * wide * jnp.dtype(vae.dtype).itemsize

    # Or the scores [P, P] of the attention over P positions, which does not use a flash kernel:
    # the logits, the weights and, for several images, a copy.
    scores = positions**2 * F32 * (2 + (at_once > 1))

    return at_once * (max(maps, scores) + whole)


def sampling_bytes(work: Work, images: float) -> float:
    """Peak bytes of activations of sampling: of the velocity or of the decoder."""
    activations = max(forward_bytes(work, images), decode_bytes(work, images))

    # XLA's compiler for GPUs copies the decoder's kernels into the layout of cuDNN before the loop
    # over pictures, in some programs before the first step.
    return activations + kernel_bytes(work.vae) * work.fused


def rollout_bytes(work: Work, parts: int) -> dict[str, float]:
    """Bytes of one call's rollout on one device, with the batch split into `parts`."""
    images = work.images / parts
    slots = work.slots / parts

    # Latents [n, s, c] in float32.
    channels = PATCH**2 * work.vae.latent_channels
    latent = images * work.image_tokens * channels * F32

    return {
        "noise": latent * work.window,
        # The latents at all window + 1 points, and the mean of every step.
        "trajectory": latent * (2 * work.window + 1),
        "means": latent * work.window,
        "embeddings": slots * work.text_bytes,
        # RGB, one byte each.
        "pictures": images * work.pixels * 3,
    }


def evaluation_bytes(work: Work, parts: int) -> dict[str, float]:
    """Bytes of one call of an evaluation on one device besides weights and optimizer state."""
    images = work.images / parts
    return {
        "embeddings": images * work.text_bytes,
        "pictures": images * work.pixels * 3,
        "activations": sampling_bytes(work, images),
    }


def phase_bytes(work: Work, parts: int, trainable: float) -> dict[str, dict[str, float]]:
    """Bytes on one device besides weights and optimizer state: {phase: {part: bytes}}.

    parts: number of parts the batch is split into. trainable: bytes of the trained arrays on this
    device.
    """
    images = work.images / parts
    call = rollout_bytes(work, parts)
    trajectories = work.calls * call["trajectory"]
    embeddings = work.calls * call["embeddings"]
    means = work.calls * call["means"] if work.recompute else 0.0

    # Sampling: an epoch's trajectories, embeddings and images (in the worst case none is scored
    # before the last call), and the activations of the velocity or of the decoder.
    activations = sampling_bytes(work, images)
    sample = {
        "trajectories": trajectories,
        "embeddings": embeddings,
        "pictures": work.calls * call["pictures"],
        "activations": call["noise"] + activations,
    }

    # Update: trajectories and embeddings twice (per call, and stacked for the optimizer steps), and
    # two gradients: the running sum and the current call's (later the optimizer's step).
    update = {
        "trajectories": 2 * trajectories + means,
        "embeddings": 2 * embeddings,
        "gradients": 2 * trainable,
        "activations": update_bytes(work, images),
    }
    if not work.previews:
        return {"sample": sample, "update": update}

    # Previews: in the worst case none is scored before the last call.
    preview_calls = work.previews / work.images
    previews = {
        "embeddings": preview_calls * call["embeddings"],
        "pictures": preview_calls * call["pictures"],
        "activations": activations,
    }
    return {"previews": previews, "sample": sample, "update": update}
