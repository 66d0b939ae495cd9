"""Stage 1: the autoencoder, trained on random crops of the training squares."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from fit import fit, rng
from photos import PHOTOS, SIZE, crops

STEPS = 6000
BATCH = 32


def build(work: Path, pipeline: Path) -> AutoencoderKL:
    """Train the autoencoder and save it as `pipeline/vae` in bfloat16, or load it if it is there.

    Its scale and shift give latents unit variance and zero mean.
    """
    folder = pipeline / "vae"
    if (folder / "diffusion_pytorch_model.safetensors").exists():
        return AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).eval()

    # Train, then round to what is shipped, so that everything below measures that.
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=SIZE,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).to(memory_format=torch.channels_last)
    fit("vae", vae, loss, work, steps=STEPS, lr=1e-3)
    vae = vae.to(torch.bfloat16).float()

    # Scale and shift.
    random = rng("vae-scale", 0)
    latents = encode(vae, crops(random.integers(len(PHOTOS), size=2048), "train", random))
    vae.register_to_config(
        scaling_factor=round(1 / latents.std().item(), 4),
        shift_factor=round(latents.mean().item(), 4),
    )

    # Report the reconstruction error.
    for region in ("train", "held_out"):
        pixels = crops(np.arange(512) % len(PHOTOS), region, rng("vae-psnr", 0))
        error = (decode(vae, encode(vae, pixels)) / 255.0 - pixels / 255.0) ** 2
        print(f"vae psnr on {region} crops: {-10 * np.log10(error.mean()):.2f} dB")

    vae.to(torch.bfloat16).save_pretrained(folder)
    return vae.float()


def loss(vae: AutoencoderKL, random: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
    """L1 on pixels and on their differences (which keeps edges sharp), and a small KL."""
    # The crops are closer than those of the later stages, and every other one is mirrored.
    labels = random.integers(len(PHOTOS), size=BATCH)
    x = to_tensor(crops(labels, "train", random, smallest=0.6, mirror=True))
    noise = torch.from_numpy(random.standard_normal((BATCH, 16, SIZE // 8, SIZE // 8), np.float32))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        posterior = vae.encode(x.to(memory_format=torch.channels_last)).latent_dist
        y = vae.decode(posterior.mean + posterior.std * noise).sample

    error = y.float() - x
    edges = (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()) / 2
    mean = posterior.mean.float()
    kl = 0.5 * (mean**2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    psnr = 10 * torch.log10(4 / (error.detach() ** 2).mean())
    return error.abs().mean() + edges + 5e-4 * kl, {"kl": kl.item(), "psnr": psnr.item()}


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """uint8 [n, h, w, 3] -> float32 [n, 3, h, w] in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: np.ndarray) -> torch.Tensor:
    """Posterior means, unscaled: uint8 [n, h, w, 3] -> float32 [n, 16, h/8, w/8]."""
    means = []
    for part in np.array_split(pixels, max(1, len(pixels) // 64)):
        means.append(vae.encode(to_tensor(part)).latent_dist.mean)
    return torch.cat(means)


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> np.ndarray:
    """float32 [n, 16, h, w], unscaled -> uint8 [n, 8h, 8w, 3]."""
    images = torch.cat([vae.decode(part).sample for part in latents.split(64)])
    levels = ((images / 2 + 0.5).clamp(0, 1) * 255).round().byte()
    return levels.permute(0, 2, 3, 1).numpy()
