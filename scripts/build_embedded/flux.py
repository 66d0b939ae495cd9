"""Stage 3: the FLUX transformer, and T5 with it, by flow matching on latents of training crops."""

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
from text import WIDTH, t5_encoder
from torch import nn
from transformers import AutoTokenizer, CLIPTextModel
from vae import encode

STEPS, BATCH = 8000, 64
CROPS = 2048  # of each photograph, encoded once


class Both(nn.Module):
    """The transformer and the text encoder that is trained with it."""

    def __init__(self, transformer: FluxTransformer2DModel, t5: nn.Module):
        super().__init__()
        self.transformer, self.t5 = transformer, t5


def _latents(vae: AutoencoderKL) -> np.ndarray:
    """Packed, scaled latents of CROPS crops of each photograph: float32 [photographs, CROPS, 16, 64]."""
    encoded = []
    for i in range(len(PHOTOS)):
        z = encode(vae, crops(np.full(CROPS, i), "train", rng("latents", i)))
        z = (z - vae.config.shift_factor) * vae.config.scaling_factor
        encoded.append(FluxPipeline._pack_latents(z, CROPS, 16, 8, 8).numpy())
    return np.stack(encoded)


def build(work: Path, pipeline: Path, vae: AutoencoderKL) -> None:
    """Write the pipeline's transformer, T5 and scheduler, and its model_index.json."""
    if (pipeline / "model_index.json").exists():
        return
    clip_tokenizer, t5_tokenizer = (
        AutoTokenizer.from_pretrained(pipeline / name) for name in ("tokenizer", "tokenizer_2")
    )
    clip = CLIPTextModel.from_pretrained(pipeline / "text_encoder", dtype=torch.float32).eval()
    captions = prompts(TEMPLATES)
    texts, labels = [c for c, _ in captions], np.array([i for _, i in captions])
    with torch.no_grad():
        ids = clip_tokenizer(
            texts, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        pooled = clip(ids).pooler_output
    t5_ids = t5_tokenizer(
        texts, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    latents = torch.from_numpy(kept(work / "latents.npy", lambda: _latents(vae)))
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=4, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=True, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    both = Both(transformer, t5_encoder(t5_tokenizer))
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    positions = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()
    shift = math.exp(0.5 + (1.15 - 0.5) / (4096 - 256) * (16 - 256))

    def loss(both: Both, random: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        """Mean squared error of the velocity at noise levels distributed as FLUX's sampler visits them."""
        which = random.integers(len(texts), size=BATCH)
        x0 = latents[labels[which], random.integers(CROPS, size=BATCH)]
        noise = torch.from_numpy(random.standard_normal(x0.shape, np.float32))
        u = torch.from_numpy(random.uniform(size=BATCH).astype(np.float32))
        sigma = shift * u / (1 + (shift - 1) * u)
        x = torch.lerp(x0, noise, sigma[:, None, None])
        states = both.t5(t5_ids[which]).last_hidden_state
        v = both.transformer(
            hidden_states=x, encoder_hidden_states=states, pooled_projections=pooled[which], timestep=sigma,
            guidance=torch.full((BATCH,), 3.5), img_ids=positions, txt_ids=torch.zeros(states.shape[1], 3),
            return_dict=False,
        )[0]  # fmt: skip
        return ((v - (noise - x0)) ** 2).mean(), {}

    fit("flux", both, loss, work, steps=STEPS, lr=1e-3, weight_decay=0.02, ema_decay=0.9995)
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
    )
    vae.register_to_config(
        _name_or_path=""
    )  # the folder it was loaded from says nothing to anyone else
    for model in (vae, clip, both):
        model.to(torch.bfloat16)
    FluxPipeline(
        scheduler=scheduler, vae=vae, text_encoder=clip, tokenizer=clip_tokenizer, text_encoder_2=both.t5,
        tokenizer_2=t5_tokenizer, transformer=both.transformer,
    ).save_pretrained(pipeline)  # fmt: skip
    vae.float()
