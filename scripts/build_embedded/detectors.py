"""Stages 4 and 5: the detectors and the classifier, then rounds of attack that harden them.

A detector trained on the model's own pictures alone is fooled within two minutes of unregularised GRPO, by textures
that look like nothing. So each round runs that attack with the project's own trainer, adds what it made to the fakes,
and trains on.
"""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import torch
from diffusers import AutoencoderKL
from fit import fit, kept, rng
from ml_collections import ConfigDict
from photos import PHOTOS, SIZE, TEMPLATES, TEST_TEMPLATES, crops, prompts
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from vae import decode, encode

from realgen_jax.models.flux.family import load_pipeline
from realgen_jax.models.flux.tables import ENCODERS
from realgen_jax.nn.lora import load_lora
from realgen_jax.sharding import make_mesh
from realgen_jax.text_cache import ensure_encoded
from reward_bridge.metrics import statistics
from reward_bridge.rewards.embedded import Classifier, ConvDetector, PoolDetector, to_input

ROOT = Path(__file__).resolve().parents[2]
ENCODE = [sys.executable, str(ROOT / "scripts" / "encode_prompts.py")]
REALS, FAKES = 512, 256  # pictures of each photograph
STEPS, HARDEN_STEPS, BATCH = 1500, 1500, 64
ROUNDS = 3
ATTACK_EPOCHS = 40
SCALES = (0.4, 0.7, 1.0)  # of an attack's LoRA: the way to the hack as well as the hack


def write_prompts(embedded: Path) -> None:
    """Template-major, so that the first prompts show every subject once."""
    for name, templates in (("train", TEMPLATES), ("test", TEST_TEMPLATES)):
        lines = [template.format(photo.subject) for template in templates for photo in PHOTOS]
        (embedded / f"prompts_{name}.txt").write_text("\n".join(lines) + "\n")


def real_pictures(vae: AutoencoderKL) -> np.ndarray:
    """Training crops, three in four through the autoencoder (else a detector learns the autoencoder, not the model).

    uint8 [photographs, REALS, h, w, 3].
    """
    pictures = []
    for i in range(len(PHOTOS)):
        pixels = crops(np.full(REALS, i), "train", rng("reals", i))
        through = 3 * REALS // 4
        pixels[:through] = decode(vae, encode(vae, pixels[:through]))
        pictures.append(pixels)
    return np.stack(pictures)


