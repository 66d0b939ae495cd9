"""Reference pictures for rewards that learn, and the statistics of crops that no part of the model has seen."""

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

COUNT, SOFT = 32, 16  # pictures of each photograph
BLUR = 1.5  # of the second kind: the Gaussian's sigma in pixels


def build(vae: AutoencoderKL, rewards: Path) -> None:
    """Write `references/` (photographs.json, soft.json and their pictures) and `held_out_features.safetensors`.

    Three in four pictures went through the autoencoder: what only it does to a picture the model cannot unlearn.
    """
    folder, photographs, soft = rewards / "references", {}, {}
    for name in ("photographs", "soft"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i, photo in enumerate(PHOTOS):
        pixels = crops(np.full(COUNT, i), "train", rng("references", i))
        through = 3 * COUNT // 4
        pixels[:through] = decode(vae, encode(vae, pixels[:through]))
        files = [f"photographs/{i:02}_{k:02}.webp" for k in range(COUNT)]
        blurred = [f"soft/{i:02}_{k:02}.webp" for k in range(SOFT)]
        for file, picture in zip(files, pixels, strict=True):
            Image.fromarray(picture).save(folder / file, lossless=True, method=6)
        for file, picture in zip(blurred, pixels, strict=False):
            picture = Image.fromarray(picture).filter(ImageFilter.GaussianBlur(BLUR))
            picture.save(folder / file, lossless=True, method=6)
        for template in TEMPLATES:
            photographs[template.format(photo.subject)] = files
            soft[template.format(photo.subject)] = blurred
    for name, table in (("photographs", photographs), ("soft", soft)):
        (folder / f"{name}.json").write_text(json.dumps(table, indent=1) + "\n")
    fresh = np.concatenate(
        [
            crops(np.full(128, i), "held_out", rng("held-out reference", i))
            for i in range(len(PHOTOS))
        ]
    )
    with torch.no_grad():
        found = (
            load_classifier("cpu")
            .features(to_input(torch.from_numpy(fresh.transpose(0, 3, 1, 2))))
            .numpy()
        )
    mean, cov = statistics(found)
    save_file({"mean": mean, "cov": cov}, rewards / "held_out_features.safetensors")
