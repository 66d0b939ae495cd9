"""Any set of rewards behind HTTP: for environments that conflict with the trainer's, and for GPUs elsewhere.

    GET  /healthz          what is served, where, and how many images wait; needs no token
    POST /score/{reward}   a safetensors body, "images" uint8 [n, 3, h, w], metadata "prompts" a JSON list of n strings
                           -> {"scores": [...]}, n numbers in the order of the images, exact in float32

Errors are {"error": "..."}: 400 the body is not that, 401 wrong token, 404 no such reward, 408 the body took too long,
413 too many bytes or images, 500 the reward failed, 503 too much waits or the server is stopping (ask again later).
"""

import asyncio
import contextlib
import hmac
import ipaddress
import json
import logging
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import uvicorn
from safetensors import SafetensorError
from safetensors.torch import load
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from reward_bridge.bridge import RewardBridge, RewardError

TOKEN_ENV = "REALGEN_REWARD_TOKEN"
CHALLENGE = {"WWW-Authenticate": "Bearer"}
MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """What one server takes on; beyond it, a client gets 413 (its request is too large) or 503 (ask again later)."""

    body_mib: float  # of one request
    held_mib: float  # request bodies that are read, wait or are scored, together
    images: int  # of one request
    waiting: int  # images that wait for one reward
    batch: int  # images of several requests that are scored together
    gather: float  # seconds that a first request waits for others to join it
    upload: float  # seconds that a body may take to arrive

    def __post_init__(self):
        if self.images > self.waiting or self.body_mib > self.held_mib:
            raise ValueError(
                f"no request of {self.images} images, {self.body_mib:g} MiB would ever fit into limits.waiting="
                f"{self.waiting}, limits.held_mib={self.held_mib:g}; raise these"
            )


def make_app(
    bridge: RewardBridge, limits: Limits, token: str, closing: Callable[[], bool] = lambda: False
) -> Starlette:
    """The ASGI application. `closing` says when no more work is taken on; an empty token lets everyone in."""
    batchers = {name: _Batcher(name, bridge, limits, closing) for name in bridge.rewards}
    memory = _Memory(int(limits.held_mib * MIB))

    async def score(request: Request) -> Response:
        given = request.headers.get("authorization", "").encode("latin-1")
        if token and not hmac.compare_digest(given, f"Bearer {token}".encode()):
            raise HTTPException(
                401, f"wrong or missing bearer token; it is the server's {TOKEN_ENV}", CHALLENGE
            )
        name = request.path_params["reward"]
        if name not in batchers:
            raise HTTPException(
                404,
                f"there is no reward {name!r} here; this server has {', '.join(sorted(batchers))}",
            )
        batchers[name].check_room(1)
        size, limit = int(request.headers.get("content-length", 0)), int(limits.body_mib * MIB)
        with memory.hold(_within(size, limit) or limit):
            body = await _read(request, limit, limits.upload)
            images, prompts = await run_in_threadpool(_decode, body, limits.images)
            del body
            scores = await _unless_gone(request, batchers[name].add(images, prompts))
        return JSONResponse({"scores": scores.tolist()})

    async def healthz(_: Request) -> Response:
        rewards = {
            name: {
                "device": bridge.devices[name],
                "waiting": batcher.images_waiting,
                "scored": batcher.scored,
            }
            for name, batcher in batchers.items()
        }
        stuck = bridge.stuck()
        status = (
            "stopping" if closing() else f"no answer from {', '.join(stuck)}" if stuck else "ok"
        )
        return JSONResponse({"status": status, "rewards": rewards}, 503 if stuck else 200)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(batcher.run()) for batcher in batchers.values()]
        yield
        for batcher in batchers.values():
            batcher.stop()
        await asyncio.gather(*tasks)
        bridge.close()

    return Starlette(
        routes=[Route("/score/{reward}", score, methods=["POST"]), Route("/healthz", healthz)],
        exception_handlers={HTTPException: _http_error, ClientDisconnect: _gone, Exception: _bug},
        lifespan=lifespan,
    )


