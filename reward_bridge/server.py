"""Serves rewards over HTTP, from another environment or other GPUs than the trainer's.

    GET  /healthz          rewards, their devices, and how many images wait; needs no token
    GET  /rewards/{reward} {"digest": ...} if this client may have the reward scored; else an error,
                           as below. The digest changes with what computes the scores
    POST /score/{reward}   a body as in reward_bridge/wire.py -> {"scores": [...], "digest": ...},
                           one number per image in the images' order, exact in float32

Errors are {"error": "..."} with a status: 400 malformed body, 401 wrong token, 404 unknown reward,
408 the body took too long, 413 too many bytes or images, 500 the reward failed, 503 the queue is
full or the server is stopping (ask again later).
"""

import asyncio
import contextlib
import hmac
import ipaddress
import logging
import socket
from collections.abc import AsyncIterator, Callable, Mapping

import numpy as np
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from reward_bridge.batching import MIB, Batcher, Limits, Memory
from reward_bridge.bridge import RewardBridge
from reward_bridge.reward import RewardError
from reward_bridge.wire import DIGEST, REQUEST_ID, decode

TOKEN_ENV = "REALGEN_REWARD_TOKEN"
CHALLENGE = {"WWW-Authenticate": "Bearer"}


class _Service:
    """The request handlers, and the state that they share."""

    def __init__(
        self,
        bridge: RewardBridge,
        digests: Mapping[str, str],
        limits: Limits,
        token: str,
        closing: Callable[[], bool],
    ):
        self._bridge = bridge
        self._digests = digests
        self._limits = limits
        self._token = token
        self._closing = closing
        self._memory = Memory(int(limits.held_mib * MIB))
        self._batchers = {name: Batcher(name, bridge, limits, closing) for name in bridge.rewards}

    async def score(self, request: Request) -> Response:
        """POST /score/{reward}."""
        self._authorize(request)
        batcher = self._batcher(request.path_params["reward"])
        batcher.check_room(1)

        # Until the body is read, assume the size in its header, or else the largest allowed size.
        limit = int(self._limits.body_mib * MIB)
        size = int(request.headers.get("content-length", 0))
        _check_size(size, limit)
        with self._memory.hold(size or limit):
            body = await _read(request, limit, self._limits.upload)
            images, prompts = await run_in_threadpool(_decode, body, self._limits.images)
            del body
            scores = await _wait_for(batcher.add(images, prompts), request)
        answer = {
            "scores": scores.tolist(),
            DIGEST: self._digests[batcher.name],
            REQUEST_ID: request.headers.get(REQUEST_ID, ""),
        }
        return JSONResponse(answer)

    async def has(self, request: Request) -> Response:
        """GET /rewards/{reward}."""
        self._authorize(request)
        batcher = self._batcher(request.path_params["reward"])
        return JSONResponse({DIGEST: self._digests[batcher.name]})

    async def healthz(self, _: Request) -> Response:
        """GET /healthz."""
        rewards = {}
        for name, batcher in self._batchers.items():
            rewards[name] = {
                "device": self._bridge.devices[name],
                "waiting": batcher.images_waiting,
                "scored": batcher.scored,
            }

        stuck = self._bridge.stuck()
        if self._closing():
            status = "stopping"
        elif stuck:
            status = f"no answer from {', '.join(stuck)}"
        else:
            status = "ok"
        return JSONResponse({"status": status, "rewards": rewards}, 503 if stuck else 200)

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """Run the batchers while the server runs, then close the bridge."""
        batchers = self._batchers.values()
        tasks = [asyncio.create_task(batcher.run()) for batcher in batchers]
        yield

        for batcher in batchers:
            batcher.stop()
        await asyncio.gather(*tasks)
        self._bridge.close()

    def _authorize(self, request: Request) -> None:
        sent = request.headers.get("authorization", "").encode("latin-1")
        expected = f"Bearer {self._token}".encode()
        if self._token and not hmac.compare_digest(sent, expected):
            raise HTTPException(
                401,
                f"wrong or missing bearer token; use the token in the server's {TOKEN_ENV}",
                CHALLENGE,
            )

    def _batcher(self, name: str) -> Batcher:
        if name not in self._batchers:
            raise HTTPException(
                404,
                f"there is no reward {name!r}; this server has {', '.join(sorted(self._batchers))}",
            )
        return self._batchers[name]


