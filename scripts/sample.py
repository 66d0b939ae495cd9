"""Sample pictures from prompts, with or without a LoRA.

    python scripts/sample.py "a photo of a tabby cat" --out pictures
    python scripts/sample.py --prompts prompts.txt --lora runs/NAME/lora \\
        --config configs/flux_grpo.py:flux_dev_8xh200
    python scripts/sample.py "a cat on a roof" --rewriter runs/NAME/rewriter

With a rewriter, the rewrite of each prompt is printed and drawn; --no-rewrite draws the prompts
themselves, from the same noise.

The model is the config's (config.pretrained), and so are size, steps, solver and guidance
(config.evaluate.sample). They can be set on the command line,
--config.evaluate.sample.num_steps=40. Picture i depends only on --seed and i.
"""

from realgen_jax import process

process.begin(__name__)  # before the imports that take seconds

import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict
from PIL import Image

from realgen_jax.command_line import define_config, parse_flags
from realgen_jax.data import read_prompts
from realgen_jax.files import write_image
from realgen_jax.hosts import start_devices
from realgen_jax.input_files import check_text
from realgen_jax.models.loading import EVALUATIONS, load_model, load_tuned, size_of
from realgen_jax.models.model import tuned_steps
from realgen_jax.models.prompts import embed_prompts
from realgen_jax.models.trainable import with_lora_file
from realgen_jax.nn.lora_files import open_lora
from realgen_jax.rewriter.child import RewriteProgram
from realgen_jax.rewriter.files import read_rewriter
from realgen_jax.sharding import batch_devices, batch_sharding, make_mesh
from realgen_jax.training.progress import plain_console, progress_bars

# The programs that compute text embeddings and rewrite prompts, in processes of their own.
ENCODE = (sys.executable, str(Path(__file__).with_name("encode_prompts.py")))
REWRITE = (sys.executable, str(Path(__file__).with_name("rewrite.py")))

FLAGS = flags.FLAGS
define_config("flux_grpo")
flags.DEFINE_string(
    "prompts", None, "a prompt file (.txt, .jsonl) instead of prompts on the command line"
)
flags.DEFINE_string(
    "lora", None, "a LoRA: a peft folder, or a file of any naming (config.pretrained.lora)"
)
flags.DEFINE_string("rewriter", None, "a run's rewriter/, which rewrites the prompts first")
flags.DEFINE_bool("no-rewrite", False, "with --rewriter: draw the prompts as they are, to compare")
flags.DEFINE_string("out", "pictures", "folder for the PNG files")
flags.DEFINE_integer("seed", 0, "root of the pictures' noise", lower_bound=0, upper_bound=2**32 - 1)
flags.DEFINE_integer("per_prompt", 1, "pictures of each prompt", lower_bound=1)
flags.DEFINE_integer(
    "batch", 8, "pictures of one call, rounded up to the number of devices", lower_bound=1
)


def sample_prompts(prompts: list[str], out: Path) -> list[Path]:
    """Write `out/00000.png`, ... for every prompt, `per_prompt` of each, and return the files."""
    config = FLAGS.config
    settings = config.evaluate.sample
    num_tuned = tuned_steps(settings)
    lora = FLAGS.lora or config.pretrained.lora
    if lora:
        open_lora(lora)  # a file that cannot be read is refused at once

    # Embed the prompts before JAX claims the memory of its devices.
    cache = embed_prompts(prompts, config.pretrained, config.prompts, ENCODE)

    # The model and its tuned part: a LoRA's adapters or, if only the first steps take it, a whole
    # transformer.
    mesh = make_mesh(**config.mesh, devices=start_devices())
    pretrained = config.pretrained
    is_hybrid = settings.tuned_share < 1
    if is_hybrid and pretrained.transformer and not lora:
        base = ConfigDict({**pretrained.to_dict(), "transformer": ""})
        model = load_model(base, size_of(settings), mesh, key=EVALUATIONS)
        tuned = load_tuned(model, pretrained)
    else:
        model = load_model(pretrained, size_of(settings), mesh, key=EVALUATIONS)
        tuned = None
    if lora:
        model, tuned = with_lora_file(model, lora)

    # All calls have the same size: the last one is padded, and its extra images are dropped.
    devices = batch_devices(mesh)
    batch = -(-FLAGS.batch // devices) * devices
    sample = model.sampler(settings.num_steps, settings.solver, num_tuned)
    key = jax.random.key(FLAGS.seed)
    texts = [prompt for prompt in prompts for _ in range(FLAGS.per_prompt)]
    out.mkdir(parents=True, exist_ok=True)
    files = []
    with progress_bars(plain_console()) as bars:
        advance = bars("sampling", len(texts), "pictures")
        for start in range(0, len(texts), batch):
            numbers = np.arange(start, start + batch, dtype=np.int32)
            call_texts = [texts[number % len(texts)] for number in numbers]
            cond = model.cond(cache, call_texts, settings.guidance_scale)
            ids = jax.device_put(numbers, batch_sharding(mesh))
            images = np.asarray(sample(model, tuned, cond, key, ids))
            for number, pixels in zip(numbers[: len(texts) - start], images, strict=False):
                files.append(out / f"{number:05}.png")
                write_image(files[-1], Image.fromarray(pixels.transpose(1, 2, 0)))
            advance(min(batch, len(texts) - start))
    return files


def rewrite_prompts(prompts: list[str]) -> list[str]:
    """Print the rewrite of each prompt and return them."""
    config = FLAGS.config
    program = RewriteProgram(
        command=REWRITE,
        pipeline=config.pretrained.model,
        max_tokens=config.prompts.max_tokens,
        compilation_cache=config.compilation_cache,
        remake=False,
        quiet=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        rewrites = program.rewrite(FLAGS.rewriter, prompts, Path(folder))
    for prompt, rewrite in zip(prompts, rewrites, strict=True):
        cannot = " (its rewrite cannot be drawn)" if rewrite == prompt else ""
        print(f"{prompt}\n  -> {rewrite}{cannot}")
    return rewrites


def run(argv: Sequence[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    prompts = list(argv[1:])
    try:
        for prompt in prompts:
            check_text(prompt, "a prompt on the command line")
        if FLAGS.prompts:
            prompts += read_prompts(FLAGS.prompts)
        if not prompts:
            raise ValueError('nothing to sample: give prompts ("a photo of ...") or --prompts FILE')
        if FLAGS["no-rewrite"].value and not FLAGS.rewriter:
            raise ValueError("--no-rewrite goes with --rewriter")
        if FLAGS.rewriter:
            read_rewriter(FLAGS.rewriter)  # a folder that cannot be read is refused at once
            if not FLAGS["no-rewrite"].value:
                prompts = rewrite_prompts(prompts)
        files = sample_prompts(prompts, Path(FLAGS.out))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{len(files)} pictures in {FLAGS.out}")


def main() -> None:
    app.run(run, flags_parser=partial(parse_flags, words=True))


if __name__ == "__main__":
    main()