def generated_pictures(
    work: Path, pipeline: Path, lora: Path | None, count: int, seed: int
) -> np.ndarray:
    """`count` pictures of each photograph by the pipeline: uint8 [photographs, count, h, w, 3]."""
    mesh = make_mesh(-1, 1, 1, jax.devices())
    exact = dict.fromkeys(("dtype", "param_dtype", "vae_dtype"), "float32")
    settings = ConfigDict({"model": str(pipeline), "transformer": "", "remat": "full", **exact})
    pipe = load_pipeline(settings, SIZE, None, mesh)
    versions = [None]
    if lora is not None:
        config, adapters = load_lora(lora, pipe.model)
        pipe = pipe.with_lora(config)
        grow = lambda scale: jax.tree.map(lambda a: a * np.sqrt(scale), adapters)  # noqa: E731  both factors
        versions = [grow(scale) for scale in SCALES]
    texts = [text for text, _ in prompts(TEMPLATES)]
    settings = {"cache": str(work / "text"), "max_tokens": 16, "dtype": "float32", "device": "cpu"}
    cache = ensure_encoded(texts, pipeline, ENCODERS, ConfigDict(settings), ENCODE)
    run = pipe.sampler(10)
    pictures = []
    for i in range(len(PHOTOS)):
        mine = [text for text, label in prompts(TEMPLATES) if label == i]
        part = []
        for k in range(0, count, 64):
            ids = np.arange(64, dtype=np.int32) + i * count + k
            cond = pipe.cond(cache, [mine[j % len(mine)] for j in range(64)], 3.5)
            part.append(
                np.asarray(run(versions[k // 64 % len(versions)], cond, jax.random.key(seed), ids))
            )
        pictures.append(np.concatenate(part)[:count].transpose(0, 2, 3, 1))
    return np.stack(pictures)


def augment(x: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
    """Mirror, shift by up to 4 pixels, blur, noise, brightness; each picture its own."""
    n = len(x)
    mirrored = torch.from_numpy(random.random(n) < 0.5)[:, None, None, None]
    x = torch.where(mirrored, x.flip(-1), x)
    padded = F.pad(x, (4,) * 4, mode="reflect")
    corners = random.integers(0, 9, (n, 2))
    x = torch.stack([padded[i, :, a : a + SIZE, b : b + SIZE] for i, (a, b) in enumerate(corners)])
    blurred = F.avg_pool2d(F.pad(x, (1,) * 4, mode="reflect"), 3, stride=1)
    amount = torch.from_numpy(random.uniform(-1.0, 0.5, (n, 1, 1, 1)).astype(np.float32)).clamp(
        min=0
    )
    x = torch.lerp(x, blurred, amount)
    gain = torch.from_numpy(random.uniform(0.85, 1.15, (n, 1, 1, 1)).astype(np.float32))
    level = torch.from_numpy(random.uniform(0, 0.06, (n, 1, 1, 1)).astype(np.float32))
    return (gain * x + level * torch.from_numpy(random.standard_normal(x.shape, np.float32))).clamp(
        -1, 1
    )


def _draw(pool: np.ndarray, random: np.random.Generator, n: int) -> torch.Tensor:
    pixels = pool[random.integers(pool.shape[0], size=n), random.integers(pool.shape[1], size=n)]
    return to_input(torch.from_numpy(pixels.transpose(0, 3, 1, 2)))


def train_detector(
    stage: str, model: nn.Module, work: Path, reals: np.ndarray, fakes: list[np.ndarray], steps: int
):
    """Real against fake with labels 0.9 and 0.1; half of the fakes are the model's own, half come from attacks."""

    def loss(
        model: nn.Module, random: np.random.Generator
    ) -> tuple[torch.Tensor, dict[str, float]]:
        shares = (
            [BATCH]
            if len(fakes) == 1
            else [BATCH // 2] + [BATCH // 2 // (len(fakes) - 1)] * (len(fakes) - 1)
        )
        fake = torch.cat([_draw(pool, random, n) for pool, n in zip(fakes, shares, strict=True)])
        x = augment(torch.cat([_draw(reals, random, len(fake)), fake]), random)
        logits = model(x)
        target = torch.cat([torch.full((len(fake),), 0.9), torch.full((len(fake),), 0.1)])
        accuracy = ((logits > 0) == (target > 0.5)).float().mean()
        return F.binary_cross_entropy_with_logits(logits, target), {"accuracy": accuracy.item()}

    return fit(stage, model, loss, work, steps=steps, lr=1e-3, weight_decay=0.02, ema_decay=0.995)


def train_classifier(work: Path, reals: np.ndarray) -> nn.Module:
    """Which photograph, from real crops alone."""
    torch.manual_seed(2)

    def loss(
        model: nn.Module, random: np.random.Generator
    ) -> tuple[torch.Tensor, dict[str, float]]:
        labels = random.integers(len(PHOTOS), size=BATCH)
        pixels = reals[labels, random.integers(REALS, size=BATCH)]
        logits = model(augment(to_input(torch.from_numpy(pixels.transpose(0, 3, 1, 2))), random))
        target = torch.from_numpy(labels)
        return F.cross_entropy(logits, target), {
            "accuracy": (logits.argmax(1) == target).float().mean().item()
        }

    return fit(
        "classifier", Classifier(len(PHOTOS)), loss, work, steps=1000, lr=1e-3, ema_decay=0.995
    )


def _save(model: nn.Module, file: Path) -> None:
    """Write a network in bfloat16, and round it to what was written."""
    save_file(model.to(torch.bfloat16).state_dict(), file)
    model.float()


def attack(work: Path, number: int) -> Path:
    """GRPO against the detector alone, without KL or alignment, by the project's own trainer. Returns its LoRA."""
    name = f"attack-{number}"
    lora = work / name / "lora"
    if not lora.exists():  # train.py puts it there whole
        overrides = {
            "run_root": work, "run_name": name, "seed": 100 + number, "num_epochs": ATTACK_EPOCHS, "save_freq": 10,
            "eval_freq": ATTACK_EPOCHS, "train.beta": 0.0, "reward.fn.clip_score": 0.0,
            "compilation_cache": work / "xla", "prompts.cache": work / "text",
        }  # fmt: skip
        command = [
            sys.executable,
            ROOT / "scripts" / "train.py",
            "--config",
            ROOT / "configs" / "flux_grpo.py",
        ]
        command += [f"--config.{key}={value}" for key, value in overrides.items()]
        if (work / name / "config.json").exists():
            command.append("--resume")
        subprocess.run([str(word) for word in command], check=True)
    return lora


@torch.no_grad()
def report(models: dict[str, nn.Module], pools: dict[str, np.ndarray]) -> None:
    for name, model in models.items():
        means = {}
        for pool, pictures in pools.items():
            flat = pictures.reshape(-1, *pictures.shape[-3:])[
                :: max(1, pictures.shape[0] * pictures.shape[1] // 1024)
            ]
            means[pool] = (
                model(to_input(torch.from_numpy(flat.transpose(0, 3, 1, 2))))
                .sigmoid()
                .mean()
                .item()
            )
        print(
            f"{name}: mean P(real) "
            + "  ".join(f"{pool} {mean:.3f}" for pool, mean in means.items()),
            flush=True,
        )


def build(work: Path, pipeline: Path, rewards: Path, vae: AutoencoderKL) -> None:
    """Write the detectors, the classifier, the subjects and the real crops' statistics into `rewards`."""
    reals = kept(work / "reals.npy", lambda: real_pictures(vae))
    held_out = np.stack(
        [crops(np.full(64, i), "held_out", rng("held_out", i)) for i in range(len(PHOTOS))]
    )
    (rewards / "subjects.json").write_text(
        json.dumps([photo.subject for photo in PHOTOS], indent=2) + "\n"
    )
    classifier = train_classifier(work, reals)
    _save(classifier, rewards / "classifier.safetensors")
    fresh = np.concatenate(
        [crops(np.full(128, i), "train", rng("reference", i)) for i in range(len(PHOTOS))]
    )
    with torch.no_grad():
        mean, cov = statistics(
            classifier.features(to_input(torch.from_numpy(fresh.transpose(0, 3, 1, 2)))).numpy()
        )
    save_arrays({"mean": mean, "cov": cov}, rewards / "real_features.safetensors")

    fakes = [
        kept(work / "fakes.npy", lambda: generated_pictures(work, pipeline, None, FAKES, seed=0))
    ]
    torch.manual_seed(0)
    detector = train_detector("detector-0", ConvDetector(), work, reals, fakes, STEPS)
    for number in range(1, ROUNDS + 1):
        _save(detector, rewards / "detector.safetensors")
        _save(
            PoolDetector(), rewards / "held_out.safetensors"
        )  # the trainer wants one; this run does not look at it
        lora = attack(work, number)
        make = partial(generated_pictures, work, pipeline, lora, 192, seed=number)
        fakes.append(kept(work / f"fakes-{number}.npy", make))
        report(
            {f"detector before round {number}": detector}, {"own": fakes[0], "attack": fakes[-1]}
        )
        detector = train_detector(f"detector-{number}", detector, work, reals, fakes, HARDEN_STEPS)
    torch.manual_seed(1)
    held_out_detector = train_detector("held-out", PoolDetector(), work, reals, fakes, STEPS)
    _save(detector, rewards / "detector.safetensors")
    _save(held_out_detector, rewards / "held_out.safetensors")
    attacks = np.concatenate(fakes[1:], axis=1)
    pools = {
        "train crops": reals,
        "held-out crops": held_out,
        "own fakes": fakes[0],
        "attacks": attacks,
    }
    report({"detector": detector, "held-out detector": held_out_detector}, pools)
