"""Divides the GPUs between rewards (torch) and training (JAX). Does not import jax."""

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch

GIB = 2**30
ROOM = GIB  # bytes to leave for rewards, besides their weights, on a GPU shared with JAX
DEFAULT_FRACTION = "0.75"  # fraction of a GPU's memory that JAX claims when it starts
MEMORY_FRACTION = "XLA_CLIENT_MEM_FRACTION"
OLD_MEMORY_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"  # still read by JAX
PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"

# Out-of-memory messages of the CPU allocator and of cuBLAS: torch has no exception class for them.
OUT_OF_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass(frozen=True)
class Allotment:
    """How the GPUs are divided between JAX and the rewards."""

    shared: frozenset[str]  # GPUs that both use, such as "cuda:0"
    visible: str | None  # value for jax_cuda_visible_devices; None: leave it as it is


def resolve(device: str) -> str:
    """Turn a device name into a torch device.

    "auto" is the last GPU that torch sees, or the CPU if there is none; "cuda" is "cuda:0".
    Raises ValueError for a GPU that does not exist or any other name.
    """
    count = torch.cuda.device_count()
    if device == "auto":
        return f"cuda:{count - 1}" if count else "cpu"

    kind, _, index = device.partition(":")
    if kind == "cuda" and (index or "0").isdecimal():
        number = int(index or 0)
        if number >= count:
            raise ValueError(
                f"there is no device {device!r}: torch sees {count} CUDA devices on this machine"
            )
        return f"cuda:{number}"

    if device != "cpu":
        raise ValueError(f"got device {device!r}; expected auto, cpu, or a GPU such as cuda:0")
    return device


def reserve(devices: Iterable[str], jax_platforms: str | None, share: bool = False) -> Allotment:
    """Keep JAX off the rewards' GPUs, so that torch has all of their memory.

    devices: resolved torch devices of the rewards.
    jax_platforms: jax.config.jax_platforms. If JAX does not run on GPUs, nothing is reserved.
    share: let JAX use the rewards' GPUs too.

    The rewards' GPUs are also shared if none would be left for JAX. The caller applies
    `Allotment.visible` before JAX starts.
    """
    if not _jax_may_use_gpus(jax_platforms):
        return Allotment(frozenset(), None)

    reward_gpus = frozenset(device for device in devices if device.startswith("cuda"))
    others = []
    for index in range(torch.cuda.device_count()):
        if f"cuda:{index}" not in reward_gpus:
            others.append(str(index))

    if reward_gpus and others and not share:
        return Allotment(frozenset(), ",".join(others))
    return Allotment(reward_gpus, None)


def gpus_for_jax(devices: Iterable[str], jax_platforms: str | None, share: bool = False) -> int:
    """The number of GPUs that JAX will see after `reserve`; 0 if it does not run on GPUs.

    Arguments as for `reserve`. Nothing is started or reserved.
    """
    if not _jax_may_use_gpus(jax_platforms):
        return 0
    visible = reserve(devices, jax_platforms, share).visible
    return torch.cuda.device_count() if visible is None else len(visible.split(","))


def check_room(device: str) -> None:
    """Check that a GPU with loaded rewards has room for the memory that JAX will claim.

    JAX claims a fraction of the GPU when it starts (0.75 unless XLA_CLIENT_MEM_FRACTION is set) and
    never returns it. Raises ValueError with the fraction that fits.
    """
    if os.environ.get(PREALLOCATE, "") in ("false", "False", "0"):
        return

    free, total = torch.cuda.mem_get_info(device)  # bytes
    old_fraction = os.environ.get(OLD_MEMORY_FRACTION)
    fraction = float(os.environ.get(MEMORY_FRACTION) or old_fraction or DEFAULT_FRACTION)
    if fraction * total + ROOM <= free:
        return

    fits = max(0.0, (free - ROOM) / total)
    raise ValueError(
        f"{device} is shared: JAX would claim {fraction:.0%} of its {total / GIB:.0f} GiB, and the "
        f"rewards use {(total - free) / GIB:.1f} GiB; start with "
        f"{MEMORY_FRACTION}={int(100 * fits) / 100}, or move the rewards (config.reward.device) to "
        "another GPU, the CPU or a server"
    )


def _jax_may_use_gpus(jax_platforms: str | None) -> bool:
    if not jax_platforms:
        return True
    return not {"cuda", "gpu"}.isdisjoint(jax_platforms.split(","))


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch raised an error because a device or the host has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(text in str(error) for text in OUT_OF_MEMORY)
