"""One mesh from a laptop to many GPUs, and where every array lives on it.

Axes: data (batch), fsdp (batch and parameters), tensor (a parameter's other side). Plain GSPMD: `jax.jit` follows the
shardings that the arguments arrive with.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

BATCH_AXES = ("data", "fsdp")

# The transformer's arrays by dotted path; the first match wins and there is no catch-all. Stacked arrays have the
# layer in front, which is never split, and fused projections the axis of their parts. Projections into the heads or the
# MLP split their outputs over `tensor`, bias and all, the ones back out their inputs.
PARAM_RULES: tuple[tuple[str, P], ...] = (
    (r"(double\.(img|txt)|single)\.qkv\.kernel", P(None, "fsdp", None, "tensor")),
    (r"double\.(img|txt)\.mlp\.fc1\.kernel", P(None, "fsdp", "tensor")),
    (r"double\.(img|txt)\.(proj|mlp\.fc2)\.kernel", P(None, "tensor", "fsdp")),
    (r"single\.mlp\.kernel", P(None, "fsdp", None, "tensor")),
    (r"single\.proj\.kernel", P(None, None, "tensor", "fsdp")),
    (r"(double_(img|txt)|single)_mod\.kernel", P(None, None, ("fsdp", "tensor"))),
    (r"(double_(img|txt)|single)_mod\.bias", P(None, ("fsdp", "tensor"))),
    (r"(img|txt)_in\.kernel", P(None, "fsdp")),
    (r"(time|guidance|vector)_in\.fc1\.kernel", P("fsdp", "tensor")),
    (r"(time|guidance|vector)_in\.fc2\.kernel", P("tensor", "fsdp")),
    (r"final_mod\.kernel", P("fsdp", "tensor")),
    (r"proj_out\.kernel", P("fsdp", None)),
    (r"(double\.(img|txt)|single)\.qkv\.bias|single\.mlp\.bias", P(None, None, "tensor")),
    (r"double\.(img|txt)\.mlp\.fc1\.bias", P(None, "tensor")),
    (r"(time|guidance|vector)_in\.fc1\.bias", P("tensor")),
    (r"((img|txt)_in|final_mod|.*proj|proj_out|.*\.fc2)\.bias", P()),
    (r".*\.norm\.(query|key)", P()),
)


def make_mesh(data: int, fsdp: int, tensor: int, devices: Sequence[jax.Device]) -> Mesh:
    """A mesh of `devices`; one of the sizes may be -1 and takes what is left. Three sizes take the first."""
    sizes = [data, fsdp, tensor]
    known = int(np.prod([size for size in sizes if size != -1]))
    if (
        sizes.count(-1) > 1
        or known < 1
        or known > len(devices)
        or (-1 in sizes and len(devices) % known)
    ):
        raise ValueError(
            f"mesh data={data}, fsdp={fsdp}, tensor={tensor} does not fit {len(devices)} devices; "
            "they must multiply to at most that number; one of them may be -1 (the rest) if the others divide it"
        )
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    return jax.make_mesh(
        sizes,
        ("data", "fsdp", "tensor"),
        axis_types=(AxisType.Auto,) * 3,
        devices=devices[: np.prod(sizes)],
    )


def constrain(x: jax.Array, mesh: Mesh | None, *spec: Any) -> jax.Array:
    """Pin where x lies, one entry of `spec` an axis from the front, and where its gradient lies too. Without a mesh, or
    on one device, x itself: the program is the one that knows no mesh.
    """
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Rows of the batch spread over data and fsdp; `axis` is where the rows are."""
    return NamedSharding(mesh, P(*(None,) * axis, BATCH_AXES))


def batch_devices(mesh: Mesh) -> int:
    """Over how many parts a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def param_sharding(mesh: Mesh) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """(dotted path, shape) of a transformer's array -> its sharding, by PARAM_RULES.

    Raises ValueError for a path that no rule matches and for a side that its mesh axis does not divide.
    """

    def sharding(leaf: str, shape: tuple[int, ...]) -> NamedSharding:
        spec = next((spec for pattern, spec in PARAM_RULES if re.fullmatch(pattern, leaf)), None)
        if spec is None:
            raise ValueError(
                f"no rule of PARAM_RULES (realgen_jax/sharding.py) matches the parameter {leaf}; add one"
            )
        for size, axes in zip(shape, spec, strict=False):
            sizes = {
                axis: mesh.shape[axis] for axis in ([axes] if isinstance(axes, str) else axes or ())
            }
            if size % math.prod(sizes.values()):
                split = " x ".join(f"{axis}={n}" for axis, n in sizes.items())
                raise ValueError(
                    f"{leaf} {shape} cannot be split: {size} does not divide by mesh axis {split}"
                )
        return NamedSharding(mesh, spec)

    return sharding
