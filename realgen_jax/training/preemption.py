"""Running under a cluster scheduler: start-up with several processes, and the end by SIGTERM."""

import os
import signal
import socket
import threading

import numpy as np
from absl import flags

from realgen_jax.hosts import connect, sum_over_processes

flags.DEFINE_string("coordinator", "", "with several processes: host:port of process 0")
flags.DEFINE_integer("num_processes", 0, "with several processes: their number")
flags.DEFINE_integer("process_id", -1, "with several processes: the number of this one, from 0")
flags.DEFINE_bool(
    "distributed",
    False,
    "with several processes: find the above in the environment (Slurm, Open MPI, Kubernetes, TPU)",
)


def connect_by_flags() -> None:
    """Connect to the other processes according to the flags. Call it before JAX starts."""
    values = flags.FLAGS
    connect(values.coordinator, values.num_processes, values.process_id, values.distributed)


class Preemption:
    """Catches SIGTERM, after which the run has `grace` seconds to reach a point where it can save.

    The training loop checks `wanted` at each such point, and calls `reached` before it saves and
    ends. If it does not get there in time, the process exits with status 0, and the newest
    checkpoint on disk is the last one.
    """

    def __init__(self, grace: float):
        self._grace = grace
        self._signalled = threading.Event()
        self._reached = threading.Event()

        # Python runs a signal handler only between instructions of the main thread, which may be
        # waiting for a device. The wake-up descriptor receives the signal's number at once, so a
        # thread that reads it sees SIGTERM in time; the handler itself has nothing to do.
        receiver, sender = socket.socketpair()
        sender.setblocking(False)
        self._sender = sender  # the descriptor must stay open
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.set_wakeup_fd(sender.fileno())

        thread = threading.Thread(
            target=self._watch, args=(receiver,), name="preemption", daemon=True
        )
        thread.start()

    def _watch(self, receiver: socket.socket) -> None:
        while receiver.recv(1)[0] != signal.SIGTERM:
            pass
        self._signalled.set()

        if not self._reached.wait(self._grace):
            message = (
                f"stopped {self._grace:g} s after SIGTERM, before the current phase finished; "
                "--resume will repeat it\n"
            )
            os.write(1, message.encode())  # the main thread may hold the lock of sys.stdout
            os._exit(0)

    def wanted(self) -> bool:
        """Whether this process has received SIGTERM."""
        return self._signalled.is_set()

    def wanted_anywhere(self) -> bool:
        """Whether any process has received SIGTERM. All processes must ask at the same point."""
        return bool(sum_over_processes(np.int32([self.wanted()]))[0])

    def reached(self) -> None:
        """Lift the time limit: the loop has stopped, and its last writes must not be cut off."""
        self._reached.set()