def bind(host: str, port: int, token: str) -> socket.socket:
    """A socket that does not listen yet, so that clients are turned away while rewards load. Port 0 takes a free one.

    Raises ValueError for an address that others can reach where there is no token, OSError for one that is taken.
    """
    if not token and not _is_loopback(host):
        raise ValueError(
            f"{host} can be reached from other machines, so a token is needed; set the environment variable "
            f"{TOKEN_ENV} here and for the clients, or listen on 127.0.0.1"
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


def serve(bridge: RewardBridge, listener: socket.socket, limits: Limits, token: str) -> None:
    """Serve until SIGTERM or Ctrl-C, which let the batch at work end and send 503 to what waits."""
    app = make_app(bridge, limits, token, closing=lambda: server.should_exit)
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=int(bridge.deadline) + 1,
    )
    server = uvicorn.Server(config)
    server.run(sockets=[listener])


@dataclass
class _Request:
    images: torch.Tensor
    prompts: list[str]
    scores: asyncio.Future = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class _Batcher:
    """One reward's queue. What arrives while a batch is scored makes up the next one."""

    def __init__(
        self, name: str, bridge: RewardBridge, limits: Limits, closing: Callable[[], bool]
    ):
        self.name, self.bridge, self.limits, self.closing = name, bridge, limits, closing
        self.scored = 0
        self._waiting: deque[_Request] = deque()
        self._arrived, self._stopped = asyncio.Event(), False

    @property
    def images_waiting(self) -> int:
        return sum(len(request.prompts) for request in self._waiting if not request.scores.done())

    def check_room(self, n: int) -> None:
        if self.closing():
            raise _busy("the server is stopping")
        if self.images_waiting + n > self.limits.waiting:
            raise _busy(
                f"{self.images_waiting} images wait for {self.name}, of at most {self.limits.waiting}"
            )

    def add(self, images: torch.Tensor, prompts: list[str]) -> asyncio.Future:
        self.check_room(len(prompts))
        self._waiting.append(_Request(images, prompts))
        self._arrived.set()
        return self._waiting[-1].scores

    def stop(self) -> None:
        self._stopped = True
        self._arrived.set()

    async def run(self) -> None:
        while not self._stopped:
            await self._arrived.wait()
            if self.images_waiting < self.limits.batch:
                await asyncio.sleep(self.limits.gather)
            if self.closing():
                for request in self._waiting:
                    _settle(request, _busy("the server is stopping"))
                self._waiting.clear()
            if batch := self._take():
                await self._score(batch)
            if not self._waiting:
                self._arrived.clear()

    def _take(self) -> list[_Request]:
        """The oldest request and those after it that fit: pictures of the same size, `batch` images in all."""
        taken, left, images = [], deque(), 0
        for request in self._waiting:
            if request.scores.done():  # its client went away
                continue
            n = len(request.prompts)
            same = not taken or request.images.shape[2:] == taken[0].images.shape[2:]
            if not taken or (same and images + n <= self.limits.batch):
                taken.append(request)
                images += n
            else:
                left.append(request)
        self._waiting = left
        return taken

    async def _score(self, batch: list[_Request]) -> None:
        """Every request its own rows. Where a batch of several fails, one by one: only the culprit is to fail."""
        try:
            scores = await run_in_threadpool(self._submit, batch)
        except Exception as error:
            if len(batch) > 1:
                for request in batch:
                    await self._score([request])
                return
            _settle(batch[0], error)
            return
        ends = np.cumsum([len(request.prompts) for request in batch])
        for request, rows in zip(batch, np.split(scores, ends[:-1]), strict=True):
            _settle(request, rows)
        self.scored += len(scores)

    def _submit(self, batch: Sequence[_Request]) -> np.ndarray:
        images = (
            batch[0].images if len(batch) == 1 else torch.cat([request.images for request in batch])
        )
        prompts = [prompt for request in batch for prompt in request.prompts]
        return self.bridge.submit(images, prompts, only=[self.name]).result()[self.name]


