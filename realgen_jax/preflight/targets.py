"""Accelerators to compile for on a machine that has none of them.

XLA's compilers for NVIDIA GPUs and TPUs run on a CPU. The compiler for GPUs asks for the numbers of
a card (XLA's GpuTargetConfigProto); the one for TPUs knows its chips.
"""

import importlib.util
import math
import os
from dataclasses import dataclass, replace

import jax
from jax.experimental import topologies

CUDA_PACKAGES = ("jax_cuda13_plugin", "jax_plugins.xla_cuda13", "nvidia.cu13")
TPU_PACKAGES = ("libtpu",)
GPUS_OF_A_HOST = 8
CUDNN = 91000  # version 9.10.0


@dataclass(frozen=True)
class Card:
    """What XLA asks of an NVIDIA GPU, sizes in bytes, and its dense bfloat16 TFLOP/s."""

    name: str
    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    core_memory: int  # shared memory of a core
    core_threads: int
    lanes: int  # float32 units of a core
    l2: int
    ghz: float
    bandwidth: int  # bytes a second
    memory: int
    tflops: float
    links: int = 0  # NVLink


# The numbers of A100, H100, H200 and B200 are those of XLA's own specifications
# (xla/backends/gpu/target_config/specs). Those of RTX 4090 and L40S are from NVIDIA's Ada GPU
# architecture whitepaper, the L40S data sheet, and the CUDA programming guide's table of compute
# capability 8.9. FLOP/s are those of the data sheets.
_RTX4090 = Card(
    name="NVIDIA GeForce RTX 4090",
    capability=(8, 9),
    cores=128,
    core_memory=102400,
    core_threads=1536,
    lanes=128,
    l2=75497472,
    ghz=2.52,
    bandwidth=1008 * 10**9,
    memory=25757220864,
    tflops=165,
)
_A100 = Card(
    name="NVIDIA A100-SXM4-80GB",
    capability=(8, 0),
    cores=108,
    core_memory=167936,
    core_threads=2048,
    lanes=64,
    l2=41943040,
    ghz=1.41,
    bandwidth=2039040000000,
    memory=85100068864,
    tflops=312,
    links=12,
)
_H100 = Card(
    name="NVIDIA H100 80GB HBM3",
    capability=(9, 0),
    cores=132,
    core_memory=233472,
    core_threads=2048,
    lanes=128,
    l2=52428800,
    ghz=1.98,
    bandwidth=3352320000000,
    memory=84942979072,
    tflops=989,
    links=18,
)
CARDS = {
    "rtx4090": _RTX4090,
    "l40s": replace(
        _RTX4090,
        name="NVIDIA L40S",
        cores=142,
        l2=100663296,
        bandwidth=864 * 10**9,
        memory=48305799168,
        tflops=362,
    ),
    "a100-40gb": replace(
        _A100, name="NVIDIA A100-SXM4-40GB", bandwidth=1555200000000, memory=42331013120
    ),
    "a100-80gb": _A100,
    "h100": _H100,
    "h200": replace(_H100, name="NVIDIA H200", bandwidth=4800000000000, memory=151397597184),
    "b200": replace(
        _H100,
        name="NVIDIA B200",
        capability=(10, 0),
        cores=148,
        l2=132644864,
        ghz=1.965,
        bandwidth=7672320000000,
        memory=191514411008,
        tflops=2250,
    ),
}

