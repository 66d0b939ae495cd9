"""A reward computed by other machines, which run scripts/serve_rewards.py."""

import asyncio
import itertools
import os
import random
import ssl
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import httpx2
import torch
from tenacity import (
    AsyncRetrying,
    retry_if_exception_type,
    stop_after_attempt,
    wait_exponential_jitter,
)

from reward_bridge.addresses import is_address, proxy_hint, proxy_options
from reward_bridge.outage import Outage, outage_of
from reward_bridge.reward import RewardError
from reward_bridge.served import check_served, served_digest
from reward_bridge.wire import REQUEST_ID, encode

CHECK_SECONDS = 5.0  # for an answer to the question whether a server has the reward
CONNECT_SECONDS = 5.0  # connection time-out, for machines that do not respond at all
REST_SECONDS = 30.0  # a server that failed is skipped for this long if others work
CHUNK_BYTES = 2**18

# Statuses that blame the server. Any other status blames the request itself.
RETRIED_STATUSES = (408, 429, 500, 502, 503, 504)
NO_SUCH_QUESTION = (405, 501)  # of other programs that serve rewards, when they are checked
BUSY_STATUSES = (408, 429, 503)  # of a server that is there


class _Retryable(RewardError):
    """Another attempt may succeed."""


class _RewardFailed(_Retryable):
    """The reward failed after the server's own retries. Only another server may succeed."""


class _Unreachable(_Retryable):
    """Nothing answers at the server's address."""


class _Busy(_Retryable):
    """The server is there, but has too much to do."""


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
    What keeps a server from scoring is logged once when it begins, and once when it is over.

    A server that serves something else than the others, or than before, ends the call at once too
    (reward_bridge/served.py).

    servers: a list of "http://host:port". reward_bridge/addresses.py says which of them are asked
        through a proxy.
    token_env: the environment variable that holds the bearer token, if there is one.
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
        self._proxies = proxy_options(self.servers)
        self._skipped_until = dict.fromkeys(self.servers, 0.0)  # time.monotonic()

    def check_connection(self) -> str:
        """Ask each server whether it has the reward, before anything is loaded.

        Returns the digest of what they serve, "" if none tells. Servers that are not there are
        logged. Raises RewardError if none is there, if one of them refuses (a wrong token, or a
        reward that it does not have), or if they serve different rewards.
        """
        errors = dict(zip(self.servers, asyncio.run(self._ask_all()), strict=True))
        missing = {server: error for server, error in errors.items() if error is not None}
        if len(missing) == len(errors):
            raise RewardError(f"{'; '.join(map(str, missing.values()))}; start the servers first")
        for server, error in missing.items():
            self._note_failure(server, error)
        return served_digest(self.name, self.servers)

    async def _ask_all(self) -> list[_Retryable | None]:
        """The error of each server that is not there. Raises as `check_connection` does."""
        async with self._client(httpx2.Timeout(CHECK_SECONDS)) as http:
            return await asyncio.gather(*[self._find(http, server) for server in self.servers])

    async def _find(self, http: httpx2.AsyncClient, server: str) -> _Retryable | None:
        """The error of a server that is not there; None if it has the reward."""
        source = self._source(server)
        try:
            answer = await http.get(f"{server}/rewards/{quote(self.name, safe='')}")
        except httpx2.RequestError as error:
            return _Unreachable(f"{source}: {_describe(error)}{proxy_hint(server)}")
        error = _status_error(answer, source)
        if isinstance(error, _Busy) or answer.status_code in NO_SUCH_QUESTION:
            return None
        if error is not None and not isinstance(error, _Retryable):
            raise error
        if error is None:
            check_served(self.name, server, self.servers, _content(answer))
        return error

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

    def _client(self, timeout: httpx2.Timeout) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(
            headers=self._headers, timeout=timeout, verify=self._tls, **self._proxies
        )

    async def _score(self, slices: Sequence[_Slice]) -> torch.Tensor:
        """All slices' scores, float32 [n]."""
        async with self._client(httpx2.Timeout(None, connect=CONNECT_SECONDS)) as http:
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
            scores = await self._ask(http, server, part, seconds)
            self._outage(server).answered()
            return scores
        except _Retryable as error:
            self._note_failure(server, error)
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
        source = self._source(server)
        late = _Retryable(f"{source}: no answer for {seconds / 2:.1f} s")
        alarm = asyncio.get_running_loop().call_later(seconds / 2, self._note_failure, server, late)
        request = uuid.uuid4().hex
        try:
            async with asyncio.timeout(seconds):
                answer = await http.post(
                    f"{server}/score/{quote(self.name, safe='')}",
                    headers={"Content-Length": str(len(part.body)), REQUEST_ID: request},
                    content=_chunks(part.body),
                )
        except TimeoutError:
            raise _Retryable(f"{source}: no answer within {seconds:.3g} s") from None
        except httpx2.RequestError as error:
            reason = f"{_describe(error)}{proxy_hint(server)}"
            raise _Unreachable(f"{source}: {reason}") from error
        finally:
            alarm.cancel()

        error = _status_error(answer, source)
        if not isinstance(error, _Unreachable):
            _server_outage(server).answered()
        if error is not None:
            raise error
        scores = _read_scores(answer, source, part.images, request)
        check_served(self.name, server, self.servers, answer.json())
        return scores

    def _source(self, server: str) -> str:
        """What errors call this reward on a server."""
        return f"reward {self.name!r}, server {server}"

    def _outage(self, server: str) -> Outage:
        """What keeps this reward from being scored on a server that is there."""
        return outage_of(f"reward {self.name!r} on server {server}")

    def _note_failure(self, server: str, error: _Retryable) -> None:
        """Log a failed attempt, unless it is already known that the server or the reward fails."""
        reason = str(error).removeprefix(self._source(server)).lstrip(": ")
        then = f"it is asked up to {self.attempts} times, for {self.deadline:g} s at most"
        if len(self.servers) > 1:
            then = "the other servers score meanwhile"

        if isinstance(error, _Unreachable):
            _server_outage(server).failed(reason, then, at_once=True)
        else:
            self._outage(server).failed(reason, then, at_once=not isinstance(error, _Busy))

    def _available(self) -> list[str]:
        """The servers without a recent failure, or all servers if each has failed."""
        now = time.monotonic()
        available = [server for server in self.servers if self._skipped_until[server] <= now]
        return available or self.servers


