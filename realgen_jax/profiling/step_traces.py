"""Traces of chosen epochs (`config.profile.steps`), for profile_summary.py and xprof; and the phases of an epoch."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from realgen_jax.hosts import process_index
from realgen_jax.training.log import NoLog, RunLog

STEP = "epoch"  # the name of a step in its trace


class StepTraces:
    """Writes FOLDER/profile/step_N while the Nth epoch runs, for the N in `steps`, counted from 1.

    Every process traces its own devices. Whatever ends the run closes a trace that is open.
    """

    def __init__(self, folder: Path, steps: Sequence[int], log: RunLog | NoLog):
        self._folder, self._steps, self._log = folder / "profile", steps, log
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "StepTraces":
        return self

    def __exit__(self, *error) -> None:
        self._open.close()

    def begin(self, step: int) -> None:
        """An epoch begins, and the one before is over."""
        self._open.close()
        if step in self._steps:
            folder, options = self._folder / f"step_{step}", jax.profiler.ProfileOptions()
            folder.mkdir(parents=True, exist_ok=True)
            options.python_tracer_level = (
                0  # it would record every call of a Python function, and slow them all
            )
            options.session_id = (
                f"process_{process_index()}"  # a file is named by host, which processes may share
            )
            self._open.callback(self._log.say, f"trace: python scripts/profile_summary.py {folder}")
            self._open.enter_context(jax.profiler.trace(folder, profiler_options=options))
            self._open.enter_context(jax.profiler.StepTraceAnnotation(STEP, step_num=step))


@contextlib.contextmanager
def phase(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """A phase of an epoch, in the trace and in seconds[name]."""
    start = time.perf_counter()
    with jax.profiler.TraceAnnotation(name):
        yield
    seconds[name] = time.perf_counter() - start
