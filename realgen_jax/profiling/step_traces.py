"""Write profiler traces of chosen epochs (`config.profile.steps`); time an epoch's phases."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from realgen_jax.hosts import process_index
from realgen_jax.training.log import NoLog, RunLog

STEP = "epoch"  # the name of a step in its trace


class StepTraces:
    """Context manager that writes FOLDER/profile/step_N while epoch N runs, for every N in `steps`.

    Epochs are counted from 1. Every process traces its own devices. An open trace is closed
    however the run ends.
    """

    def __init__(self, folder: Path, steps: Sequence[int], log: RunLog | NoLog):
        self._folder = folder / "profile"
        self._steps = steps
        self._log = log
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "StepTraces":
        return self

    def __exit__(self, *error) -> None:
        self._open.close()

    def begin(self, step: int) -> None:
        """End the previous epoch's trace, if any, and start one for this epoch if it is wanted."""
        self._open.close()
        if step not in self._steps:
            return

        folder = self._folder / f"step_{step}"
        folder.mkdir(parents=True, exist_ok=True)

        options = jax.profiler.ProfileOptions()
        # Recording every Python function call would slow the program down.
        options.python_tracer_level = 0
        # Trace files are named by host, and several processes may share a host.
        options.session_id = f"process_{process_index()}"

        # Closed in reverse order: the message comes once the trace is complete.
        self._open.callback(self._log.say, f"trace: python scripts/profile_summary.py {folder}")
        self._open.enter_context(jax.profiler.trace(folder, profiler_options=options))
        self._open.enter_context(jax.profiler.StepTraceAnnotation(STEP, step_num=step))


@contextlib.contextmanager
def phase(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Mark a phase of an epoch in the trace and store its duration in `seconds[name]`."""
    start = time.perf_counter()
    with jax.profiler.TraceAnnotation(name):
        yield
    seconds[name] = time.perf_counter() - start