def _server_outage(server: str) -> Outage:
    """Whether a server is there, which all of its rewards share."""
    return outage_of(f"reward server {server}")


async def _chunks(body: bytes) -> AsyncIterator[bytes]:
    """The body in chunks, because each layer of the HTTP client copies what it is given."""
    for start in range(0, len(body), CHUNK_BYTES):
        yield body[start : start + CHUNK_BYTES]


def _describe(error: httpx2.RequestError) -> str:
    return f"{type(error).__name__} {error}".strip()


def _status_error(answer: httpx2.Response, source: str) -> RewardError | None:
    """The error that an answer's status stands for; None for 200."""
    if answer.status_code == 200:
        return None
    message = f"{source} answered {answer.status_code}: {_error_text(answer)}"
    if answer.status_code == 500:
        return _RewardFailed(message)
    if answer.status_code in BUSY_STATUSES:
        return _Busy(message)
    if answer.status_code in RETRIED_STATUSES:
        return _Unreachable(message)
    return RewardError(message)


def _error_text(answer: httpx2.Response) -> str:
    try:
        return answer.json()["error"]
    # The answer is not from reward_bridge/server.py.
    except (KeyError, TypeError, ValueError, RecursionError):
        return answer.text[:200]


def _content(answer: httpx2.Response) -> Any:
    """The JSON of an answer; None if it is not from reward_bridge/server.py and has none."""
    try:
        return answer.json()
    except (ValueError, RecursionError):
        return None


def _read_scores(answer: httpx2.Response, source: str, images: int, request: str) -> torch.Tensor:
    """The scores of an answer, float32 [images], all finite."""
    try:
        content = answer.json()
        scores = torch.tensor(content["scores"], dtype=torch.float32)
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise _Retryable(
            f"{source}: the answer has no list of scores ({type(error).__name__}: {error})"
        ) from error
    # Other programs than ours may serve rewards, and not repeat the request's ID.
    if content.get(REQUEST_ID, request) != request:
        raise _Retryable(f"{source}: the answer is for another request")
    if scores.shape != (images,) or not scores.isfinite().all():
        bad = int((~scores.isfinite()).sum())
        raise _Retryable(
            f"{source} answered {list(scores.shape)} scores, {bad} of them not finite; expected "
            f"{images} finite numbers"
        )
    return scores


def _check_servers(name: str, servers: Sequence[str]) -> None:
    is_list = bool(servers) and not isinstance(servers, str)
    if not is_list or not all(is_address(server) for server in servers):
        raise ValueError(
            f"reward {name!r}: got servers {servers!r}; expected a list such as "
            "['http://host:8017']"
        )
