"""Stage 6: a tiny SD3: transformer and text encoders, distilled from the tiny FLUX.

Both have the same latents. FLUX's velocity is a target without noise, so that a third of FLUX's own
training is enough. The empty prompt, which FLUX never saw, is learned from the photographs.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from fit import fit, kept, rng
from flux import CROPS, image_positions, packed_latents
from photos import SIZE, TEMPLATES, TEST_TEMPLATES, prompts
from text import T5_TOKENS, WIDTH, t5_encoder, token_ids
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from reward_bridge.rewards.embedded import EmbeddedHeldOut, load_classifier, to_input

SHORT_STEPS = 3000
STEPS = 250
BATCH = 32
DROPOUT = 0.15  # share of empty prompts, which classifier-free guidance needs
SHIFT = 3.0
CLIP_TOKENS = 77
SHORT = 16  # CLIP tokens of the first phase; no caption has more


# (packed latents [n, 16, 64], noise levels [n], numbers of prompts [n]) -> [n, 16, 64]
Velocity = Callable[[torch.Tensor, torch.Tensor, np.ndarray], torch.Tensor]


class Tiny(nn.Module):
    """The transformer, and the text encoders that are trained with it."""

    def __init__(self, clip_tokenizers: Sequence[CLIPTokenizer], t5: nn.Module):
        super().__init__()
        self.clip_l = clip_encoder(clip_tokenizers[0], "quick_gelu")
        self.clip_g = clip_encoder(clip_tokenizers[1], "gelu")
        self.t5 = t5
        self.transformer = SD3Transformer2DModel(
            sample_size=8,
            num_layers=5,
            attention_head_dim=24,
            num_attention_heads=4,
            caption_projection_dim=96,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            pos_embed_max_size=8,
            dual_attention_layers=(0, 1),
            qk_norm="rms_norm",
        )

    def text(self, ids: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids of CLIP-L, CLIP-G and T5 -> states [n, tokens, d] and pooled vectors [n, d]."""
        large = self.clip_l(ids[0], output_hidden_states=True)
        giant = self.clip_g(ids[1], output_hidden_states=True)
        clip = torch.cat([large.hidden_states[-2], giant.hidden_states[-2]], dim=-1)
        states = torch.cat([clip, self.t5(ids[2]).last_hidden_state], dim=1)
        return states, torch.cat([large.text_embeds, giant.text_embeds], dim=-1)

    def velocity(
        self, x: torch.Tensor, sigma: torch.Tensor, states: torch.Tensor, pooled: torch.Tensor
    ) -> torch.Tensor:
        """float32 [n, 16, 8, 8] at noise levels [n] -> its velocity, noise minus picture."""
        (velocity,) = self.transformer(
            hidden_states=x,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            timestep=1000 * sigma,
            return_dict=False,
        )
        return velocity


