"""Estimate what a run needs: memory per device, operations and seconds per iteration.

    python scripts/preflight.py --config configs/flux_grpo.py:flux_dev_8xh200
    python scripts/preflight.py --config ... --config.mesh.fsdp=4 --devices=8 --mfu=0.35 \\
        --json=report.json

Needs neither an accelerator nor weights. The run's own programs are traced, lowered and compiled
(unless --nocompile is given) on CPU devices that stand in for the target's, so sizes that do not
divide or fit together are reported here. The size of the arguments is computed from their
shardings, activations and operations from the formulas in realgen_jax/models (cost.py).

    python scripts/preflight.py --config configs/flux_grpo.py:flux_dev_8xh200 --compile_for=h200

asks XLA's compiler for that GPU or TPU, which needs no such device, but the extra aot-cuda or
aot-tpu: bytes, attention kernels, transfers between devices.
"""

from realgen_jax import process

process.begin(__name__)  # before the imports that take seconds

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict

from realgen_jax.command_line import define_config, parse_flags
from realgen_jax.files import writing
from realgen_jax.models.loading import sizes_on_disk
from realgen_jax.preflight.advice import changes
from realgen_jax.preflight.compiled import compile_programs, compiler_figures, show_compiled
from realgen_jax.preflight.report import argument_bytes, lowered, make_report, on_tpu
from realgen_jax.preflight.rewriter import (
    lowered_rewriter,
    make_rewriter_report,
    rewriter_on_tpu,
)
from realgen_jax.preflight.rewriter_tables import show_rewriter
from realgen_jax.preflight.tables import show
from realgen_jax.preflight.targets import TARGETS, target_devices

# config.stage -> a function (report) -> the same of a TPU
ON_TPU = {"diffusion": on_tpu, "rewriter": rewriter_on_tpu}

FLAGS = flags.FLAGS
define_config()
flags.DEFINE_integer(
    "devices",
    0,
    "number of devices that train; 0: the product of config.mesh's axes or, if that is unknown, "
    "config.preflight.devices",
    lower_bound=0,
)
flags.DEFINE_float(
    "mfu", 0.0, "fraction of peak FLOP/s that is reached; 0: config.preflight.mfu", 0.0, 1.0
)
flags.DEFINE_bool(
    "compile", True, "compile the programs and show the size of their arguments according to XLA"
)
flags.DEFINE_string(
    "compile_for",
    "",
    f"compile the large programs for this kind of device: {', '.join(TARGETS)}; a TPU may have a "
    "topology, such as v5p:2x2x1",
)
flags.DEFINE_string("json", None, "also write all figures to this file")


def number_of_devices(config: ConfigDict) -> int:
    """Return the number of devices to estimate for."""
    if FLAGS.devices:
        return FLAGS.devices
    mesh = config.mesh
    if min(mesh.data, mesh.fsdp, mesh.tensor) > 0:
        return mesh.data * mesh.fsdp * mesh.tensor
    return config.preflight.devices


def run(_: Sequence[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    config = FLAGS.config
    jax.config.update("jax_platforms", "cpu")
    try:
        # One CPU device for each target device.
        devices = number_of_devices(config)
        jax.config.update("jax_num_cpu_devices", devices)
        target = None
        if FLAGS.compile_for:
            target = target_devices(FLAGS.compile_for, devices)

        mfu = FLAGS.mfu or config.preflight.mfu
        if config.stage == "rewriter":
            report = make_rewriter_report(config, devices, target)
            programs = lowered_rewriter(report) if target else {}
            figures = show_rewriter(report, mfu)
        else:
            report = make_report(config, devices, target)
            programs = lowered(report)
            compile_here = FLAGS.compile and target is None
            figures = show(
                report,
                argument_bytes(programs) if compile_here else {},
                mfu,
                sizes_on_disk(config.pretrained),
                lambda report, room: changes(report, room, make_report),
            )
        if target:
            # From here on, the formulas of the target.
            if target[0].platform == "tpu":
                report = ON_TPU[config.stage](report)
            compiled = compile_programs(report, programs)
            show_compiled(FLAGS.compile_for, report, compiled)
            figures["compiled"] = compiler_figures(report, compiled)
        if FLAGS.json:
            with writing(Path(FLAGS.json)):
                Path(FLAGS.json).write_text(json.dumps(figures, indent=2) + "\n")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def main() -> None:
    app.run(run, flags_parser=parse_flags)


if __name__ == "__main__":
    main()
