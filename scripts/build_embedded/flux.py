"""Stage 3: the FLUX transformer and T5, trained by flow matching on latents of crops."""

import math
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from fit import fit, kept, rng
from photos import PHOTOS, TEMPLATES, crops, prompts
from text import WIDTH, t5_encoder, token_ids
from torch import nn
from transformers import AutoTokenizer, CLIPTextModel
from vae import encode

STEPS = 8000
BATCH = 64
CROPS = 2048  # of each photograph, encoded once


class Both(nn.Module):
    """The transformer, and the text encoder that is trained with it."""

    def __init__(self, transformer: FluxTransformer2DModel, t5: nn.Module):
        super().__init__()
        self.transformer = transformer
        self.t5 = t5


def build(work: Path, pipeline: Path, vae: AutoencoderKL) -> None:
    """Write the pipeline's transformer, T5 and scheduler, and its model_index.json."""
    if (pipeline / "model_index.json").exists():
        return

    # The text encoders' inputs and CLIP's output for all captions.
    clip_tokenizer = AutoTokenizer.from_pretrained(pipeline / "tokenizer")
    t5_tokenizer = AutoTokenizer.from_pretrained(pipeline / "tokenizer_2")
    clip = CLIPTextModel.from_pretrained(pipeline / "text_encoder", dtype=torch.float32).eval()
    captions = prompts(TEMPLATES)
    texts = [caption for caption, _ in captions]
    labels = np.array([label for _, label in captions])
    with torch.no_grad():
        pooled = clip(token_ids(clip_tokenizer, texts)).pooler_output
    t5_ids = token_ids(t5_tokenizer, texts)

    # The models.
    latents = torch.from_numpy(kept(work / "latents.npy", lambda: packed_latents(vae)))
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    both = Both(transformer, t5_encoder(t5_tokenizer))
    positions = image_positions(4)

    # FLUX's shift of the noise levels for 16 image tokens.
    shift = math.exp(0.5 + (1.15 - 0.5) / (4096 - 256) * (16 - 256))

    def loss(both: Both, random: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        """Mean squared error of the velocity, at noise levels distributed as in FLUX's sampler."""
        rows = random.integers(len(texts), size=BATCH)
        x0 = latents[labels[rows], random.integers(CROPS, size=BATCH)]
        noise = torch.from_numpy(random.standard_normal(x0.shape, np.float32))
        u = torch.from_numpy(random.uniform(size=BATCH).astype(np.float32))
        sigma = shift * u / (1 + (shift - 1) * u)
        x = torch.lerp(x0, noise, sigma[:, None, None])
        states = both.t5(t5_ids[rows]).last_hidden_state
        (velocity,) = both.transformer(
            hidden_states=x,
            encoder_hidden_states=states,
            pooled_projections=pooled[rows],
            timestep=sigma,
            guidance=torch.full((BATCH,), 3.5),
            img_ids=positions,
            txt_ids=torch.zeros(states.shape[1], 3),
            return_dict=False,
        )
        return ((velocity - (noise - x0)) ** 2).mean(), {}

    fit("flux", both, loss, work, steps=STEPS, lr=1e-3, weight_decay=0.02, ema_decay=0.9995)

    # Save the whole pipeline in bfloat16, without the name of the folder the autoencoder came from.
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
    )
    vae.register_to_config(_name_or_path="")
    for model in (vae, clip, both):
        model.to(torch.bfloat16)
    FluxPipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=both.t5,
        tokenizer_2=t5_tokenizer,
        transformer=both.transformer,
    ).save_pretrained(pipeline)
    vae.float()


def packed_latents(vae: AutoencoderKL) -> np.ndarray:
    """Encode CROPS crops of each photograph: float32 [photographs, CROPS, 16, 64].

    Latents are scaled, and packed 2 x 2 into a token.
    """
    encoded = []
    for i in range(len(PHOTOS)):
        z = encode(vae, crops(np.full(CROPS, i), "train", rng("latents", i)))
        z = (z - vae.config.shift_factor) * vae.config.scaling_factor
        encoded.append(FluxPipeline._pack_latents(z, CROPS, 16, 8, 8).numpy())
    return np.stack(encoded)


def image_positions(side: int) -> torch.Tensor:
    """FLUX's position ids (0, row, column) of side x side image tokens: float32 [side^2, 3]."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()
