"""What a cluster does to a program: it starts several processes, and takes them away again with SIGTERM."""

import os
import signal
import threading

import numpy as np
from absl import flags

from realgen_jax.hosts import connect, sum_over_processes

flags.DEFINE_string("coordinator", "", "of several processes: host:port of process 0")
flags.DEFINE_integer("num_processes", 0, "of several processes: how many")
flags.DEFINE_integer("process_id", -1, "of several processes: which one this is, from 0")
flags.DEFINE_bool(
    "distributed",
    False,
    "several processes, as the environment says: Slurm, Open MPI, Kubernetes, TPU",
)


def connect_by_flags() -> None:
    """Meet the other processes, where the flags say that there are some; call before anything starts JAX."""
    given = flags.FLAGS
    connect(given.coordinator, given.num_processes, given.process_id, given.distributed)


class Preemption:
    """Notices SIGTERM at once, also while Python waits for a device. The loop asks `wanted` where it could stop, saves
    and ends. A loop that does not get there within `grace` seconds is ended with status 0 all the same: then the newest
    checkpoint on the disk is what remains.
    """

    def __init__(self, grace: float):
        self._grace, self._asked, self._reached = grace, threading.Event(), threading.Event()
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.signal(
            signal.SIGTERM, lambda *_: None
        )  # the byte that Python's handler writes is what tells
        signal.set_wakeup_fd(write)
        threading.Thread(target=self._watch, args=(read,), name="preemption", daemon=True).start()

    def _watch(self, read: int) -> None:
        while os.read(read, 1)[0] != signal.SIGTERM:
            pass
        self._asked.set()
        if not self._reached.wait(self._grace):
            text = f"stopped {self._grace:g} s after SIGTERM, before what it was at was over; --resume repeats that\n"
            os.write(1, text.encode())  # the main thread may hold the locks of sys.stdout
            os._exit(0)

    def wanted(self) -> bool:
        """Whether this process was asked to end."""
        return self._asked.is_set()

    def wanted_anywhere(self) -> bool:
        """Whether any process was; all must ask at the same point."""
        return bool(sum_over_processes(np.int32([self.wanted()]))[0])

    def reached(self) -> None:
        """The loop is through: what it still has to write is not cut off, however long the scheduler waits."""
        self._reached.set()
