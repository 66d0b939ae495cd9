"""jax.Array -> torch.Tensor without a copy, and who gets which GPU. The one file that imports both."""

import os
from collections.abc import Iterable

import jax
import numpy as np
import torch

GIB = 2**30
ROOM = GIB  # what rewards need beside their weights, at least, on a GPU that they share with JAX


def to_torch(array: jax.Array) -> torch.Tensor:
    """The tensor that shares memory with an array on one device: treat it as read-only, jax may reuse its values.

    Waits until the array is ready. Either side keeps the memory alive. A device that torch does not know (a TPU) costs
    a copy to the host. Raises TypeError for what is not a concrete array, ValueError for a deleted (donated) one or one
    that lies on several devices.
    """
    _check(array)
    if len(array.devices()) > 1:
        raise ValueError(
            f"the array lies on {len(array.devices())} devices; expected one, or use shards_to_torch"
        )
    if next(iter(array.devices())).platform not in ("cpu", "gpu"):
        return torch.from_numpy(np.array(array))
    return torch.from_dlpack(array)


def shards_to_torch(array: jax.Array) -> list[torch.Tensor]:
    """One tensor for each of a sharded array's pieces on this host, in the order of their rows, none copied."""
    _check(array)
    shards = sorted(array.addressable_shards, key=lambda s: [index.start or 0 for index in s.index])
    return [to_torch(shard.data) for shard in shards if shard.replica_id == 0]


def gather(array: jax.Array, device: str) -> torch.Tensor:
    """What this process holds of an array that is sharded by rows, as one tensor on a torch device.

    The array's own memory where it lies there in one piece, else one copy from device to device, not through the host.
    """
    shards = shards_to_torch(array)
    if len(shards) == 1:
        return shards[0].to(device)
    rows = sum(len(shard) for shard in shards)
    whole = torch.empty((rows, *array.shape[1:]), dtype=shards[0].dtype, device=device)
    for part, shard in zip(whole.split([len(shard) for shard in shards]), shards, strict=True):
        part.copy_(shard, non_blocking=True)
    if whole.is_cuda:
        torch.cuda.synchronize(whole.device)
    return whole


def reserve(devices: Iterable[str], share: bool = False) -> set[str]:
    """Keep JAX off these (resolved) GPUs, so that torch has all of their memory. Call before JAX starts.

    Returns the GPUs that both use: all of these if `share`, or where JAX would be left without a GPU; none where JAX
    was told to run on something else (JAX_PLATFORMS).
    """
    if not _on_gpu():
        return set()
    mine = {device for device in devices if device.startswith("cuda")}
    others = [str(i) for i in range(torch.cuda.device_count()) if f"cuda:{i}" not in mine]
    if mine and others and not share:
        jax.config.update("jax_cuda_visible_devices", ",".join(others))
        return set()
    return mine


def check_room(device: str) -> None:
    """Raise ValueError where JAX, once it starts, would claim memory that the rewards on a shared GPU already hold.

    JAX claims a fraction of the GPU at its start (0.75 unless XLA_CLIENT_MEM_FRACTION says otherwise) and gives
    nothing back.
    """
    if os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "") in ("false", "False", "0"):
        return
    free, total = torch.cuda.mem_get_info(device)
    old_name = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION")
    fraction = float(os.environ.get("XLA_CLIENT_MEM_FRACTION") or old_name or "0.75")
    if fraction * total + ROOM > free:
        fits = max(0.0, (free - ROOM) / total)
        raise ValueError(
            f"{device} is shared: JAX would claim {fraction:.0%} of its {total / GIB:.0f} GiB and the rewards have "
            f"{(total - free) / GIB:.1f} GiB of it; start with XLA_CLIENT_MEM_FRACTION={int(100 * fits) / 100}, "
            "or move the rewards (config.reward.device) to another GPU, the CPU or a server"
        )


def _on_gpu() -> bool:
    """Whether JAX may start on GPUs, where there are any."""
    return not jax.config.jax_platforms or bool(
        {"cuda", "gpu"} & set(jax.config.jax_platforms.split(","))
    )


def _check(array: jax.Array) -> None:
    if isinstance(array, jax.core.Tracer):
        raise TypeError(
            "the array is a tracer: call this outside of jit, on the values a jitted function returned"
        )
    if not isinstance(array, jax.Array):
        raise TypeError(f"got a {type(array).__name__}; expected a jax.Array")
    if array.is_deleted():
        raise ValueError(
            "the array's memory was donated to a jitted function; hand it over before that call"
        )
