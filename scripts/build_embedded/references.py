"""Stage 5: reference pictures for rewards that learn, and statistics of held-out crops."""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from fit import rng
from photos import PHOTOS, TEMPLATES, crops
from PIL import Image, ImageFilter
from safetensors.numpy import save_file
from vae import decode, encode

from reward_bridge.metrics import statistics
from reward_bridge.rewards.embedded import load_classifier, to_input

# Pictures of each photograph.
COUNT = 32
SOFT = 16
# Standard deviation of the soft pictures' Gaussian blur, in pixels.
BLUR = 1.5


def build(vae: AutoencoderKL, rewards: Path) -> None:
    """Write `references/` and `held_out_features.safetensors`.

    `references/` has photographs.json, soft.json and their pictures.
    """
    folder = rewards / "references"
    photographs = {}
    soft = {}
    for i, photo in enumerate(PHOTOS):
        files, blurred = write_pictures(folder, i, vae)
        for template in TEMPLATES:
            photographs[template.format(photo.subject)] = files
            soft[template.format(photo.subject)] = blurred
    for name, table in (("photographs", photographs), ("soft", soft)):
        (folder / f"{name}.json").write_text(json.dumps(table, indent=1) + "\n")

    # The classifier's features of crops that no part of the model has seen.
    fresh = []
    for i in range(len(PHOTOS)):
        fresh.append(crops(np.full(128, i), "held_out", rng("held-out reference", i)))
    pixels = np.concatenate(fresh).transpose(0, 3, 1, 2)
    with torch.no_grad():
        features = load_classifier("cpu").features(to_input(torch.from_numpy(pixels)))
    mean, cov = statistics(features.numpy())
    save_file({"mean": mean, "cov": cov}, rewards / "held_out_features.safetensors")


def write_pictures(folder: Path, i: int, vae: AutoencoderKL) -> tuple[list[str], list[str]]:
    """Write crops of photograph `i`, and blurred copies; returns the names of both.

    Three in four crops go through the autoencoder: the model cannot unlearn what only the
    autoencoder does to a picture.
    """
    pixels = crops(np.full(COUNT, i), "train", rng("references", i))
    through = 3 * COUNT // 4
    pixels[:through] = decode(vae, encode(vae, pixels[:through]))
    pictures = [Image.fromarray(picture) for picture in pixels]

    (folder / "photographs").mkdir(parents=True, exist_ok=True)
    files = []
    for k, picture in enumerate(pictures):
        files.append(f"photographs/{i:02}_{k:02}.webp")
        picture.save(folder / files[-1], lossless=True, method=6)

    (folder / "soft").mkdir(parents=True, exist_ok=True)
    blurred = []
    for k, picture in enumerate(pictures[:SOFT]):
        blurred.append(f"soft/{i:02}_{k:02}.webp")
        picture = picture.filter(ImageFilter.GaussianBlur(BLUR))
        picture.save(folder / blurred[-1], lossless=True, method=6)
    return files, blurred
