"""Prompts to pictures, with or without a LoRA.

    python scripts/sample.py "a photo of a tabby cat" --out pictures
    python scripts/sample.py --prompts prompts.txt --lora runs/NAME/lora --config configs/flux_grpo.py:flux_dev_8xh200

Model, size, steps and guidance are the config's (`config.pretrained`, `config.sample.resolution`, `eval_num_steps`,
`guidance_scale`) and can be overridden, --config.sample.resolution=512. Picture i depends on --seed and i alone.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags
from PIL import Image
from rich.progress import track

from realgen_jax.config import parse_flags
from realgen_jax.data import read_prompts
from realgen_jax.models.flux.family import load_pipeline
from realgen_jax.models.flux.tables import ENCODERS
from realgen_jax.nn.lora import load_lora
from realgen_jax.sharding import batch_devices, batch_sharding, make_mesh
from realgen_jax.text_cache import ensure_encoded

FLAGS = flags.FLAGS
ENCODE = [sys.executable, str(Path(__file__).with_name("encode_prompts.py"))]
CONFIG = Path(__file__).resolve().parent.parent / "configs" / "flux_grpo.py"
config_flags.DEFINE_config_file("config", str(CONFIG), "a config of configs/")
flags.DEFINE_string(
    "prompts", None, "a prompt file (.txt, .jsonl) instead of prompts on the command line"
)
flags.DEFINE_string(
    "lora", None, "a peft folder, or a LoRA file or folder of diffusers (config.pretrained.lora)"
)
flags.DEFINE_string("out", "pictures", "folder for the PNG files")
flags.DEFINE_integer("seed", 0, "root of the pictures' noise")
flags.DEFINE_integer("per_prompt", 1, "pictures of each prompt", lower_bound=1)
flags.DEFINE_integer(
    "batch", 8, "pictures of one call, rounded up to the number of devices", lower_bound=1
)


def sample_prompts(prompts: list[str], out: Path) -> list[Path]:
    """Write `out/00000.png`, ... for every prompt, `per_prompt` of each, and return the files."""
    config = FLAGS.config
    cache = ensure_encoded(prompts, config.pretrained.model, ENCODERS, config.prompts, ENCODE)
    mesh = make_mesh(**config.mesh, devices=jax.devices())
    pipe = load_pipeline(config.pretrained, config.sample.resolution, None, mesh)
    adapters = None
    if path := FLAGS.lora or config.pretrained.lora:
        lora, adapters = load_lora(path, pipe.model)
        pipe = pipe.with_lora(lora)
    parts = batch_devices(mesh)
    batch = -(-FLAGS.batch // parts) * parts
    run = pipe.sampler(config.sample.eval_num_steps)
    texts = [prompt for prompt in prompts for _ in range(FLAGS.per_prompt)]
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for start in track(range(0, len(texts), batch), description="sampling", transient=True):
        ids = np.arange(
            start, start + batch, dtype=np.int32
        )  # the last call is filled up, what is over is dropped
        cond = pipe.cond(cache, [texts[i % len(texts)] for i in ids], config.sample.guidance_scale)
        images = run(
            adapters, cond, jax.random.key(FLAGS.seed), jax.device_put(ids, batch_sharding(mesh))
        )
        for i, pixels in zip(ids[: len(texts) - start], np.asarray(images), strict=False):
            files.append(out / f"{i:05}.png")
            Image.fromarray(pixels.transpose(1, 2, 0)).save(files[-1])
    return files


def main(argv: Sequence[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    prompts = list(argv[1:])
    try:
        if FLAGS.prompts:
            prompts += read_prompts(FLAGS.prompts)
        if not prompts:
            raise ValueError('nothing to sample: give prompts ("a photo of ...") or --prompts FILE')
        files = sample_prompts(prompts, Path(FLAGS.out))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{len(files)} pictures in {FLAGS.out}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
