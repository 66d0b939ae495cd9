"""Serves an ASGI application on 127.0.0.1, in a thread of this process."""

import contextlib
import socket
import threading
from collections.abc import Iterator

from starlette.applications import Starlette

from reward_bridge.server import bind, make_server


@contextlib.contextmanager
def serve_in_thread(app: Starlette, port: int) -> Iterator[socket.socket]:
    """Serve while the block runs; yields the listening socket. Port 0 takes a free one.

    Raises OSError for a port in use.
    """
    listener = bind("127.0.0.1", port, "")
    server = make_server(app, lifespan="off", shutdown=1)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)

    # Requests that arrive before the thread is ready wait in the listener's queue.
    listener.listen()
    thread.start()
    try:
        yield listener
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
