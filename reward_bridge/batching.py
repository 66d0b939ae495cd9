"""Batches the requests to a reward server, within limits."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from reward_bridge.bridge import RewardBridge

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """What a server accepts. A larger request gets 413; one at a busy time gets 503.

    Raises ValueError if the largest allowed request could never be accepted.
    """

    body_mib: float  # of one request's body
    held_mib: float  # of all bodies being read, waiting or being scored
    images: int  # in one request
    waiting: int  # images waiting for one reward
    batch: int  # images of several requests that are scored together
    gather: float  # seconds that the first request waits for others to join it
    upload: float  # seconds that a body may take to arrive

    def __post_init__(self):
        if self.images > self.waiting or self.body_mib > self.held_mib:
            raise ValueError(
                f"a request of limits.images={self.images} and limits.body_mib={self.body_mib:g} "
                f"would never fit into limits.waiting={self.waiting} and "
                f"limits.held_mib={self.held_mib:g}; raise the latter two"
            )


def busy(reason: str) -> HTTPException:
    """The error that tells a client to retry later."""
    return HTTPException(503, f"{reason}; ask again later", headers={"Retry-After": "1"})


class Memory:
    """Counts the bytes of all bodies that are being read, waiting or being scored."""

    def __init__(self, limit: int):
        self.limit = limit
        self.held = 0

    @contextlib.contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Count `size` bytes inside the block. Raises HTTPException 503 above the limit."""
        if self.held + size > self.limit:
            raise busy(
                f"requests of {self.held / MIB:.0f} MiB are in progress, of at most "
                f"{self.limit / MIB:.0f} MiB"
            )
        self.held += size
        try:
            yield
        finally:
            self.held -= size


@dataclass
class Request:
    """A request's images, all of one size, and its future scores."""

    images: torch.Tensor  # uint8 [n, 3, h, w]
    prompts: list[str]
    scores: asyncio.Future = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )  # float32 [n]

    def settle(self, outcome: np.ndarray | Exception) -> None:
        """Set the scores or the error, unless the client has disconnected."""
        if self.scores.done():
            return
        if isinstance(outcome, Exception):
            self.scores.set_exception(outcome)
        else:
            self.scores.set_result(outcome)


class Batcher:
    """One reward's queue. Requests that arrive while a batch is scored form the next batch."""

    def __init__(
        self, name: str, bridge: RewardBridge, limits: Limits, closing: Callable[[], bool]
    ):
        self.name = name
        self.scored = 0  # images
        self._bridge = bridge
        self._limits = limits
        self._closing = closing
        self._waiting: deque[Request] = deque()
        self._arrived = asyncio.Event()
        self._stopped = False

    @property
    def images_waiting(self) -> int:
        waiting = [request for request in self._waiting if not request.scores.done()]
        return sum(len(request.prompts) for request in waiting)

    def check_room(self, images: int) -> None:
        """Raise HTTPException 503 if the queue has no room for that many more images."""
        if self._closing():
            raise busy("the server is stopping")
        if self.images_waiting + images > self._limits.waiting:
            raise busy(
                f"{self.images_waiting} images wait for {self.name}, of at most "
                f"{self._limits.waiting}"
            )

    def add(self, images: torch.Tensor, prompts: list[str]) -> asyncio.Future:
        """Queue uint8 images [n, 3, h, w]. The future's result is their scores, float32 [n]."""
        self.check_room(len(prompts))
        request = Request(images, prompts)
        self._waiting.append(request)
        self._arrived.set()
        return request.scores

    def stop(self) -> None:
        self._stopped = True
        self._arrived.set()

    async def run(self) -> None:
        """Score what arrives until `stop` is called."""
        while not self._stopped:
            await self._arrived.wait()
            if self.images_waiting < self._limits.batch:
                await asyncio.sleep(self._limits.gather)

            if self._closing():
                for request in self._waiting:
                    request.settle(busy("the server is stopping"))
                self._waiting.clear()

            batch = self._take()
            if batch:
                await self._score(batch)
            if not self._waiting:
                self._arrived.clear()

    def _take(self) -> list[Request]:
        """Take the oldest request and later ones of the same size, up to `limits.batch` images."""
        taken: list[Request] = []
        left: deque[Request] = deque()
        images = 0
        for request in self._waiting:
            if request.scores.done():  # the client has disconnected
                continue
            count = len(request.prompts)
            fits = not taken or (
                request.images.shape[2:] == taken[0].images.shape[2:]
                and images + count <= self._limits.batch
            )
            if fits:
                taken.append(request)
                images += count
            else:
                left.append(request)
        self._waiting = left
        return taken

    async def _score(self, batch: list[Request]) -> None:
        """Score several requests as one batch and split the scores.

        If the batch fails, each request is scored alone, so that only the one that caused the error
        fails.
        """
        try:
            scores = await run_in_threadpool(self._submit, batch)
        except Exception as error:
            if len(batch) == 1:
                batch[0].settle(error)
                return
            for request in batch:
                await self._score([request])
            return

        ends = np.cumsum([len(request.prompts) for request in batch])
        for request, rows in zip(batch, np.split(scores, ends[:-1]), strict=True):
            request.settle(rows)
        self.scored += len(scores)

    def _submit(self, batch: Sequence[Request]) -> np.ndarray:
        """Wait for the bridge's scores of all requests' images, float32 [n]."""
        images = batch[0].images
        if len(batch) > 1:
            images = torch.cat([request.images for request in batch])
        prompts = [prompt for request in batch for prompt in request.prompts]
        pending = self._bridge.submit(images, prompts, only=[self.name])
        return pending.result().rewards[self.name]