class _Memory:
    """Counts the bytes of the bodies that are on their way through."""

    def __init__(self, limit: int):
        self.limit, self.held = limit, 0

    @contextlib.contextmanager
    def hold(self, size: int):
        if self.held + size > self.limit:
            raise _busy(
                f"requests of {self.held / MIB:.0f} MiB are at work, of at most {self.limit / MIB:.0f} MiB"
            )
        self.held += size
        try:
            yield
        finally:
            self.held -= size


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def _within(size: int, limit: int) -> int:
    if size > limit:
        raise HTTPException(
            413,
            f"the body is over this server's limit of {limit / MIB:g} MiB; send fewer images at once "
            "(config.reward.batch_size) or raise its limits.body_mib",
        )
    return size


async def _read(request: Request, limit: int, seconds: float) -> bytes:
    """The body, of which no more than `limit` bytes are ever kept, whatever its headers say."""
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                _within(len(body) + len(chunk), limit)
                body += chunk
    except TimeoutError:
        raise HTTPException(
            408, f"the body did not arrive within {seconds:g} s (limits.upload)"
        ) from None
    return bytes(body)


def _decode(body: bytes, max_images: int) -> tuple[torch.Tensor, list[str]]:
    try:
        tensors = load(body)
        header = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
        prompts = json.loads(header["__metadata__"]["prompts"])
    except (
        SafetensorError,
        KeyError,
        TypeError,
        ValueError,
        RuntimeError,
        RecursionError,
    ) as error:
        raise HTTPException(
            400,
            f'the body is not safetensors with metadata "prompts", a JSON list ({type(error).__name__}: {error}); '
            "nothing else is read, pickle least of all",
        ) from None
    images = tensors.get("images")
    if (
        len(tensors) != 1
        or images is None
        or images.dtype != torch.uint8
        or images.ndim != 4
        or images.shape[1] != 3
    ):
        found = ", ".join(
            f"{key!r} {value.dtype} {list(value.shape)}" for key, value in list(tensors.items())[:3]
        )
        raise HTTPException(
            400,
            f"got {found or 'no tensor'}; expected one tensor, 'images', torch.uint8 [n, 3, h, w]",
        )
    if not images.numel():
        raise HTTPException(
            400, f"got images of shape {list(images.shape)}: there is nothing to score"
        )
    if len(images) > max_images:
        raise HTTPException(
            413,
            f"got {len(images)} images, this server takes {max_images} at once; send fewer (config.reward.batch_size) "
            "or raise its limits.images",
        )
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise HTTPException(400, 'metadata "prompts" is no JSON list of strings')
    if len(prompts) != len(images):
        raise HTTPException(
            400, f"got {len(images)} images and {len(prompts)} prompts; expected as many of each"
        )
    return images, prompts


async def _unless_gone(request: Request, scores: asyncio.Future) -> np.ndarray:
    """The scores. Nobody is to wait for those of a client that went away or gave up."""
    gone = asyncio.ensure_future(
        request.receive()
    )  # after the body, only the end of the connection is left to receive
    try:
        await asyncio.wait({scores, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not scores.done():
            raise ClientDisconnect
        return scores.result()
    except RewardError as error:
        logging.getLogger(__name__).warning("%s", error)
        raise HTTPException(500, str(error)) from None
    finally:
        gone.cancel()
        scores.cancel()


def _settle(request: _Request, outcome: np.ndarray | Exception) -> None:
    if request.scores.done():  # its client went away
        return
    if isinstance(outcome, Exception):
        request.scores.set_exception(outcome)
    else:
        request.scores.set_result(outcome)


def _busy(reason: str) -> HTTPException:
    return HTTPException(503, f"{reason}; ask again later", headers={"Retry-After": "1"})


async def _http_error(_: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)


async def _gone(_: Request, __: ClientDisconnect) -> Response:
    return Response(status_code=400)  # nobody reads it


async def _bug(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": f"the server itself failed: {type(error).__name__}"}, 500)
