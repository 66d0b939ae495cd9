"""Several processes, one a host, run as one program: how they meet, and how host data goes in and out of their arrays.

With a single process everything here is plain numpy.
"""

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

MEET_SECONDS = 300
HEARTBEAT_SECONDS = 20  # after which a dead process is noticed, and the others end


def connect(coordinator: str, processes: int, process: int, detect: bool) -> None:
    """Meet the other processes; call before anything starts JAX. Every process must be given the same addresses.

    Either `coordinator` (host:port of process 0), the number of processes and this one's number are given, or `detect`
    has jax find all of it in the environment (Slurm, Open MPI, Kubernetes, Cloud TPU). None of it: a single process.
    """
    given = {
        "--coordinator": bool(coordinator),
        "--num_processes": processes > 0,
        "--process_id": process >= 0,
    }
    if not any(given.values()) and not detect:
        return
    if any(given.values()) and not all(given.values()):
        missing = ", ".join(flag for flag, there in given.items() if not there)
        raise ValueError(
            f"{missing} missing: a process of several needs {', '.join(given)}, or --distributed alone"
        )
    explicit = {
        "coordinator_address": coordinator,
        "num_processes": processes,
        "process_id": process,
    }
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    try:
        jax.distributed.initialize(
            **(explicit if all(given.values()) else {}), heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"the processes did not meet ({error}); --distributed works under Slurm, Open MPI, Kubernetes (JobSet) and "
            "on Cloud TPUs, elsewhere give --coordinator=HOST:PORT --num_processes=N --process_id=I"
        ) from error
    # jax's Slurm detection expects a process for every GPU; here one process has all that its host gives it
    jax.config.update("jax_cuda_visible_devices", "all")


def process_index() -> int:
    """This process's number. jax.process_index() would start JAX, before the rewards have taken their memory."""
    return distributed.global_state.process_id or 0


def process_count() -> int:
    return distributed.global_state.num_processes or 1


def tell(key: str, text: str | None) -> str:
    """What process 0 says under this key, in every process; the others give None. Does not start JAX's devices."""
    client = distributed.global_state.client
    if text is not None:
        client.key_value_set(key, text)
    return client.blocking_key_value_get(key, 1000 * MEET_SECONDS)


def coordinator_host() -> str:
    """The machine that process 0 runs on, as the others reach it."""
    return distributed.global_state.coordinator_address.rpartition(":")[0]


def sum_over_processes(values: np.ndarray) -> np.ndarray:
    """The sum of every process's float32 or int32 array; all must call it, with the same shape."""
    return (
        values
        if process_count() == 1
        else np.asarray(multihost_utils.process_allgather(values)).sum(0)
    )


def wait_for_all(name: str, seconds: int = 7 * 24 * 3600) -> None:
    """Wait until every process is here, without the devices (one may be at work for hours), from whatever thread. Each
    name once. Raises RuntimeError in the end.
    """
    if process_count() > 1:
        distributed.global_state.client.wait_at_barrier(name, 1000 * seconds)


def put(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Host data, the same in every process, on the devices. None: the default device."""
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def fetch(array: jax.Array | np.ndarray) -> np.ndarray:
    """A whole array on every host; all processes must call it."""
    if isinstance(array, np.ndarray) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def own_rows(array: jax.Array) -> np.ndarray:
    """The rows (of the first axis) that this process is to handle, int [m]: each row belongs to one process."""
    mine = [shard.index[0] for shard in array.addressable_shards if shard.replica_id == 0]
    return np.array(sorted(i for rows in mine for i in range(*rows.indices(array.shape[0]))), int)
