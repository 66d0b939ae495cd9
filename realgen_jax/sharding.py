"""The device mesh, from a laptop to many GPUs, and the sharding of every array.

Axes: data (batch), fsdp (batch and parameters), tensor (a parameter's other dimension). This is
plain GSPMD: `jax.jit` follows the shardings of its arguments.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.layout import Format, Layout
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
Rules = Sequence[tuple[str, P]]  # (pattern of a parameter's path, how it is split)
HOST = "pinned_host"  # JAX's memory kind
SUBLANES = 8  # height of a TPU's vector register


def mesh_sizes(data: int, fsdp: int, tensor: int, devices: int) -> tuple[int, int, int]:
    """Return the mesh's three sizes; one argument may be -1 and takes all remaining devices.

    Three positive sizes may use fewer devices than there are. Raises ValueError if they do not fit.
    """
    sizes = [data, fsdp, tensor]
    free = sizes.count(-1)
    known = math.prod(size for size in sizes if size != -1)
    fits = free <= 1 and 1 <= known <= devices and min(size for size in sizes if size != -1) > 0
    if not fits or (free and devices % known):
        raise ValueError(
            f"mesh data={data}, fsdp={fsdp}, tensor={tensor} does not fit {devices} devices; "
            "they must multiply to at most that number; one of them may be -1 (the rest) "
            "if the others divide it"
        )
    data, fsdp, tensor = (devices // known if size == -1 else size for size in sizes)
    return data, fsdp, tensor


def make_mesh(data: int, fsdp: int, tensor: int, devices: Sequence[jax.Device]) -> Mesh:
    """Return a mesh of `devices`. Raises ValueError as `mesh_sizes` does."""
    sizes = mesh_sizes(data, fsdp, tensor, len(devices))
    return jax.make_mesh(
        sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[: math.prod(sizes)]
    )


def abstract_mesh(data: int, fsdp: int, tensor: int, devices: int) -> AbstractMesh:
    """Return a mesh without devices, to check shapes before JAX starts."""
    sizes = mesh_sizes(data, fsdp, tensor, devices)
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)


def target(mesh: Mesh | None) -> jax.Device:
    """Return the device that a program is for: the first of the mesh, or JAX's default device."""
    return jax.devices()[0] if mesh is None else mesh.devices.flat[0]


def for_tpu(mesh: Mesh | None) -> bool:
    """Return whether a program is for TPUs."""
    return target(mesh).platform == "tpu"


def for_gpu(mesh: Mesh | None) -> bool:
    """Return whether a program is for GPUs."""
    return target(mesh).platform == "gpu"


def constrain(x: jax.Array, mesh: Mesh | None, *spec: Any) -> jax.Array:
    """Constrain the sharding of x and its gradient: one entry of `spec` per axis, from the front.

    Without a mesh or on one device this returns x itself, so the program is the same as without a
    mesh.
    """
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding that puts the whole array on every device."""
    return NamedSharding(mesh, P())


def to_host(where: NamedSharding | Format) -> NamedSharding | Format:
    """Return the same sharding in the host's memory, page-locked, so that devices read from it.

    Raises ValueError if JAX has no such memory for these devices.
    """
    if isinstance(where, Format):
        return Format(where.layout, to_host(where.sharding))
    mesh = where.mesh
    if isinstance(mesh, Mesh):
        device = mesh.local_devices[0]
        kinds = [memory.kind for memory in device.addressable_memories()]
        if not kinds:
            # A device to compile for (preflight/targets.py); JAX asks an abstract mesh for nothing.
            mesh = mesh.abstract_mesh
        elif HOST not in kinds:
            raise ValueError(
                f"JAX offers no host memory ({HOST}) for {device}, only {', '.join(kinds)}; "
                "expected config.pretrained.offload=False and config.train.offload=False"
            )
    return NamedSharding(mesh, where.spec, memory_kind=HOST)


def is_on_host(array: Any) -> bool:
    """Return whether an array, or what stands for it in a jitted function, is in host memory."""
    return jax.typeof(array).memory_space == jax.memory.Space.Host


def to_device(tree: Any) -> Any:
    """Copy those arrays of a tree that are in host memory to the devices, with their sharding.

    This works in jitted functions and outside.
    """

    def copied(array: jax.Array) -> jax.Array:
        return jax.device_put(array, jax.memory.Space.Device) if is_on_host(array) else array

    return jax.tree.map(copied, tree)


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Return the sharding of batch rows over data and fsdp; `axis` is the batch axis."""
    return NamedSharding(mesh, P(*(None,) * axis, BATCH_AXES))


def batch_devices(mesh: Mesh | AbstractMesh) -> int:
    """Return the number of parts that a batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def param_sharding(
    mesh: Mesh | AbstractMesh, rules: Rules
) -> Callable[[str, tuple[int, ...]], NamedSharding | Format]:
    """Return a function (dotted path, shape) -> sharding of a parameter, by a family's rules.

    The scales of a quantised kernel (nn/quantize.py) are split as the kernel is; an axis of one
    scale is not. The function raises ValueError unless exactly one rule matches the path, and if a
    dimension is not divisible by its mesh axis. On TPUs it also says in which order the axes of a
    fused projection lie in memory.
    """

    def sharding(path: str, shape: tuple[int, ...]) -> NamedSharding | Format:
        ruled = path.removesuffix("_scale")
        specs = [spec for pattern, spec in rules if re.fullmatch(pattern, ruled)]
        if len(specs) != 1:
            raise ValueError(
                f"{len(specs)} sharding rules of the model family match the parameter {path}; "
                "expected exactly one"
            )
        spec = specs[0]
        if ruled != path:
            pairs = zip(shape, spec, strict=False)
            spec = P(*(axes if size > 1 else None for size, axes in pairs))
        for size, axes in zip(shape, spec, strict=False):
            names = (axes,) if isinstance(axes, str) else axes or ()
            if size % math.prod(mesh.shape[axis] for axis in names):
                split = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in names)
                raise ValueError(
                    f"{path} {shape} cannot be split: {size} is not divisible by mesh axis {split}"
                )
        return _in_tiles(shape, NamedSharding(mesh, spec))

    return sharding


def _in_tiles(shape: tuple[int, ...], sharding: NamedSharding) -> NamedSharding | Format:
    """Place the kernel of a fused projection, [layers, in, parts, out], as a TPU multiplies it.

    A TPU holds the last two axes in tiles of 8 x 128, which 3 or 4 parts do not fill. XLA would
    turn the kernels of all layers in every program and keep the copies: 7 GiB of FLUX. With the
    parts in front, which it also chooses if it may (Layout.AUTO), it turns only those of the
    queries, keys and values, once a microbatch.
    """
    mesh = sharding.mesh
    fused = len(shape) == 4 and shape[2] < SUBLANES
    if not fused or not isinstance(mesh, Mesh) or not for_tpu(mesh):
        return sharding
    return Format(Layout((0, 2, 1, 3)), sharding)


def local_slots(mesh: Mesh, count: int) -> list[int]:
    """Return the rows of a batch of `count` that this process's devices hold, sorted."""
    index_map = batch_sharding(mesh).addressable_devices_indices_map((count,))
    return sorted({slot for (rows,) in index_map.values() for slot in range(count)[rows]})
