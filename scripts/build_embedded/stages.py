"""The stages of the build, in order."""

from pathlib import Path

import detectors
import dino
import flux
import photos
import references
import rewriter
import sd3
import text
import torch
import vae as autoencoder
import words

ROOT = Path(__file__).resolve().parents[2]


def build(work: Path, threads: int, only: str | None) -> None:
    """Build everything, or with `only` one part of it."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)

    work = work.resolve()
    embedded = ROOT / "realgen_jax" / "embedded"
    flux_folder = embedded / "flux_tiny"
    sd3_folder = embedded / "sd3_tiny"
    rewards = ROOT / "reward_bridge" / "embedded"
    for folder in (work, flux_folder, rewards):
        folder.mkdir(parents=True, exist_ok=True)

    vae = autoencoder.build(work, flux_folder)
    if only in (None, "flux"):
        text.build(work, flux_folder, rewards)
        flux.build(work, flux_folder, vae)
        photos.write_prompts(embedded)
        detectors.build(work, flux_folder, rewards, vae)
    if only in (None, "references"):
        references.build(vae, rewards)
    if only in (None, "sd3"):
        sd3.build(work, flux_folder, sd3_folder, vae)
    if only in (None, "dino"):
        dino.build(work, rewards / "dino")
    if only in (None, "rewriter"):
        words.build(work, flux_folder, embedded / "flux_words", vae)
        rewriter.build(work, embedded / "qwen_tiny")
