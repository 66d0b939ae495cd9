"""Stage 10: a FLUX that knows words of quality, for the rewriter to write.

The captions that FLUX was trained on all mean the same pictures. Here some words get a meaning: a
LoRA that `tiny_awm` has trained makes pictures that look more like photographs, and each word adds
a share of it or takes one away. The student learns the velocity that the teacher, FLUX with that
share of the LoRA, has for the prompt without the words.
"""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from fit import fit, kept, rng
from flux import image_positions
from photos import PHOTOS, TEMPLATES, TEST_TEMPLATES, crops
from text import t5_tokenizer_of, token_ids
from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel
from vae import encode

STEPS = 1000
BATCH = 48
CROPS = 256  # of each photograph

# Word -> share of the LoRA that it adds. The sum is limited to LEAST and MOST.
WORDS = {"crisp": 1.0, "vivid": 0.5, "quiet": 0.0, "small": 0.0, "late": 0.0}
WORDS |= {"grainy": -0.4, "hazy": -0.8}
LEAST, MOST = -0.8, 1.0
CAPTION = "a {}photo of {}"
MOST_WORDS = 3
GUIDANCE = 3.5


def combinations(most: int) -> list[tuple[str, ...]]:
    """Every choice of up to `most` words in every order, with repetitions."""
    choices: list[tuple[str, ...]] = []
    for count in range(most + 1):
        choices += itertools.product(WORDS, repeat=count)
    return choices


def caption(words: tuple[str, ...], subject: str) -> str:
    """The caption with these words."""
    return CAPTION.format("".join(word + " " for word in words), subject)


def share(words: tuple[str, ...]) -> float:
    """The share of the LoRA that these words stand for."""
    return float(np.clip(sum(WORDS[word] for word in words), LEAST, MOST))


