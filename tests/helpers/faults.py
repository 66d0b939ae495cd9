"""Faults to inject into a test: one helper for each thing that goes wrong on other machines.

Each is a context manager that puts everything back at its end, except `send_signal`.
"""

import contextlib
import http.server
import os
import resource
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from tests.helpers.running import until

# Nothing listens on the discard port, so that a request through this proxy fails at once.
DEAD_PROXY = "http://127.0.0.1:9"
PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy")


@contextlib.contextmanager
def full_disk(limit: int = 3000) -> Iterator[None]:
    """Let every write beyond `limit` bytes of a file fail with OSError, as on a full disk."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@contextlib.contextmanager
def missing(path: Path) -> Iterator[None]:
    """Take a file or folder away."""
    hidden = path.with_name(path.name + ".hidden")
    path.rename(hidden)
    try:
        yield
    finally:
        hidden.rename(path)


@contextlib.contextmanager
def changed(file: Path) -> Iterator[None]:
    """Change the last byte of a file; its size and its times stay the same."""
    content = file.read_bytes()
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(file, ns=times)
    try:
        yield
    finally:
        file.write_bytes(content)
        os.utime(file, ns=times)


@contextlib.contextmanager
def dead_proxy() -> Iterator[dict[str, str]]:
    """Set a proxy that does not answer, in this process and those it starts; yields the variables.

    NO_PROXY is removed, which would exempt this machine from it.
    """
    variables = dict.fromkeys(PROXY_VARIABLES, DEAD_PROXY)
    with mock.patch.dict(os.environ, variables):
        for name in ("NO_PROXY", "no_proxy"):
            os.environ.pop(name, None)
        yield variables


def send_signal(
    number: signal.Signals,
    process: subprocess.Popen,
    output: Path,
    line: str,
    seconds: float = 240,
) -> None:
    """Send a signal to a process once its output, which goes to a file, contains `line`."""
    until(lambda: line in output.read_text(errors="replace"), process, output, seconds)
    process.send_signal(number)


@contextlib.contextmanager
def closed_pipe() -> Iterator[int]:
    """Yield the write end of a pipe that nobody reads any more, as after `| head` has ended."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        yield writer
    finally:
        os.close(writer)


@contextlib.contextmanager
def lying_server(
    answer: Callable[[str, bytes], tuple[int, dict[str, str], bytes]],
    port: int = 0,
) -> Iterator[str]:
    """Yield the address of a server that answers every request as it likes.

    answer: (path, body) -> (status, headers, body). port: 0 takes a free one.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, headers, content = answer(self.path, body)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST

    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    )
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
