"""What a run will need, before a GPU is paid for: memory of each device, operations, seconds of an iteration.

    python scripts/preflight.py --config configs/flux_grpo.py:flux_dev_8xh200
    python scripts/preflight.py --config ... --config.mesh.fsdp=4 --devices=8 --mfu=0.35 --json=report.json

No accelerator, no weights: the run's own programs are traced, lowered and (--nocompile: not) compiled on CPU devices
that stand for the target's, so what does not divide or fit together is told here. Arguments' bytes come from their
shardings, activations and operations from the formulas of realgen_jax/flux/cost.py.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict

from realgen_jax.config import define_config, parse_flags
from realgen_jax.models.flux.family import described
from realgen_jax.preflight.advice import changes
from realgen_jax.preflight.report import build, make_report
from realgen_jax.preflight.tables import show

FLAGS = flags.FLAGS
define_config()
flags.DEFINE_integer(
    "devices", 0, "devices that train; 0: config.mesh's, or config.preflight.devices", lower_bound=0
)
flags.DEFINE_float(
    "mfu", 0.0, "share of the peak that is reached; 0: config.preflight.mfu", 0.0, 1.0
)
flags.DEFINE_bool(
    "compile", True, "compile the programs, and compare their arguments' bytes with the shardings'"
)
flags.DEFINE_string("json", None, "write all figures to this file")


def target_devices(config: ConfigDict) -> int:
    sizes = [config.mesh[axis] for axis in ("data", "fsdp", "tensor")]
    known = sizes[0] * sizes[1] * sizes[2] if min(sizes) > 0 else 0
    return FLAGS.devices or known or config.preflight.devices


def main(_: Sequence[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    config = FLAGS.config
    jax.config.update("jax_platforms", "cpu")
    try:
        devices, mfu = target_devices(config), FLAGS.mfu or config.preflight.mfu
        jax.config.update("jax_num_cpu_devices", devices)
        report = make_report(config, devices)
        found = build(report, FLAGS.compile)
        figures = show(
            report,
            found,
            mfu,
            described(config.pretrained),
            lambda need: changes(report, need, make_report),
        )
        if FLAGS.json:
            Path(FLAGS.json).write_text(json.dumps(figures, indent=2) + "\n")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