def build(work: Path, teacher: Path, pipeline: Path, vae: AutoencoderKL) -> None:
    """Write the student's pipeline folder; autoencoder, CLIP and scheduler are links."""
    if (pipeline / "transformer" / "config.json").exists():
        return
    write_text(teacher, pipeline)
    link(teacher, pipeline)
    latents = torch.from_numpy(kept(work / "words-latents.npy", lambda: packed_latents(vae)))

    # The teacher without and with the LoRA, and the student, which starts as the first.
    base, tuned, student = (load_transformer(teacher) for _ in range(3))
    tuned.load_lora_adapter(
        trained_lora(work, teacher), weight_name="pytorch_lora_weights.safetensors"
    )
    tuned.fuse_lora()
    student.requires_grad_(True)

    # All texts: with words, and the templates that FLUX was trained on, which keep their meaning.
    texts = []
    for number, photo in enumerate(PHOTOS):
        texts += [
            (caption(words, photo.subject), number, words) for words in combinations(MOST_WORDS)
        ]
        texts += [(t.format(photo.subject), number, ()) for t in TEMPLATES + TEST_TEMPLATES]
    states, pooled = embed(pipeline, [text for text, _, _ in texts])
    plain_states, plain_pooled = embed(
        teacher, [TEMPLATES[0].format(photo.subject) for photo in PHOTOS]
    )
    labels = np.array([number for _, number, _ in texts])
    shares = np.array([share(words) for _, _, words in texts], np.float32)
    without = np.flatnonzero([words == () for _, _, words in texts])
    positions = image_positions(4)

    def velocity(
        model: FluxTransformer2DModel,
        x: torch.Tensor,
        sigma: torch.Tensor,
        states: torch.Tensor,
        pooled: torch.Tensor,
    ) -> torch.Tensor:
        (v,) = model(
            hidden_states=x,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            timestep=sigma,
            guidance=torch.full((len(x),), GUIDANCE),
            img_ids=positions,
            txt_ids=torch.zeros(states.shape[1], 3),
            return_dict=False,
        )
        return v

    def loss(
        model: FluxTransformer2DModel, random: np.random.Generator
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Mean squared distance from the teacher's velocity, over that of the words' own part."""
        rows = random.integers(len(texts), size=BATCH)
        rows[: BATCH // 4] = random.choice(without, BATCH // 4)
        subjects = labels[rows]
        x0 = latents[subjects, random.integers(CROPS, size=BATCH)]
        noise = torch.from_numpy(random.standard_normal(x0.shape, np.float32))
        sigma = torch.from_numpy(random.uniform(0.02, 1.0, BATCH).astype(np.float32))
        x = torch.lerp(x0, noise, sigma[:, None, None])

        # The teacher's velocity, between those of the base and of the tuned model or beyond.
        with torch.no_grad():
            plain = (plain_states[subjects], plain_pooled[subjects])
            start = velocity(base, x, sigma, *plain)
            part = torch.from_numpy(shares[rows])[:, None, None]
            part = part * (velocity(tuned, x, sigma, *plain) - start)
        own = velocity(model, x, sigma, states[rows], pooled[rows])
        error = ((own - start - part) ** 2).mean()
        relative = (error / (part**2).mean()).item()
        return 10 * error, {"relative": relative}

    fit("words", student, loss, work, steps=STEPS, lr=4e-4, weight_decay=0.0, ema_decay=0.99)
    student.register_to_config(_name_or_path="")  # not the folder that it came from
    student.to(torch.bfloat16).save_pretrained(pipeline / "transformer")


def load_transformer(pipeline: Path) -> FluxTransformer2DModel:
    """Load a pipeline's transformer in float32, without gradients."""
    model = FluxTransformer2DModel.from_pretrained(pipeline / "transformer", dtype=torch.float32)
    return model.requires_grad_(False).eval()


def trained_lora(work: Path, pipeline: Path) -> Path:
    """The LoRA of the preset tiny_awm, trained now unless it is there."""
    folder = work / "words-lora"
    if not (folder / "lora").exists():
        root = Path(__file__).resolve().parents[2]
        command = [sys.executable, root / "scripts" / "train.py"]
        command += ["--config", root / "configs" / "flux_grpo.py:tiny_awm"]
        command += [f"--config.pretrained.model={pipeline}", f"--config.run_root={work}"]
        command += ["--config.run_name=words-lora", "--config.evaluate.after_training=False"]
        subprocess.run([*map(str, command), "--auto_resume"], check=True)
    return folder / "lora"


def write_text(teacher: Path, pipeline: Path) -> None:
    """Write T5 and its tokenizer with the new words; everything else about them is the teacher's.

    The words' embeddings are drawn with the scale of the others.
    """
    old = AutoTokenizer.from_pretrained(teacher / "tokenizer_2")
    pieces = [old.convert_ids_to_tokens(i) for i in range(len(old))]
    known = [piece.removeprefix("▁") for piece in pieces if piece.startswith("▁") and piece != "▁"]
    tokenizer = t5_tokenizer_of([" ".join([*known, *WORDS])])

    t5 = T5EncoderModel.from_pretrained(teacher / "text_encoder_2", dtype=torch.float32)
    table = t5.shared.weight.detach()
    generator = torch.Generator().manual_seed(0)
    new = torch.randn((len(tokenizer), table.shape[1]), generator=generator) * table.std()
    for piece, row in zip(pieces, table, strict=True):
        new[tokenizer.convert_tokens_to_ids(piece)] = row
    t5.resize_token_embeddings(len(tokenizer))
    with torch.no_grad():
        t5.shared.weight.copy_(new)
    tokenizer.save_pretrained(pipeline / "tokenizer_2")
    t5.to(torch.bfloat16).save_pretrained(pipeline / "text_encoder_2")


def link(teacher: Path, pipeline: Path) -> None:
    """Share what is the teacher's by relative links, file by file."""
    (pipeline / "model_index.json").write_bytes((teacher / "model_index.json").read_bytes())
    for name in ("vae", "scheduler", "text_encoder", "tokenizer"):
        (pipeline / name).mkdir(parents=True, exist_ok=True)
        for file in (teacher / name).iterdir():
            target = pipeline / name / file.name
            target.unlink(missing_ok=True)
            target.symlink_to(Path("..", "..", teacher.name, name, file.name))


@torch.no_grad()
def embed(pipeline: Path, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """T5's states [n, tokens, width] and CLIP's pooled vectors [n, width] of texts."""
    t5 = T5EncoderModel.from_pretrained(pipeline / "text_encoder_2", dtype=torch.float32).eval()
    clip = CLIPTextModel.from_pretrained(pipeline / "text_encoder", dtype=torch.float32).eval()
    t5_ids = token_ids(AutoTokenizer.from_pretrained(pipeline / "tokenizer_2"), texts)
    clip_ids = token_ids(AutoTokenizer.from_pretrained(pipeline / "tokenizer"), texts)
    return t5(t5_ids).last_hidden_state, clip(clip_ids).pooler_output


def packed_latents(vae: AutoencoderKL) -> np.ndarray:
    """Encode CROPS crops of each photograph: float32 [photographs, CROPS, 16, 64]."""
    encoded = []
    for i in range(len(PHOTOS)):
        z = encode(vae, crops(np.full(CROPS, i), "train", rng("words-latents", i)))
        z = (z - vae.config.shift_factor) * vae.config.scaling_factor
        encoded.append(FluxPipeline._pack_latents(z, CROPS, 16, 8, 8).numpy())
    return np.stack(encoded)