def build(work: Path, flux: Path, pipeline: Path, vae: AutoencoderKL) -> None:
    """Write the pipeline. Its autoencoder is that of the folder `flux`, by links to its files."""
    if (pipeline / "model_index.json").exists():
        return

    # FLUX's tokenizers, and CLIP's once more, with the padding of CLIP-G.
    tokenizers = [
        AutoTokenizer.from_pretrained(flux / "tokenizer"),
        AutoTokenizer.from_pretrained(flux / "tokenizer", pad_token="!"),
        AutoTokenizer.from_pretrained(flux / "tokenizer_2"),
    ]

    # Captions, and as the last one the empty prompt.
    captions = prompts(TEMPLATES)
    texts = [caption for caption, _ in captions] + [""]
    ids = [token_ids(tokenizer, texts) for tokenizer in tokenizers]
    labels = np.array([label for _, label in captions])
    teacher = flux_velocity(flux, texts[:-1])
    latents = torch.from_numpy(kept(work / "latents.npy", lambda: packed_latents(vae)))

    def make_loss(clip_tokens: int):
        def loss(tiny: Tiny, random: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
            """Mean squared error of the velocity, at noise levels as in SD3's sampler."""
            rows = random.integers(len(labels), size=BATCH)
            x0 = latents[labels[rows], random.integers(CROPS, size=BATCH)]
            noise = torch.from_numpy(random.standard_normal(x0.shape, np.float32))
            u = torch.from_numpy(random.uniform(size=BATCH).astype(np.float32))
            sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
            x = torch.lerp(x0, noise, sigma[:, None, None])

            # The target: that of flow matching for the empty prompt, else FLUX's velocity.
            target = noise - x0
            empty = random.random(BATCH) < DROPOUT
            with torch.no_grad():
                target[~empty] = teacher(x[~empty], sigma[~empty], rows[~empty])

            rows[empty] = len(labels)
            clip_l, clip_g, t5 = (table[rows] for table in ids)
            texts = tiny.text((clip_l[:, :clip_tokens], clip_g[:, :clip_tokens], t5))
            velocity = tiny.velocity(unpacked(x), sigma, *texts)
            error = (velocity - unpacked(target)) ** 2
            return error.mean(), {"distance": error[~empty].mean().item()}

        return loss

    # First without most of CLIP's padding, which makes a step more than twice as fast.
    torch.manual_seed(0)
    tiny = Tiny(tokenizers[:2], t5_encoder(tokenizers[2]))
    print(f"sd3: {sum(p.numel() for p in tiny.transformer.parameters()):,} parameters", flush=True)
    fit("sd3-short", tiny, make_loss(SHORT), work, steps=SHORT_STEPS, lr=1e-3, ema_decay=0.999)
    fit("sd3", tiny, make_loss(CLIP_TOKENS), work, steps=STEPS, lr=5e-4, warmup=20, ema_decay=0.98)

    # Save the whole pipeline in bfloat16.
    tiny.to(torch.bfloat16)
    StableDiffusion3Pipeline(
        transformer=tiny.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=tiny.clip_l,
        tokenizer=tokenizers[0],
        text_encoder_2=tiny.clip_g,
        tokenizer_2=tokenizers[1],
        text_encoder_3=tiny.t5,
        tokenizer_3=tokenizers[2],
    ).save_pretrained(pipeline)
    for file in (pipeline / "vae").iterdir():
        file.unlink()
        file.symlink_to(Path("..", "..", flux.name, "vae", file.name))
    report(pipeline)


def flux_velocity(folder: Path, texts: list[str]) -> Velocity:
    """Return the velocity of a FluxPipeline folder for these prompts."""
    pipe = FluxPipeline.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        states, pooled, positions = pipe.encode_prompt(texts, None, max_sequence_length=T5_TOKENS)

    def velocity(x: torch.Tensor, sigma: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        (v,) = pipe.transformer(
            hidden_states=x,
            encoder_hidden_states=states[rows],
            pooled_projections=pooled[rows],
            timestep=sigma,
            guidance=torch.full((len(x),), 3.5),
            img_ids=image_positions(4),
            txt_ids=positions,
            return_dict=False,
        )
        return v

    return velocity


def clip_encoder(tokenizer: CLIPTokenizer, activation: str) -> CLIPTextModelWithProjection:
    """A two-layer CLIP text encoder with random weights, half as wide as T5."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH // 2,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CLIP_TOKENS,
        projection_dim=WIDTH // 2,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def unpacked(tokens: torch.Tensor) -> torch.Tensor:
    """Latents packed 2 x 2 into a token, float32 [n, 16, 64] -> [n, 16, 8, 8]."""
    n = len(tokens)
    x = tokens.view(n, 4, 4, 16, 2, 2)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(n, 16, 8, 8)


@torch.no_grad()
def report(pipeline: Path) -> None:
    """Print prompt accuracy and the mean P(real) of the test prompts' pictures by guidance."""
    pipe = StableDiffusion3Pipeline.from_pretrained(pipeline, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    captions = [caption for caption, _ in prompts(TEST_TEMPLATES) for _ in range(4)]
    labels = np.array([label for _, label in prompts(TEST_TEMPLATES) for _ in range(4)])
    noise = rng("sd3-report", 0).standard_normal((len(captions), 16, 8, 8), np.float32)
    classifier = load_classifier("cpu")
    detector = EmbeddedHeldOut("cpu")
    for guidance in (1.0, 1.5, 2.0, 3.0, 4.5):
        pictures = pipe(
            captions,
            height=SIZE,
            width=SIZE,
            num_inference_steps=10,
            guidance_scale=guidance,
            max_sequence_length=T5_TOKENS,
            latents=torch.from_numpy(noise),
            output_type="pt",
        ).images
        pictures = (255 * pictures).round().byte()
        accuracy = np.mean(classifier(to_input(pictures)).argmax(1).numpy() == labels)
        real = detector(pictures, captions).mean().item()
        print(f"sd3 at guidance {guidance}: accuracy {accuracy:.3f}, held-out P(real) {real:.3f}")
