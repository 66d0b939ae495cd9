"""Write a LoRA, or the weights with it, for other programs.

    python scripts/export.py --lora runs/NAME/lora --format comfyui --out NAME.safetensors \\
        --config configs/flux_grpo.py:flux_dev_8xh200
    python scripts/export.py --lora runs/NAME/lora --merge --format diffusers --out merged

A LoRA of any form that docs/files.md lists is written as diffusers reads it (a folder), peft (a
folder) or ComfyUI (a file). The model itself need not be there, only its sizes: the config's
(config.pretrained).

With --merge, the config's transformer is written with the LoRA added, if there is one: as a
transformer/ folder of diffusers, or as one file that ComfyUI and the publisher's code read. The sum
is taken in float32. Nothing runs on an accelerator.
"""

from realgen_jax import process

process.begin(__name__)  # before the imports that take seconds

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import app, flags, logging

from realgen_jax.command_line import define_config, parse_flags, refuse_words
from realgen_jax.files import whole_folder
from realgen_jax.models.exporting import LORA_FORMS, WEIGHT_FORMS, export_lora, export_weights
from realgen_jax.models.loading import (
    EVALUATIONS,
    abstract_model,
    missing_model,
    size_of,
    sizes_on_disk,
)
from realgen_jax.sharding import abstract_mesh

FLAGS = flags.FLAGS
define_config("flux_grpo")
flags.DEFINE_string("lora", "", "a LoRA: a peft folder, or a file of any naming")
flags.DEFINE_enum("format", "comfyui", list(LORA_FORMS), "the programs to write for")
flags.DEFINE_string("out", None, "the folder to write, or for comfyui the file; it must not exist")
flags.DEFINE_bool("merge", False, "write the weights with the LoRA, instead of the LoRA")
flags.DEFINE_enum(
    "dtype", "bfloat16", ["bfloat16", "float16", "float32"], "dtype of the weights with --merge"
)


def export() -> Path:
    """Write what the flags say and return its path. Raises ValueError for flags that do not fit."""
    # The flags.
    if not FLAGS.out:
        raise ValueError("nothing to write: give --out")
    out = Path(FLAGS.out)
    if out.exists():
        raise ValueError(f"--out is {FLAGS.out!r}, which exists; expected a new path")
    if not FLAGS.lora and not FLAGS.merge:
        raise ValueError("nothing to export: give --lora, or --merge for weights alone")
    if FLAGS.merge and FLAGS.format not in WEIGHT_FORMS:
        raise ValueError(
            f"--format is {FLAGS.format!r}, which is for LoRAs; with --merge, choose one of "
            f"{', '.join(WEIGHT_FORMS)}"
        )
    pretrained = FLAGS.config.pretrained
    if FLAGS.merge and not sizes_on_disk(pretrained):
        raise FileNotFoundError(missing_model(pretrained))

    # The model's shapes, and what is made of them.
    size = size_of(FLAGS.config.evaluate.sample)
    model = abstract_model(pretrained, size, abstract_mesh(1, 1, 1, 1), key=EVALUATIONS)
    out.parent.mkdir(parents=True, exist_ok=True)
    is_file = FLAGS.format == "comfyui"
    with contextlib.nullcontext(out) if is_file else whole_folder(out) as target:
        if FLAGS.merge:
            dtype = jnp.dtype(FLAGS.dtype)
            export_weights(model, pretrained, FLAGS.lora, FLAGS.format, target, dtype)
        else:
            export_lora(model, FLAGS.lora, FLAGS.format, target)
    return out


def run(argv: Sequence[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    refuse_words(argv)
    jax.config.update("jax_platforms", "cpu")
    try:
        out = export()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"written to {out}")


def main() -> None:
    app.run(run, flags_parser=parse_flags)


if __name__ == "__main__":
    main()
