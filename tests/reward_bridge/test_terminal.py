"""What the rewards' threads say: lines in the terminal, also above a progress bar."""

import contextlib
import io
import logging
import os
import threading

import pytest
from rich.console import Console
from rich.live import Live

from reward_bridge.outage import CALM, PATIENCE, Outage
from reward_bridge.terminal import show_messages
from tests.helpers.faults import closed_pipe


@pytest.fixture
def messages():
    """Show messages for the time of a test."""
    logger = logging.getLogger("reward_bridge")
    before = logger.level, logger.propagate, logger.handlers
    show_messages()
    yield logger
    logger.setLevel(before[0])
    logger.propagate = before[1]
    logger.handlers = before[2]


def test_warnings_are_marked_and_other_lines_are_not(messages, capsys):
    logging.getLogger("reward_bridge.client").warning("lost %s", "a [server]")
    logging.getLogger("reward_bridge.client").info("back")
    logging.getLogger("reward_bridge.client").debug("nothing")
    assert capsys.readouterr().out == "warning: lost a [server]\nback\n"


def test_a_terminal_that_is_gone_ends_no_reward(messages, monkeypatch):
    with closed_pipe() as pipe, os.fdopen(os.dup(pipe), "w") as output:
        monkeypatch.setattr("sys.stdout", output)
        messages.warning("lost a server")
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            output.close()


def test_a_line_of_another_thread_comes_above_the_progress_bar(messages):
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=200, _environ={"TERM": "xterm"})
    with Live("the bar", console=console, auto_refresh=False) as live:
        thread = threading.Thread(target=messages.warning, args=("lost a server",))
        thread.start()
        thread.join()
        live.refresh()
    text = terminal.getvalue()
    assert text.index("warning: lost a server\n") < text.rindex("the bar")


def test_a_server_that_comes_and_goes_is_not_told_each_time(monkeypatch, caplog):
    clock = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: clock)
    caplog.set_level(logging.INFO)
    outage = Outage("a server")
    outage.failed("why", "what next", at_once=True)
    clock += 7
    outage.answered()
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["lost a server: why; what next", "a server is back after 7 s"]
    for _ in range(3):
        outage.failed("why", "what next", at_once=True)
        outage.answered()
    assert len(caplog.records) == 2

    # It stays away, or it fails again much later.
    outage.failed("why", "what next", at_once=True)
    clock += PATIENCE
    outage.failed("why", "what next", at_once=True)
    outage.answered()
    clock += CALM
    outage.failed("why", "what next", at_once=True)
    assert len(caplog.records) == 5
