"""Threads that run jobs one after another, and what waits for their answers."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from reward_bridge.reward import RewardError


@dataclass(frozen=True)
class Running:
    """What a worker is running, with a deadline."""

    name: str
    end: float  # its deadline, in time.monotonic()
    complaint: str  # what to report if it misses the deadline


class Answer:
    """The outcome of one job: a result, an error, or None while the job is not done.

    This is not a Future, because an interrupt can leave a Future's lock held, and the next caller
    then waits forever. Here the calling thread only takes locks inside SimpleQueue, whose
    operations an interrupt cannot split.
    """

    def __init__(self, done: queue.SimpleQueue):
        self.outcome: Any = None
        self._done = done

    def set(self, outcome: Any) -> None:
        self.outcome = outcome
        self._done.put(None)


class Worker:
    """A thread that runs jobs one after another."""

    def __init__(self, name: str):
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self._running: Running | None = None

        # A daemon thread: a job that hangs must not keep the process alive.
        self.thread = threading.Thread(target=self._work, name=name, daemon=True)
        self.thread.start()

    # -- Called from other threads

    def put(self, job: Callable[[], Any], answer: Answer) -> None:
        """Queue a job; its result or error goes to `answer`."""
        self._jobs.put((job, answer))

    def overdue(self) -> str | None:
        """The name of what is running if it is past its deadline."""
        running = self._running
        if running is None or time.monotonic() <= running.end:
            return None
        return running.name

    def raise_if_overdue(self) -> None:
        """Raise RewardError if what is running is past its deadline."""
        running = self._running
        if running is not None and self.overdue():
            raise RewardError(
                f"{running.complaint}; its device may be busy, or the deadline too short for this "
                "batch"
            )

    def stop(self, reason: str) -> None:
        """Drop the queued jobs, with this error, and end the thread after the current one."""
        with contextlib.suppress(queue.Empty):
            while True:
                queued = self._jobs.get_nowait()
                if queued is None:
                    continue
                _, answer = queued
                if answer.outcome is None:
                    answer.set(RewardError(reason))
        self._jobs.put(None)

    # -- The thread itself

    def begin(self, name: str, seconds: float, complaint: str) -> None:
        """Set the deadline of what the current job runs next."""
        self._running = Running(name, time.monotonic() + seconds, complaint)

    def retry(self, name: str, attempt: Callable[[], Any], retries: int) -> Any:
        """Return what `attempt` returns; repeat it if it raises, but not after the deadline.

        Raises RewardError, which names what failed, after `retries` further attempts. A RewardError
        is raised at once.
        """
        for number in range(1, retries + 2):
            try:
                return attempt()
            except RewardError:
                raise
            except (Exception, SystemExit) as error:  # it must not end the run silently
                if number > retries or self.overdue():
                    raise RewardError(
                        f"{name} failed {number} times; the last error: {error!r}"
                    ) from error
        raise AssertionError("the last attempt returns or raises")

    def _work(self) -> None:
        while (queued := self._jobs.get()) is not None:
            job, answer = queued
            if answer.outcome is not None:  # the caller has given up on it
                continue
            try:
                answer.set(job())
            except BaseException as error:  # raised again in the thread that waits for the answer
                answer.set(error)
            self._running = None
            del queued, job, answer  # an idle thread must not keep a batch in memory


class Pending:
    """Waits for the answers of several workers. `done` receives one item per answer."""

    def __init__(self, answers: Mapping[Worker, Answer], done: queue.SimpleQueue):
        self._answers = answers
        self._done = done

    def raise_if_failed(self) -> None:
        """Raise the error that `result` would raise, without waiting."""
        for worker, answer in self._answers.items():
            outcome = answer.outcome
            if isinstance(outcome, BaseException):
                raise outcome
            if outcome is None:
                worker.raise_if_overdue()

    def _outcomes(self) -> list[Any]:
        """Wait for all workers. If one fails, the batch's queued jobs are dropped."""
        answers = self._answers.values()
        try:
            waiting = True
            while waiting:
                # In this order, an error set between the two lines is seen in the next iteration.
                waiting = any(answer.outcome is None for answer in answers)
                self.raise_if_failed()
                if waiting:
                    with contextlib.suppress(queue.Empty):
                        self._done.get(timeout=0.05)
        except BaseException:
            for answer in answers:
                if answer.outcome is None:
                    answer.set(RewardError("this batch was dropped: its caller stopped waiting"))
            raise
        return [answer.outcome for answer in answers]
