"""Start-up with several processes, and the end by a signal, from a scheduler or a person."""

import signal
import sys
import threading
from collections.abc import Callable

import numpy as np
from absl import flags

from realgen_jax import process
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
    """Lets the training loop save and end when a signal arrives.

    The loop checks `wanted` at each point where it can save, and calls `reached` before it saves
    and ends. SIGTERM is heard from the start; Ctrl-C, SIGHUP and the loss of standard output from
    `hold` on. After SIGTERM or SIGHUP, the run has `grace` seconds to get there. If it does not,
    the process exits with status 0, and the newest checkpoint on disk is the last one. Ctrl-C sets
    no limit, because the person at the terminal can press it again: that ends the run at once.
    """

    def __init__(self, grace: float):
        self._grace = grace
        self._number = 0  # the first signal
        self._reached = threading.Event()
        process.on_signal(signal.SIGTERM, self._hear)

    def hold(self, lost: Callable[[], str]) -> None:
        """From now on the run has something to save, so no signal ends it at once.

        lost: returns what to print when a second Ctrl-C does.
        """
        process.when_stopped(lost)
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
            process.on_signal(number, self._hear)

    def release(self, kept: str) -> None:
        """Everything is saved: from now on a signal ends the program at once, printing `kept`."""
        process.when_stopped(lambda: kept)
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGTERM):
            process.on_signal(number, process.stop)

    def _hear(self, number: int) -> None:
        """Handle a signal, in the thread that receives it."""
        if self._number and number == signal.SIGINT:
            process.stop(number)
        if not self._number:
            self._number = number
            again = "; Ctrl-C again stops it at once" if number == signal.SIGINT else ""
            # A progress bar on the terminal takes what is printed, and shows it above itself.
            print(
                f"{self.name}: the run saves and stops after the current phase{again}",
                file=sys.stderr,
            )
        if number in (signal.SIGTERM, signal.SIGHUP):
            threading.Thread(target=self._limit, args=(number,), daemon=True).start()

    def _limit(self, number: int) -> None:
        if not self._reached.wait(self._grace):
            process.leave(
                f"stopped {self._grace:g} s after {signal.Signals(number).name}, before the "
                "current phase finished; --resume will repeat it",
                0,
            )

    @property
    def name(self) -> str:
        """The name of the signal that ends the run."""
        return signal.Signals(self._number).name

    @property
    def status(self) -> int:
        """The exit status of a run that a signal has ended: 0 if a scheduler sent it."""
        return 0 if self._number in (signal.SIGTERM, signal.SIGHUP) else 128 + self._number

    def wanted(self) -> bool:
        """Whether a signal has asked this process to save and end."""
        return self._number != 0

    def wanted_anywhere(self) -> bool:
        """Whether a signal has asked any process to. All processes must ask at the same point."""
        counts = np.zeros(signal.NSIG, np.int32)
        counts[self._number] = 1
        numbers = np.flatnonzero(sum_over_processes(counts))  # 0: a process without a signal
        self._number = self._number or int(numbers[-1])
        return self.wanted()

    def reached(self) -> None:
        """Lift the time limit: the loop has stopped, and its last writes must not be cut off."""
        self._reached.set()
