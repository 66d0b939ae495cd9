"""Multi-process runs, usually one process per host: start-up, barriers and host data.

With a single process, everything here is plain numpy.
"""

import contextlib
import logging
import os
from collections.abc import Iterator

import jax
import numpy as np
from absl import logging as absl_logging

# JAX has no public API for the index of this process before the devices start, nor for the
# key-value store and barriers of its coordination service. This is the only private import.
from jax._src import distributed
from jax.experimental import multihost_utils
from jax.experimental.layout import Format

TIMEOUT_SECONDS = 300  # how long to wait for a text from process 0
HEARTBEAT_SECONDS = 20  # a process without a heartbeat for this long is dead and the others end
WEEK_SECONDS = 7 * 24 * 3600


def connect(coordinator: str, processes: int, process: int, detect: bool) -> None:
    """Connect to the other processes of the run. Call it before anything starts JAX.

    Args:
      coordinator: host:port of process 0, the same in every process; "" if not set.
      processes: the number of processes; 0 if not set.
      process: the index of this process, from 0; -1 if not set.
      detect: let JAX find all three in the environment (Slurm, Open MPI, Kubernetes, Cloud TPU).

    If none of them is set, this is a single process and nothing happens. Raises ValueError if only
    some of them are set, or if the processes cannot connect.
    """
    is_set = {
        "--coordinator": bool(coordinator),
        "--num_processes": processes > 0,
        "--process_id": process >= 0,
    }
    if not any(is_set.values()) and not detect:
        return
    if any(is_set.values()) and not all(is_set.values()):
        missing = ", ".join(flag for flag in is_set if not is_set[flag])
        raise ValueError(
            f"{missing} missing: set all of {', '.join(is_set)}, or only --distributed"
        )

    address = {}
    if all(is_set.values()):
        address = {
            "coordinator_address": coordinator,
            "num_processes": processes,
            "process_id": process,
        }

    # JAX's preemption service would install its own handler for SIGTERM.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        with _without_proxies():
            jax.distributed.initialize(**address, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"the processes could not connect ({error}); --distributed works under Slurm, Open "
            "MPI, Kubernetes (JobSet) and on Cloud TPUs, elsewhere set --coordinator=HOST:PORT "
            "--num_processes=N --process_id=I"
        ) from error

    # JAX's Slurm detection expects one process per GPU; here a process has all GPUs of its host.
    jax.config.update("jax_cuda_visible_devices", "all")


@contextlib.contextmanager
def _without_proxies() -> Iterator[None]:
    """Take the proxies out of the environment: gRPC would look for the coordinator behind them."""
    proxies = {name: os.environ[name] for name in os.environ if name.lower().endswith("_proxy")}
    for name in proxies:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(proxies)


def process_index() -> int:
    """Return the index of this process.

    Unlike jax.process_index(), this does not start the devices: the rewards must allocate their
    device memory before JAX.
    """
    return distributed.global_state.process_id


def process_count() -> int:
    """Return the number of processes, without starting the devices."""
    return distributed.global_state.num_processes


def coordinator_host() -> str:
    """Return the address at which the other processes reach the host of process 0."""
    return distributed.global_state.coordinator_address.rpartition(":")[0]


def broadcast_text(key: str, text: str | None) -> str:
    """Return process 0's text in every process, without starting the devices.

    Process 0 passes the text; the others pass None. Each key can be used once.
    """
    client = distributed.global_state.client
    if text is not None:
        client.key_value_set(key, text)
    return client.blocking_key_value_get(key, 1000 * TIMEOUT_SECONDS)


def wait_for_all(name: str, seconds: int = WEEK_SECONDS) -> None:
    """Wait until every process has called this with the same name. Each name can be used once.

    The barrier does not involve the devices, which may be busy for hours, and works in any thread.
    Raises RuntimeError after `seconds`.
    """
    if process_count() > 1:
        distributed.global_state.client.wait_at_barrier(name, 1000 * seconds)


def start_devices() -> list[jax.Device]:
    """Start JAX, which claims its share of the devices' memory, and return all devices.

    Raises ValueError if JAX_PLATFORMS asks for devices that this machine does not have. If JAX goes
    on without a kind of device that is broken, a warning says why.
    """
    # JAX logs what a plugin raises, with its traceback, and goes on without it.
    problems = []

    def keep(record: logging.LogRecord) -> bool:
        if record.exc_info:
            problems.append(str(record.exc_info[1]))
        return not record.exc_info

    logger = logging.getLogger("jax._src.xla_bridge")
    logger.addFilter(keep)
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:
        # Without a GPU, "cuda" fails an assertion that has no text.
        reason = "; ".join(problems) or str(error).partition("\n")[0] or "no such device"
        platforms = jax.config.jax_platforms or ""
        raise ValueError(
            f"JAX cannot start, JAX_PLATFORMS={platforms}: {reason} (unset the variable to take "
            "what this machine has)"
        ) from error
    finally:
        logger.removeFilter(keep)
    for problem in problems:
        absl_logging.warning("JAX goes on without a kind of device: %s", problem)
    return devices


def hide_gpus(visible: str) -> None:
    """Let JAX see only these GPUs ("0,1,2"). Call it before JAX starts."""
    jax.config.update("jax_cuda_visible_devices", visible)


def sum_over_processes(values: np.ndarray) -> np.ndarray:
    """Sum a float32 or int32 array over the processes. All must call it, with the same shape."""
    if process_count() == 1:
        return values
    return np.asarray(multihost_utils.process_allgather(values)).sum(0)


def put(array: np.ndarray, where: jax.sharding.Sharding | Format | None) -> jax.Array:
    """Put host data, the same in every process, on the devices (None: the default device)."""
    sharding = where.sharding if isinstance(where, Format) else where
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(array, where)
    return jax.make_array_from_callback(array.shape, where, lambda index: array[index])


def fetch(array: jax.Array | np.ndarray) -> np.ndarray:
    """Return a whole array as numpy on every host. All processes must call it."""
    if isinstance(array, np.ndarray) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def local_rows(array: jax.Array) -> np.ndarray:
    """Return the rows (of the first axis) that this process handles: int [m], sorted.

    Every row belongs to exactly one process, even if several devices hold copies of it.
    """
    rows = []
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            rows.extend(range(*shard.index[0].indices(array.shape[0])))
    return np.array(sorted(rows), int)
