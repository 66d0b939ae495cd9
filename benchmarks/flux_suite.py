"""What benchmarks/flux_gpu.py measures: sizes, goals and rates."""

from dataclasses import dataclass

import jax
from workload import Size, tiny

# Dense bfloat16 operations per second, from the data sheets.
PEAKS = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
}
# Goals on one H200: seconds per image by batch size, and the update's MFU.
GOAL_SECONDS = {1: 3.6, 4: 3.3}
GOAL_MFU = 0.5
# RealGen's iteration, as in the preset flux_dev_8xh200 of configs/flux_grpo.py.
IMAGES = 504
GPUS = 7


@dataclass(frozen=True)
class Suite:
    """What is measured."""

    size: Size
    batches: tuple[int, ...]  # batch sizes of sampling
    branches: tuple[int, ...]  # microbatch sizes of the update
    product: int  # side of the matrices
    enough: float = 30.0  # after so many seconds, two runs are enough


SUITES = {
    "full": Suite(Size(), (1, 3, 4), (1, 3), 8192),
    "tiny": Suite(tiny(), (1, 4), (3,), 128),
}


def peak_rate() -> float | None:
    """The data sheet's operations per second of this GPU; None if it is not known."""
    return PEAKS.get(jax.devices()[0].device_kind)


def rates(flops: float, seconds: float) -> dict[str, float]:
    """Return TFLOP/s, and MFU if the GPU's peak is known."""
    results = {"tflops": flops / seconds / 1e12}
    peak = peak_rate()
    if peak:
        results["mfu"] = flops / seconds / peak
    return results
