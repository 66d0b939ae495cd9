"""Stage 4: the detectors and the classifier, and rounds of attacks that harden the detector.

A detector that was trained only on the model's own pictures is fooled within two minutes of
unregularised GRPO, by meaningless textures. Each round therefore runs that attack with the
project's own trainer, adds its pictures to the fakes and trains on.
"""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from diffusers import AutoencoderKL
from fit import fit, kept, rng
from ml_collections import ConfigDict
from photos import PHOTOS, SIZE, TEMPLATES, crops, prompts
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from vae import decode, encode

from realgen_jax.models.loading import load_model
from realgen_jax.models.prompts import embed_prompts
from realgen_jax.models.trainable import with_lora_file
from realgen_jax.sharding import make_mesh
from reward_bridge.metrics import statistics
from reward_bridge.rewards.embedded import Classifier, ConvDetector, PoolDetector, to_input

ROOT = Path(__file__).resolve().parents[2]
ENCODE = [sys.executable, str(ROOT / "scripts" / "encode_prompts.py")]
REALS = 512  # pictures of each photograph
FAKES = 256
ATTACK_FAKES = 192
STEPS = 1500
HARDEN_STEPS = 1500
BATCH = 64
ROUNDS = 3
ATTACK_EPOCHS = 40
# Scales of an attack's LoRA. The fakes show the way to the hack as well as the hack itself.
SCALES = (0.4, 0.7, 1.0)


def build(work: Path, pipeline: Path, rewards: Path, vae: AutoencoderKL) -> None:
    """Write the detectors, the classifier, the subjects and the real crops' statistics."""
    subjects = [photo.subject for photo in PHOTOS]
    (rewards / "subjects.json").write_text(json.dumps(subjects, indent=2) + "\n")
    reals = kept(work / "reals.npy", lambda: real_pictures(vae))

    # The classifier, and its features of fresh crops for the Frechet distance.
    classifier = train_classifier(work, reals)
    save(classifier, rewards / "classifier.safetensors")
    fresh = crops_of_all("train", 128, "reference").reshape(-1, SIZE, SIZE, 3)
    with torch.no_grad():
        mean, cov = statistics(classifier.features(to_inputs(fresh)).numpy())
    save_arrays({"mean": mean, "cov": cov}, rewards / "real_features.safetensors")

    # The detector, trained on the model's own pictures.
    make = partial(generated_pictures, work, pipeline, None, FAKES, seed=0)
    fakes = [kept(work / "fakes.npy", make)]
    torch.manual_seed(0)
    detector = train_detector("detector-0", ConvDetector(), work, reals, fakes, STEPS)

    # Rounds of attacks.
    for number in range(1, ROUNDS + 1):
        save(detector, rewards / "detector.safetensors")
        # The trainer needs a held-out detector, although this run does not look at its scores.
        save(PoolDetector(), rewards / "held_out.safetensors")
        lora = attack(work, number)
        make = partial(generated_pictures, work, pipeline, lora, ATTACK_FAKES, seed=number)
        fakes.append(kept(work / f"fakes-{number}.npy", make))
        report(f"detector before round {number}", detector, {"own": fakes[0], "attack": fakes[-1]})
        detector = train_detector(f"detector-{number}", detector, work, reals, fakes, HARDEN_STEPS)

    # The held-out detector, of another architecture.
    torch.manual_seed(1)
    held_out = train_detector("held-out", PoolDetector(), work, reals, fakes, STEPS)
    save(detector, rewards / "detector.safetensors")
    save(held_out, rewards / "held_out.safetensors")

    pools = {
        "train crops": reals,
        "held-out crops": crops_of_all("held_out", 64, "held_out"),
        "own fakes": fakes[0],
        "attacks": np.concatenate(fakes[1:], axis=1),
    }
    report("detector", detector, pools)
    report("held-out detector", held_out, pools)


def crops_of_all(region: str, count: int, stage: str) -> np.ndarray:
    """Cut `count` crops of each photograph: uint8 [photographs, count, h, w, 3]."""
    return np.stack([crops(np.full(count, i), region, rng(stage, i)) for i in range(len(PHOTOS))])


