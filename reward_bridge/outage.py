"""Tells once that a server is away, and once that it is back."""

import functools
import logging
import threading
import time

PATIENCE = 5.0  # seconds until it is said of a server that it is busy, or away again
CALM = 60.0  # seconds after its return; what fails in them may come and go


class Outage:
    """Whether a server answers. Threads, rewards and calls share it, so that each line comes once.

    server: what the lines call it.
    """

    def __init__(self, server: str):
        self.server = server
        self._lock = threading.Lock()
        self._since: float | None = None  # the first failure after the last answer; time.monotonic
        self._back = -CALM
        self._told = False

    def failed(self, reason: str, then: str, *, at_once: bool) -> None:
        """Note a failed request, and warn of the first one.

        then: what happens next. at_once: False if the server may only be busy; then it must have
        failed for PATIENCE seconds. So must a server that has only just come back.
        """
        now = time.monotonic()
        with self._lock:
            if self._since is None:
                self._since = now
            at_once = at_once and now - self._back >= CALM
            if self._told or not (at_once or now - self._since >= PATIENCE):
                return
            self._told = True
        logging.getLogger(__name__).warning("lost %s: %s; %s", self.server, reason, then)

    def answered(self) -> None:
        """Note an answer; if the server was told to be away, say that it is back."""
        now = time.monotonic()
        with self._lock:
            told = self._told
            since = self._since
            self._told = False
            self._since = None
            if told:
                self._back = now
        if told:
            logging.getLogger(__name__).info("%s is back after %.0f s", self.server, now - since)


@functools.cache
def outage_of(server: str) -> Outage:
    """The Outage of a server in this process, which all of its clients share."""
    return Outage(server)
