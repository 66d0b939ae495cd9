"""Hand a jax.Array to torch without a copy. The only file that imports both."""

import jax
import numpy as np
import torch


def to_torch(array: jax.Array) -> torch.Tensor:
    """The tensor that shares memory with an array on one device.

    Treat it as read-only: jax may still use the values. Waits until the array is computed. Both the
    array and the tensor keep the memory alive. On a device that torch does not support (a TPU), the
    values are copied to the host.

    Raises TypeError for anything but a concrete array, ValueError for an array that was deleted
    (donated) or that is spread over several devices.
    """
    _check(array)
    if len(array.devices()) > 1:
        raise ValueError(
            f"the array lies on {len(array.devices())} devices; expected one, or use "
            "shards_to_torch"
        )
    device = next(iter(array.devices()))
    if device.platform not in ("cpu", "gpu"):
        return torch.from_numpy(np.array(array))
    return torch.from_dlpack(array)


def shards_to_torch(array: jax.Array) -> list[torch.Tensor]:
    """One tensor per shard of an array on this host, in the order of their rows, without a copy."""
    _check(array)
    shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    shards.sort(key=lambda shard: [index.start or 0 for index in shard.index])
    return [to_torch(shard.data) for shard in shards]


def gather(array: jax.Array, device: str) -> torch.Tensor:
    """This process's rows of an array that is sharded by rows, as one tensor on a torch device.

    If they are already there in one piece, the tensor shares their memory. Otherwise each shard is
    copied once, directly from device to device.
    """
    shards = shards_to_torch(array)
    if len(shards) == 1:
        return shards[0].to(device)

    lengths = [len(shard) for shard in shards]
    whole = torch.empty((sum(lengths), *array.shape[1:]), dtype=shards[0].dtype, device=device)
    for part, shard in zip(whole.split(lengths), shards, strict=True):
        part.copy_(shard, non_blocking=True)
    if whole.is_cuda:
        torch.cuda.synchronize(whole.device)
    return whole


def _check(array: jax.Array) -> None:
    if isinstance(array, jax.core.Tracer):
        raise TypeError(
            "the array is a tracer: call this outside of jit, on values that a jitted function "
            "returned"
        )
    if not isinstance(array, jax.Array):
        raise TypeError(f"got a {type(array).__name__}; expected a jax.Array")
    if array.is_deleted():
        raise ValueError(
            "the array's memory was donated to a jitted function; hand it over before that call"
        )
