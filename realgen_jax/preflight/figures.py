"""Figures of a preflight report: time and memory on each kind of accelerator, and JSON."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from realgen_jax.models import cost
from realgen_jax.preflight.report import Report, on_tpu
from realgen_jax.preflight.targets import CARDS

GIB = 2**30
TERA = 1e12

# name: (dense bf16 TFLOP/s, GiB that a program can see). Sources: NVIDIA's Ada GPU architecture
# whitepaper (RTX 4090, with float32 sums), data sheets of the L40S (2023), A100 (2020, 2021), H100
# SXM and H200 SXM (2024); cloud.google.com/tpu/docs, "TPU v5p" and "TPU v6e", per chip.
ACCELERATORS = {
    "RTX 4090": (CARDS["rtx4090"].tflops, 23.6),
    "L40S": (CARDS["l40s"].tflops, 44.4),
    "A100 40 GB": (CARDS["a100-40gb"].tflops, 39.4),
    "A100 80 GB": (CARDS["a100-80gb"].tflops, 79.0),
    "H100 SXM": (CARDS["h100"].tflops, 78.0),
    "H200 SXM": (CARDS["h200"].tflops, 139.0),
    "TPU v5p": (459, 95.0),
    "TPU v6e": (918, 31.2),
}

# Bytes a second that a GPU copies from host memory: about what PCIe 4.0 with 16 lanes reaches.
PCIE = 25e9
# Bytes of page-locked host memory that XLA takes for the GPUs of a process, by default.
HOST_LIMIT = 64e9

# Fraction of that memory that a run can use. The driver's context, the kernels' workspaces and
# fragmentation take the rest.
USABLE = 0.95


@dataclass(frozen=True)
class Accelerator:
    """One iteration of a run on one kind of accelerator."""

    name: str
    seconds: float  # of an iteration
    sample_seconds: float  # of its sampling
    evaluation_seconds: float  # of one call of an evaluation
    fits: bool
    peak: float  # bytes of its memory that the run needs
    share: float  # the same as a fraction
    fraction: float | None  # XLA_CLIENT_MEM_FRACTION to start with; None on a TPU


def accelerator(report: Report, name: str, mfu: float) -> Accelerator:
    """Estimate a run on a kind of accelerator; `mfu` is the fraction of peak FLOP/s it reaches."""
    report = report_on(report, name)
    tflops, gib = ACCELERATORS[name]
    flops_per_second = report.devices * tflops * TERA * mfu
    sample_flops = report.flops["total"] - report.flops["update"]
    share = report.peak / (gib * GIB)
    return Accelerator(
        name=name,
        seconds=report.flops["total"] / flops_per_second,
        sample_seconds=sample_flops / flops_per_second,
        evaluation_seconds=report.flops["evaluation"] / flops_per_second,
        fits=share <= USABLE,
        peak=report.peak,
        share=share,
        fraction=None if name.startswith("TPU") else memory_fraction(share),
    )


def report_on(report: Report, name: str) -> Report:
    """Return the report of the run on a kind of accelerator."""
    return on_tpu(report) if name.startswith("TPU") else report


def memory_fraction(share: float) -> float:
    """Return XLA_CLIENT_MEM_FRACTION for a run that needs this share of a GPU.

    It is a tenth more, rounded up to a multiple of 0.05.
    """
    return min(USABLE, math.ceil(share * 1.1 / 0.05) * 0.05)


def usable_bytes(name: str) -> float:
    """Return the bytes that a run can use of an accelerator's memory."""
    _, gib = ACCELERATORS[name]
    return USABLE * gib * GIB


def figures(
    report: Report, arguments: dict[str, int], mfu: float, accelerators: list[Accelerator]
) -> dict[str, Any]:
    """Return all figures of a report, for JSON."""
    layout = report.recipe.layout
    sizes = {
        "held": report.held,
        "host": report.host,
        **report.phases,
        "peak": report.peak,
        "arguments_by_xla": arguments,
    }
    flops = {
        **report.flops,
        "forward": cost.velocity_flops(report.work),
        "update_image_step": cost.update_flops(report.work),
    }
    by_name = {}
    for estimate in accelerators:
        row = asdict(estimate)
        by_name[row.pop("name")] = row
    return {
        "preset": report.recipe.config.preset,
        "devices": report.devices,
        "mesh": dict(report.model.mesh.shape),
        "images": layout.calls * layout.images,
        "prompts": layout.groups,
        "mean_prefix": report.work.prefix,
        "passes": report.work.passes,
        "cfg_gradient": report.recipe.config.train.cfg_gradient,
        "bytes": sizes,
        "flops": flops,
        "mfu": mfu,
        "accelerators": by_name,
    }
