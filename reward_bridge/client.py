"""A reward computed by other machines, which run scripts/serve_rewards.py."""

import asyncio
import itertools
import os
import random
import ssl
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

import httpx2
import torch
from tenacity import (
    AsyncRetrying,
    retry_if_exception_type,
    stop_after_attempt,
    wait_exponential_jitter,
)

from reward_bridge.reward import RewardError
from reward_bridge.wire import encode

CONNECT_SECONDS = 5.0  # connection time-out, for machines that do not respond at all
REST_SECONDS = 30.0  # a server that failed is skipped for this long if others work
CHUNK_BYTES = 2**18

# Statuses that blame the server. Any other status blames the request itself.
RETRIED_STATUSES = (408, 429, 500, 502, 503, 504)


class _Retryable(RewardError):
    """Another attempt may succeed."""


class _RewardFailed(_Retryable):
    """The reward failed after the server's own retries. Only another server may succeed."""


@dataclass
class _Slice:
    """A part of a batch that one server scores."""

    body: bytes
    images: int
    turn: int  # index of the server that gets the first attempt
    attempts: int = 0
    failed: set[str] = field(default_factory=set)  # servers on which the reward itself failed
    last_error: str = ""


class RemoteReward:
    """The reward `name` on one or more servers, with the scores it would give in this process.

    A batch is cut into one contiguous slice per server, and the servers score them in parallel. A
    slice whose server fails goes to the next server, with at most `attempts` attempts. Pauses
    between attempts double up to 15 s and have random jitter. The whole call ends after `deadline`
    seconds, and a server that hangs only gets a share of them; choose less than
    config.reward.deadline. A wrong token, an unknown reward or a request that is too large ends the
    call at once; so does a reward that has failed on every server. All of these raise RewardError.

    servers: a list of "http://host:port".
    token_env: the environment variable that holds the bearer token, if there is one.

    Proxy settings in the environment are ignored.
    """

    def __init__(
        self,
        name: str,
        servers: Sequence[str],
        deadline: float = 100.0,
        attempts: int = 8,
        token_env: str = "REALGEN_REWARD_TOKEN",
    ):
        _check_servers(name, servers)
        if deadline <= 0 or attempts < 1:
            raise ValueError(
                f"reward {name!r}: got deadline {deadline} and attempts {attempts}; expected more "
                "than 0"
            )
        self.name = name
        self.servers = [server.rstrip("/") for server in servers]
        self.deadline = deadline
        self.attempts = attempts

        token = os.environ.get(token_env, "").strip()
        self._headers = {"Authorization": f"Bearer {token}".encode()} if token else {}
        self._tls = ssl.create_default_context()
        self._skipped_until = dict.fromkeys(self.servers, 0.0)  # time.monotonic()

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Score uint8 images [n, 3, h, w] and n prompts: float32 [n]. Raises RewardError."""
        slices = self._cut(images, list(prompts))
        return asyncio.run(self._score(slices))

    def _cut(self, images: torch.Tensor, prompts: list[str]) -> list[_Slice]:
        """Cut a batch into a contiguous slice per server, each starting with a different server."""
        parts = len(self.servers)
        bounds = [len(prompts) * part // parts for part in range(parts + 1)]
        first_turn = random.randrange(parts)

        slices = []
        for part, (start, stop) in enumerate(itertools.pairwise(bounds)):
            if start < stop:
                body = encode(images[start:stop], prompts[start:stop])
                slices.append(_Slice(body, stop - start, first_turn + part))
        return slices

    async def _score(self, slices: Sequence[_Slice]) -> torch.Tensor:
        """All slices' scores, float32 [n]."""
        timeout = httpx2.Timeout(None, connect=CONNECT_SECONDS)
        async with httpx2.AsyncClient(
            headers=self._headers, timeout=timeout, verify=self._tls, trust_env=False
        ) as http:
            try:
                async with asyncio.timeout(self.deadline) as limit:
                    tasks = [self._score_slice(http, part, limit.when()) for part in slices]
                    return torch.cat(await asyncio.gather(*tasks))
            except TimeoutError:
                errors = [part.last_error for part in slices if part.last_error]
                reason = "; ".join(errors) or f"no answer from {', '.join(self.servers)}"
                raise RewardError(
                    f"reward {self.name!r} has no scores after {self.deadline:g} s "
                    f"(config.reward.options.{self.name}.deadline): {reason}"
                ) from None

    async def _score_slice(
        self, http: httpx2.AsyncClient, part: _Slice, end: float
    ) -> torch.Tensor:
        """A slice's scores, float32 [n], from whichever server gives them before `end`.

        `end` is a time of the event loop.
        """
        retrying = AsyncRetrying(
            stop=stop_after_attempt(self.attempts),
            wait=wait_exponential_jitter(multiplier=0.5, max=15, jitter=0.5),
            retry=retry_if_exception_type(_Retryable),
            reraise=True,
        )
        try:
            return await retrying(self._attempt, http, part, end)
        except _Retryable as error:
            raise RewardError(f"{error} (gave up after {self.attempts} attempts)") from error

    async def _attempt(self, http: httpx2.AsyncClient, part: _Slice, end: float) -> torch.Tensor:
        """One attempt to score a slice; remembers a server that fails."""
        candidates = self._available()
        server = candidates[(part.turn + part.attempts) % len(candidates)]

        # A server that hangs must leave time for the servers not tried yet.
        untried = max(1, len(self.servers) - part.attempts)
        seconds = (end - asyncio.get_running_loop().time()) / untried
        part.attempts += 1
        try:
            return await self._ask(http, server, part, seconds)
        except _Retryable as error:
            part.last_error = str(error)
            self._skipped_until[server] = time.monotonic() + REST_SECONDS
            if isinstance(error, _RewardFailed):
                part.failed.add(server)
            if len(part.failed) == len(self.servers):
                raise RewardError(str(error)) from error
            raise

    async def _ask(
        self, http: httpx2.AsyncClient, server: str, part: _Slice, seconds: float
    ) -> torch.Tensor:
        """Send one request and check the answer: float32 [n]."""
        source = f"reward {self.name!r}, server {server}"
        try:
            async with asyncio.timeout(seconds):
                answer = await http.post(
                    f"{server}/score/{quote(self.name, safe='')}",
                    headers={"Content-Length": str(len(part.body))},
                    content=_chunks(part.body),
                )
        except TimeoutError:
            raise _Retryable(f"{source}: no answer within {seconds:.3g} s") from None
        except httpx2.TransportError as error:
            raise _Retryable(f"{source}: {type(error).__name__} {error}") from error

        if answer.status_code != 200:
            raise _status_error(answer, source)
        return _read_scores(answer, source, part.images)

    def _available(self) -> list[str]:
        """The servers without a recent failure, or all servers if each has failed."""
        now = time.monotonic()
        available = [server for server in self.servers if self._skipped_until[server] <= now]
        return available or self.servers


