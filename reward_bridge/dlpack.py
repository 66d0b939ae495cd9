"""jax.Array -> torch.Tensor without a copy, and who gets which GPU. The one file that imports both."""

import jax
import torch


def to_torch(array: jax.Array) -> torch.Tensor:
    """The tensor that shares memory with an array on one device: treat it as read-only, jax may reuse its values.

    Waits until the array is ready. Either side keeps the memory alive. Raises TypeError for what is not a concrete
    array, ValueError for a deleted (donated) one or one that lies on several devices.
    """
    _check(array)
    if len(array.devices()) > 1:
        raise ValueError(f"the array lies on {len(array.devices())} devices; expected one, or use shards_to_torch")
    return torch.from_dlpack(array)


def shards_to_torch(array: jax.Array) -> list[torch.Tensor]:
    """One tensor for each of a sharded array's pieces on this host, in the order of their rows, none copied."""
    _check(array)
    shards = sorted(array.addressable_shards, key=lambda s: [index.start or 0 for index in s.index])
    return [torch.from_dlpack(shard.data) for shard in shards if shard.replica_id == 0]


def reserve(device: str) -> None:
    """Keep JAX off a torch device such as "cuda:7": it would claim 75 % of its memory. Call before JAX starts.

    The only GPU of a machine is shared. Raises ValueError for a GPU that is not there.
    """
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return
    count, mine = torch.cuda.device_count(), int(index or 0)
    if mine >= count:
        raise ValueError(f"there is no device {device!r}: torch sees {count} CUDA devices on this machine")
    others = [str(i) for i in range(count) if i != mine]
    if others:
        jax.config.update("jax_cuda_visible_devices", ",".join(others))


def _check(array: jax.Array) -> None:
    if isinstance(array, jax.core.Tracer):
        raise TypeError("the array is a tracer: call this outside of jit, on the values a jitted function returned")
    if not isinstance(array, jax.Array):
        raise TypeError(f"got a {type(array).__name__}; expected a jax.Array")
    if array.is_deleted():
        raise ValueError("the array's memory was donated to a jitted function; hand it over before that call")
