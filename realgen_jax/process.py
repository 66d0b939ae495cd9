"""The process of a program: its signals, its output, its child processes and its end.

Every program of scripts/ calls `begin` before the imports that take seconds. From then on Ctrl-C
ends it with one line and no traceback, whatever it is doing. KeyboardInterrupt cannot promise that:
it waits for the main thread, which may be in a library, and JAX's callbacks swallow it.
"""

import contextlib
import ctypes.util
import errno
import importlib.util
import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

COMMAND = "realgen-"  # the beginning of the installed commands' names
SHOW_CURSOR = "\x1b[?25h"  # progress bars hide it

Action = Callable[[int], None]  # takes the signal's number

_actions: dict[int, Action] = {}
_cleanups: list[Callable[[], Any]] = []
_leaving = threading.Lock()
_sender: socket.socket | None = None  # the wake-up descriptor must stay open
_message: Callable[[], str] | None = None  # what `stop` prints, instead of "stopped"


def begin(module: str) -> None:
    """Prepare the process of a program; `module` is its __name__.

    Ctrl-C, SIGHUP and a closed standard output end the program at once (`stop`). Lines reach a file
    or a pipe as they are printed. A missing optional package is one line that names its extra. In a
    module that another program imports, nothing happens.
    """
    if module != "__main__" and not Path(sys.argv[0]).name.startswith(COMMAND):
        return
    if _only_compiles_for_cuda():
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        on_signal(number, stop)
    sys.stdout = _guarded(sys.stdout)
    sys.stderr = _guarded(sys.stderr)
    sys.excepthook = _show_error


def _only_compiles_for_cuda() -> bool:
    """Return whether JAX's CUDA plugin is here without cuDNN, which it needs to run anything.

    The extra aot-cuda installs as much. JAX would print a traceback and use the CPU.
    """
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        return False
    in_python = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.cudnn")
    return not in_python and ctypes.util.find_library("cudnn") is None


# -- Signals


def on_signal(number: int, action: Action) -> None:
    """Run `action` in a thread when the process receives a signal. Call it in the main thread.

    A signal that is ignored when the program starts (nohup) stays ignored. While another library
    has a handler of its own installed, the signal is that library's. SIGPIPE stands for the loss of
    standard output.
    """
    _actions[number] = action
    if signal.getsignal(number) is not signal.SIG_IGN:
        _listen()
        signal.signal(number, _heard)


def _heard(*_: Any) -> None:
    """The handler of these signals has nothing to do: the thread has heard them already."""


def _listen() -> None:
    """Start the thread that receives the signals, once.

    Python runs a signal handler only between instructions of the main thread, which may be loading
    weights or waiting for a device. The wake-up descriptor receives the signal's number at once.
    """
    global _sender
    if _sender is not None:
        return
    receiver, _sender = socket.socketpair()
    _sender.setblocking(False)
    signal.set_wakeup_fd(_sender.fileno(), warn_on_full_buffer=False)

    def act() -> None:
        while True:
            number = receiver.recv(1)[0]
            if signal.getsignal(number) is _heard:
                _actions[number](number)

    threading.Thread(target=act, name="signals", daemon=True).start()


# -- The end


def stop(number: int) -> NoReturn:
    """End the program at once because of a signal, with the shell's exit status for it."""
    message = "" if number == signal.SIGPIPE else "stopped"
    if message and _message is not None:
        message = _message()
    leave(message, 128 + number)


def when_stopped(message: Callable[[], str]) -> None:
    """Set what `stop` prints: what is kept, and how to go on."""
    global _message
    _message = message


def leave(message: str, status: int) -> NoReturn:
    """End the program at once, from any thread and whatever its main thread is doing.

    The message goes to standard output if the status is 0, and to standard error otherwise.
    """
    _leaving.acquire()  # for good: a second caller waits for the end
    for cleanup in reversed(_cleanups):
        with contextlib.suppress(Exception):
            cleanup()
    if os.isatty(1):
        write_line(1, SHOW_CURSOR)
    if message:
        write_line(2 if status else 1, message)
    os._exit(status)


def write_line(descriptor: int, text: str) -> None:
    """Write a line past sys.stdout, whose lock another thread may hold. A failure is ignored."""
    with contextlib.suppress(OSError):
        os.write(descriptor, f"{text}\n".encode())


@contextlib.contextmanager
def cleaned_up(cleanup: Callable[[], Any]) -> Iterator[None]:
    """Call `cleanup` if `leave` ends the program while the block runs."""
    _cleanups.append(cleanup)
    try:
        yield
    finally:
        _cleanups.remove(cleanup)


def run_child(command: Sequence[str]) -> int:
    """Run another program to its end and return its exit status. It ends with this program.

    In a process group of its own, it does not receive the terminal's Ctrl-C.
    """
    with subprocess.Popen(command, process_group=0) as child, cleaned_up(child.terminate):
        return child.wait()


# -- Output


class _Guard(io.FileIO):
    """Standard output or error. It may be lost at any time: `| head` ends, the terminal closes.

    What is printed after that goes nowhere, and no print fails.
    """

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            descriptor = self.fileno()
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), descriptor)
            if descriptor == 1:
                _output_lost(error)
            return len(data)


def _guarded(stream: Any) -> Any:
    """Return a stream like sys.stdout that writes each line at once, through `_Guard`."""
    if stream is None:  # it was closed before the program started
        return None
    raw = _Guard(stream.fileno(), "w", closefd=False)
    buffer = io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, stream.encoding, stream.errors, line_buffering=True)


def _output_lost(error: OSError) -> None:
    """End the program as a hang-up would. If SIGHUP is ignored (nohup), it goes on silently."""
    if error.errno not in (errno.EPIPE, errno.EIO):  # EIO: the terminal is gone
        write_line(2, f"error: standard output cannot be written: {error.strerror}")
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        _actions[signal.SIGPIPE](signal.SIGPIPE)


# -- Missing packages


def _show_error(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Print one line about a package that this project installs, else the traceback."""
    install = _installation_of(error.name or "") if isinstance(error, ImportError) else ""
    if install:
        print(f"error: {error}; {install} installs it", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def _installation_of(module: str) -> str:
    """Return the command that installs a module's package, by the names in pyproject.toml."""
    from importlib import metadata  # slow to import, and only needed here

    package = module.partition(".")[0]
    with contextlib.suppress(metadata.PackageNotFoundError):
        for requirement in metadata.requires("realgen_jax") or ():
            name = re.match(r"[\w.-]+", requirement)[0]
            extra = re.search(r"extra == .(\w+)", requirement)
            if name == package:
                extras = f"[{extra[1]}]" if extra else ""
                return f'pip install "realgen_jax{extras}"'
    return ""
