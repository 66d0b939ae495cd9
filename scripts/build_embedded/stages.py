"""The stages of the build, in order."""

from pathlib import Path

import detectors
import flux
import photos
import references
import text
import torch
import vae as autoencoder

ROOT = Path(__file__).resolve().parents[2]


def build(work: Path, threads: int, only_references: bool) -> None:
    """Build everything, or only the reference pictures."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)

    work = work.resolve()
    embedded = ROOT / "realgen_jax" / "embedded"
    pipeline = embedded / "flux_tiny"
    rewards = ROOT / "reward_bridge" / "embedded"
    for folder in (work, pipeline, rewards):
        folder.mkdir(parents=True, exist_ok=True)

    vae = autoencoder.build(work, pipeline)
    if not only_references:
        text.build(work, pipeline, rewards)
        flux.build(work, pipeline, vae)
        photos.write_prompts(embedded)
        detectors.build(work, pipeline, rewards, vae)
    references.build(vae, rewards)