def make_app(
    bridge: RewardBridge,
    digests: Mapping[str, str],
    limits: Limits,
    token: str,
    closing: Callable[[], bool] = lambda: False,
) -> Starlette:
    """The ASGI application.

    digests: {reward: its digest}, which tells clients when another one is served.
    token: the bearer token that clients need; empty: none.
    closing: returns whether the server has stopped accepting work.
    """
    service = _Service(bridge, digests, limits, token, closing)
    return Starlette(
        routes=[
            Route("/score/{reward}", service.score, methods=["POST"]),
            Route("/rewards/{reward}", service.has),
            Route("/healthz", service.healthz),
        ],
        exception_handlers={
            HTTPException: _http_error,
            ClientDisconnect: _client_disconnected,
            Exception: _internal_error,
        },
        lifespan=service.lifespan,
    )


def bind(host: str, port: int, token: str) -> socket.socket:
    """A bound socket that does not listen yet, so that clients are refused while rewards load.

    Port 0 takes any free port. Raises ValueError if other machines can reach the address and there
    is no token, OSError if the address is in use.
    """
    if not token and not _is_loopback(host):
        raise ValueError(
            f"{host} can be reached from other machines, so a token is needed; set the environment "
            f"variable {TOKEN_ENV} here and for the clients, or listen on 127.0.0.1"
        )
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another port"
        ) from error
    return listener


def serve(
    bridge: RewardBridge,
    digests: Mapping[str, str],
    listener: socket.socket,
    limits: Limits,
    token: str,
) -> None:
    """Serve until SIGTERM or Ctrl-C. digests: {reward: its digest}.

    The current batch is still finished; waiting requests get 503.
    """
    app = make_app(bridge, digests, limits, token, closing=lambda: server.should_exit)
    server = make_server(app, lifespan="on", shutdown=int(bridge.deadline) + 1)
    server.run(sockets=[listener])


def make_server(app: Starlette, *, lifespan: str, shutdown: int) -> uvicorn.Server:
    """Make a server that logs nothing but warnings and tells nothing about itself.

    lifespan: "on" if the application has start-up and shutdown steps, else "off". shutdown: the
    most seconds that open requests may take after the end.
    """
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan=lifespan,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=shutdown,
    )
    return uvicorn.Server(config)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a host name
        return False


def _check_size(size: int, limit: int) -> None:
    """Raise HTTPException 413 for a body of `size` bytes that exceeds `limit`."""
    if size > limit:
        raise HTTPException(
            413,
            f"the body exceeds this server's limit of {limit / MIB:g} MiB; send fewer images at "
            "once (config.reward.batch_size) or raise the server's limits.body_mib",
        )


async def _read(request: Request, limit: int, seconds: float) -> bytes:
    """The body, within `seconds`. Never keeps more than `limit` bytes, whatever the headers say."""
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                _check_size(len(body) + len(chunk), limit)
                body += chunk
    except TimeoutError:
        raise HTTPException(
            408, f"the body did not arrive within {seconds:g} s (limits.upload)"
        ) from None
    return bytes(body)


def _decode(body: bytes, max_images: int) -> tuple[torch.Tensor, list[str]]:
    """Images and prompts of a body. Raises HTTPException 400 or 413."""
    try:
        images, prompts = decode(body)
    except ValueError as error:
        raise HTTPException(400, str(error)) from None
    if len(images) > max_images:
        raise HTTPException(
            413,
            f"got {len(images)} images; this server accepts {max_images} at once: send fewer "
            "(config.reward.batch_size) or raise the server's limits.images",
        )
    return images, prompts


async def _wait_for(scores: asyncio.Future, request: Request) -> np.ndarray:
    """Wait for the scores, float32 [n], but no longer than the client does."""
    # After the body, the only message left to receive is the disconnect.
    disconnected = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({scores, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if not scores.done():
            raise ClientDisconnect
        return scores.result()
    except RewardError as error:
        logging.getLogger(__name__).warning("%s", error)
        raise HTTPException(500, str(error)) from None
    finally:
        disconnected.cancel()
        scores.cancel()


async def _http_error(_: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)


async def _client_disconnected(_: Request, __: ClientDisconnect) -> Response:
    return Response(status_code=400)  # nobody reads it


async def _internal_error(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": f"internal server error: {type(error).__name__}"}, 500)
