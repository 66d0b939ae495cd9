"""Quantise a transformer once, so that runs read codes instead of quantising the weights again.

    python scripts/quantize.py --config configs/small_cards.py:flux_dev_1x24gb \
        --folder models/FLUX.1-dev-nf4

The model is the config's (config.pretrained), and so is the format, config.pretrained.quantization.
Runs take the folder as --config.pretrained.transformer, with the same format; what they load is the
same to the bit as without it. Other programs cannot read it.
"""

from realgen_jax import process

process.begin(__name__)  # before the imports that take seconds

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from realgen_jax.command_line import define_config, parse_flags
from realgen_jax.files import whole_folder
from realgen_jax.models.exporting import write_quantized
from realgen_jax.models.loading import size_of

FLAGS = flags.FLAGS
define_config()
flags.DEFINE_string("folder", None, "the folder to write, which does not exist yet")
flags.mark_flag_as_required("folder")


def run(_: Sequence[str]) -> None:
    config = FLAGS.config
    try:
        if Path(FLAGS.folder).exists():
            raise ValueError(f"--folder is {FLAGS.folder!r}, which exists; name a new folder")
        with whole_folder(Path(FLAGS.folder)) as folder:
            write_quantized(config.pretrained, size_of(config.sample), folder)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(FLAGS.folder)


def main() -> None:
    app.run(run, flags_parser=parse_flags)


if __name__ == "__main__":
    main()
