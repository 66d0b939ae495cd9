"""What the rewards' threads say in the terminal."""

import contextlib
import logging

PACKAGE = __name__.partition(".")[0]


class _Lines(logging.Handler):
    """Prints a record as a line, to whatever sys.stdout is then: also above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        # One write, so that lines of several threads are not mixed. A terminal that is gone must
        # not look like a failure of the reward.
        with contextlib.suppress(OSError):
            print(f"{prefix}{record.getMessage()}\n", end="", flush=True)


def show_messages() -> None:
    """Print what this package logs, from level INFO on. Programs call this once, at their start."""
    logger = logging.getLogger(PACKAGE)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = [_Lines()]