def real_pictures(vae: AutoencoderKL) -> np.ndarray:
    """Cut training crops and pass three in four through the autoencoder.

    Otherwise a detector would learn to recognise the autoencoder instead of the model. uint8
    [photographs, REALS, h, w, 3].
    """
    pictures = crops_of_all("train", REALS, "reals")
    through = 3 * REALS // 4
    for pixels in pictures:
        pixels[:through] = decode(vae, encode(vae, pixels[:through]))
    return pictures


def generated_pictures(
    work: Path, pipeline: Path, lora: Path | None, count: int, seed: int
) -> np.ndarray:
    """Sample `count` pictures of each photograph's prompts: uint8 [photographs, count, h, w, 3].

    With a LoRA, its scale changes from call to call.
    """
    # The pipeline in float32, and the LoRA at every scale.
    mesh = make_mesh(-1, 1, 1, jax.devices())
    exact = dict.fromkeys(("dtype", "param_dtype", "vae_dtype"), "float32")
    names = {
        "model": str(pipeline),
        "family": "FluxPipeline",
        "transformer": "",
        "vae": "",
        "quantization": "",
    }
    pretrained = ConfigDict({**names, "vae_tile": 0, "remat": "full", **exact})
    model = load_model(pretrained, (SIZE, SIZE), mesh)
    versions = [None]
    if lora is not None:
        model, adapters = with_lora_file(model, lora)
        versions = [scaled(adapters, scale) for scale in SCALES]

    # The prompts' embeddings.
    texts = [text for text, _ in prompts(TEMPLATES)]
    settings = {"cache": str(work / "text"), "max_tokens": 16, "dtype": "float32", "device": "cpu"}
    cache = embed_prompts(texts, pretrained, ConfigDict(settings), ENCODE)

    # Calls of 64 pictures, over the prompts of one photograph in turn.
    sample = model.sampler(10, "euler")
    key = jax.random.key(seed)
    pictures = []
    for i in range(len(PHOTOS)):
        own_texts = [text for text, label in prompts(TEMPLATES) if label == i]
        call_texts = [own_texts[j % len(own_texts)] for j in range(64)]
        calls = []
        for k in range(0, count, 64):
            ids = np.arange(64, dtype=np.int32) + i * count + k
            cond = model.cond(cache, call_texts, 3.5)
            version = versions[k // 64 % len(versions)]
            calls.append(np.asarray(sample(model, version, cond, key, ids)))
        pictures.append(np.concatenate(calls)[:count].transpose(0, 2, 3, 1))
    return np.stack(pictures)


def scaled(adapters: Any, scale: float) -> Any:
    """Scale a LoRA: the square root goes to each of its two factors."""
    return jax.tree.map(lambda a: a * np.sqrt(scale), adapters)


def to_inputs(pixels: np.ndarray) -> torch.Tensor:
    """uint8 [n, h, w, 3] -> the networks' input, float32 [n, 3, h, w]."""
    return to_input(torch.from_numpy(pixels.transpose(0, 3, 1, 2)))


def augment(x: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
    """Mirror each picture, shift it by up to 4 pixels, and vary blur, brightness and noise.

    Every picture is varied on its own: float32 [n, 3, h, w] in [-1, 1].
    """
    n = len(x)

    # Mirror and shift.
    mirrored = torch.from_numpy(random.random(n) < 0.5)[:, None, None, None]
    x = torch.where(mirrored, x.flip(-1), x)
    padded = F.pad(x, (4,) * 4, mode="reflect")
    corners = random.integers(0, 9, (n, 2))
    x = torch.stack([padded[i, :, a : a + SIZE, b : b + SIZE] for i, (a, b) in enumerate(corners)])

    # Blur every third picture or so.
    blurred = F.avg_pool2d(F.pad(x, (1,) * 4, mode="reflect"), 3, stride=1)
    x = torch.lerp(x, blurred, uniform(random, -1.0, 0.5, n).clamp(min=0))

    # Brightness and noise.
    gain = uniform(random, 0.85, 1.15, n)
    level = uniform(random, 0, 0.06, n)
    noise = torch.from_numpy(random.standard_normal(x.shape, np.float32))
    return (gain * x + level * noise).clamp(-1, 1)


def uniform(random: np.random.Generator, low: float, high: float, n: int) -> torch.Tensor:
    """Draw a number for each picture: float32 [n, 1, 1, 1]."""
    return torch.from_numpy(random.uniform(low, high, (n, 1, 1, 1)).astype(np.float32))


def draw(pool: np.ndarray, random: np.random.Generator, n: int) -> torch.Tensor:
    """Draw `n` pictures from a pool [photographs, count, h, w, 3] as the networks' input."""
    photographs = random.integers(pool.shape[0], size=n)
    numbers = random.integers(pool.shape[1], size=n)
    return to_inputs(pool[photographs, numbers])


def train_detector(
    stage: str, model: nn.Module, work: Path, reals: np.ndarray, fakes: list[np.ndarray], steps: int
) -> nn.Module:
    """Train a detector on real and fake pictures with labels 0.9 and 0.1.

    Half of the fakes are the model's own, and half come from attacks, if there are any.
    """
    attacks = len(fakes) - 1
    counts = [BATCH]
    if attacks:
        counts = [BATCH // 2] + [BATCH // 2 // attacks] * attacks

    def loss(
        model: nn.Module, random: np.random.Generator
    ) -> tuple[torch.Tensor, dict[str, float]]:
        fake = torch.cat([draw(pool, random, n) for pool, n in zip(fakes, counts, strict=True)])
        x = augment(torch.cat([draw(reals, random, len(fake)), fake]), random)
        logits = model(x)
        target = torch.cat([torch.full((len(fake),), 0.9), torch.full((len(fake),), 0.1)])
        accuracy = ((logits > 0) == (target > 0.5)).float().mean()
        return F.binary_cross_entropy_with_logits(logits, target), {"accuracy": accuracy.item()}

    return fit(stage, model, loss, work, steps=steps, lr=1e-3, weight_decay=0.02, ema_decay=0.995)


def train_classifier(work: Path, reals: np.ndarray) -> nn.Module:
    """Train a classifier to tell which photograph a real crop is from."""
    torch.manual_seed(2)

    def loss(
        model: nn.Module, random: np.random.Generator
    ) -> tuple[torch.Tensor, dict[str, float]]:
        labels = random.integers(len(PHOTOS), size=BATCH)
        pixels = reals[labels, random.integers(REALS, size=BATCH)]
        logits = model(augment(to_inputs(pixels), random))
        target = torch.from_numpy(labels)
        accuracy = (logits.argmax(1) == target).float().mean()
        return F.cross_entropy(logits, target), {"accuracy": accuracy.item()}

    model = Classifier(len(PHOTOS))
    return fit("classifier", model, loss, work, steps=1000, lr=1e-3, ema_decay=0.995)


def save(model: nn.Module, file: Path) -> None:
    """Write a network in bfloat16, and round its weights to what was written."""
    save_file(model.to(torch.bfloat16).state_dict(), file)
    model.float()


def attack(work: Path, number: int) -> Path:
    """Run GRPO against the detector alone, without KL or alignment. Returns the LoRA's folder."""
    name = f"attack-{number}"
    lora = work / name / "lora"
    if lora.exists():  # train.py writes it as a whole
        return lora

    overrides = {
        "run_root": work,
        "run_name": name,
        "seed": 100 + number,
        "num_epochs": ATTACK_EPOCHS,
        "save_freq": 10,
        "eval_freq": ATTACK_EPOCHS,
        "train.beta": 0.0,
        "reward.fn": {"embedded_detector": 1.0},
        "compilation_cache": work / "xla",
        "prompts.cache": work / "text",
    }
    program = ROOT / "scripts" / "train.py"
    command = [sys.executable, program, "--config", ROOT / "configs" / "flux_grpo.py"]
    command += [f"--config.{key}={value}" for key, value in overrides.items()]
    if (work / name / "config.json").exists():
        command.append("--resume")
    subprocess.run([str(word) for word in command], check=True)
    return lora


@torch.no_grad()
def report(name: str, detector: nn.Module, pools: dict[str, np.ndarray]) -> None:
    """Print a detector's mean P(real) of about 1,024 pictures of each pool."""
    means = []
    for pool, pictures in pools.items():
        flat = pictures.reshape(-1, *pictures.shape[-3:])
        flat = flat[:: max(1, len(flat) // 1024)]
        mean = detector(to_inputs(flat)).sigmoid().mean().item()
        means.append(f"{pool} {mean:.3f}")
    print(f"{name}: mean P(real) {'  '.join(means)}", flush=True)