async def _chunks(body: bytes) -> AsyncIterator[bytes]:
    """The body in chunks, because each layer of the HTTP client copies what it is given."""
    for start in range(0, len(body), CHUNK_BYTES):
        yield body[start : start + CHUNK_BYTES]


def _status_error(answer: httpx2.Response, source: str) -> RewardError:
    message = f"{source} answered {answer.status_code}: {_error_text(answer)}"
    if answer.status_code == 500:
        return _RewardFailed(message)
    if answer.status_code in RETRIED_STATUSES:
        return _Retryable(message)
    return RewardError(message)


def _error_text(answer: httpx2.Response) -> str:
    try:
        return answer.json()["error"]
    except (KeyError, TypeError, ValueError):  # the answer is not from reward_bridge/server.py
        return answer.text[:200]


def _read_scores(answer: httpx2.Response, source: str, images: int) -> torch.Tensor:
    """The scores of an answer, float32 [images], all finite."""
    try:
        scores = torch.tensor(answer.json()["scores"], dtype=torch.float32)
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise _Retryable(
            f"{source}: the answer has no list of scores ({type(error).__name__}: {error})"
        ) from error
    if scores.shape != (images,) or not scores.isfinite().all():
        bad = int((~scores.isfinite()).sum())
        raise _Retryable(
            f"{source} answered {list(scores.shape)} scores, {bad} of them not finite; expected "
            f"{images} finite numbers"
        )
    return scores


def _check_servers(name: str, servers: Sequence[str]) -> None:
    is_list = bool(servers) and not isinstance(servers, str)
    if not is_list or not all(_is_address(server) for server in servers):
        raise ValueError(
            f"reward {name!r}: got servers {servers!r}; expected a list such as "
            "['http://host:8017']"
        )


def _is_address(server: object) -> bool:
    try:
        url = httpx2.URL(server)
    except (httpx2.InvalidURL, TypeError):
        return False
    return url.scheme in ("http", "https") and bool(url.host)