# Chips of a slice by their number, in the syntax of the TPU's topologies.
FLAT_SLICES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8"}
SLICES = {
    "v5e": FLAT_SLICES,
    "v5p": {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4"},
    "v6e": FLAT_SLICES,
}

TARGETS = (*CARDS, *SLICES)


def target_devices(target: str, count: int) -> list[jax.Device]:
    """Return `count` devices of a kind to compile for; nothing can run on them.

    target: one of TARGETS; a TPU may have a topology, as in "v5p:2x2x1". Raises ValueError for
    another name, a missing package, and a topology of another number of chips.
    """
    name, _, topology = target.partition(":")
    if name in CARDS and not topology:
        return _gpus(CARDS[name], count)
    if name in SLICES:
        return _chips(name, topology, count)
    raise ValueError(
        f"--compile_for is {target!r}; choose from {', '.join(TARGETS)}; a TPU may have a "
        "topology, such as v5p:2x2x1"
    )


def _gpus(card: Card, count: int) -> list[jax.Device]:
    """NVIDIA GPUs, up to eight to a host: 14 are 7 on each of two."""
    _check_packages("aot-cuda", CUDA_PACKAGES)
    hosts = math.ceil(count / GPUS_OF_A_HOST)
    if count % hosts:
        raise ValueError(
            f"--compile_for needs as many GPUs on each host, but the mesh has {count} on {hosts}"
        )
    _stand_in_for_cudnn()
    description = topologies.get_topology_desc(
        platform="cuda",
        topology_name=card.name,
        target_config=_target_config(card),
        topology=f"1x{hosts}x{count // hosts}",
    )
    return list(description.devices)


def _target_config(card: Card) -> str:
    """The card as XLA's GpuTargetConfigProto, in protobuf's text format."""
    major, minor = card.capability
    features = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32
  shared_memory_per_block: 49152  shared_memory_per_core: {card.core_memory}
  shared_memory_per_block_optin: {card.core_memory - 1024}
  threads_per_core_limit: {card.core_threads}  core_count: {card.cores}
  fpus_per_core: {card.lanes}
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  memory_bandwidth: {card.bandwidth}  l2_cache_size: {card.l2}  clock_rate_ghz: {card.ghz}
  device_memory_size: {card.memory}  device_address_bits: 64  pcie_bandwidth: 34359738368
  cuda_compute_capability {{ major: {major} minor: {minor} {features} }}
  device_vendor: "NVIDIA Corporation"  name: "{card.name}"  ecc_enabled: true
  driver_version: "13.0.0"  runtime_version: "13.0.0"  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"  device_interconnect_info {{ active_links: {card.links} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{card.name}"
"""


def _stand_in_for_cudnn() -> None:
    """Let jax trace cuDNN's attention where cuDNN is not installed.

    jax asks for the library's version during tracing; the compiler does not need the library.
    """
    from jax._src.cudnn import fused_attention_stablehlo

    try:
        fused_attention_stablehlo.check_cudnn_version()
    except RuntimeError:
        fused_attention_stablehlo.check_cudnn_version = lambda: CUDNN


def _chips(name: str, topology: str, count: int) -> list[jax.Device]:
    """Chips of a TPU slice."""
    slices = SLICES[name]
    topology = topology or slices.get(count, "")
    if not topology:
        raise ValueError(
            f"--compile_for={name}: no slice has {count} chips; choose a mesh of "
            f"{', '.join(map(str, slices))} or name a topology, such as {name}:{slices[4]}"
        )
    _check_packages("aot-tpu", TPU_PACKAGES)

    # libtpu otherwise asks a metadata server what it runs on, warns, and locks a file.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    single = {"chips_per_host_bounds": (1, 1, 1)} if topology == "1x1" else {}
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{name}:{topology}", **single
        )
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--compile_for={name}:{topology}: {reason}") from None
    devices = list(description.devices)
    if len(devices) != count:
        raise ValueError(
            f"--compile_for={name}:{topology} has {len(devices)} chips, but the mesh has {count}"
        )
    return devices


def _check_packages(extra: str, modules: tuple[str, ...]) -> None:
    """Raise ValueError that names the extra if a compiler's package is missing."""
    for module in modules:
        try:
            missing = importlib.util.find_spec(module) is None
        except ModuleNotFoundError:
            missing = True
        if missing:
            raise ValueError(
                f"the compiler for this target needs the package {module}; install it with "
                f"pip install 'realgen_jax[{extra}]'"
            )
