"""A reward that other machines compute: scripts/serve_rewards.py there, this class here."""

import asyncio
import itertools
import json
import os
import random
import ssl
import time
from collections.abc import AsyncIterator, Sequence
from urllib.parse import quote

import httpx2
import torch
from safetensors.torch import save
from tenacity import (
    AsyncRetrying,
    retry_if_exception_type,
    stop_after_attempt,
    wait_exponential_jitter,
)

from reward_bridge.bridge import RewardError

CONNECT = 5.0  # seconds after which a machine that does not react at all is given up
CHUNK = 2**18  # bytes
REST = 30.0  # seconds for which a server that failed is left alone while others work
TRY_AGAIN = (
    408,
    429,
    500,
    502,
    503,
    504,
)  # the server's trouble; any other status is the request's own


class _Trouble(RewardError):
    """Another attempt may mend it."""


class _Failed(_Trouble):
    """The reward itself failed on that server, which had its own retries: another attempt only on another server."""


class RemoteReward:
    """The reward `name` of one or more servers, with the scores that it would give in this process.

    A batch is cut into as many contiguous slices as there are servers, which score them side by side. A slice that a
    server does not answer, or answers badly, goes to the next one, `attempts` times at most, after pauses that double
    up to 15 s and have a random part. All of it ends `deadline` seconds after the call, and a server that hangs gets
    its share of them: keep it below config.reward.deadline. A wrong token, an unknown reward or too large a request
    ends it at once, a reward that fails when it has failed on every server. All of these raise RewardError.

    servers: "http://host:port" each. The bearer token is the environment variable `token_env`, where that is set.
    Proxies named in the environment are not used.
    """

    def __init__(
        self,
        name: str,
        servers: Sequence[str],
        deadline: float = 100.0,
        attempts: int = 8,
        token_env: str = "REALGEN_REWARD_TOKEN",
    ):
        if (
            isinstance(servers, str)
            or not servers
            or not all(_is_address(server) for server in servers)
        ):
            raise ValueError(
                f"reward {name!r}: got servers {servers!r}; expected a list such as ['http://host:8017']"
            )
        if deadline <= 0 or attempts < 1:
            raise ValueError(
                f"reward {name!r}: got deadline {deadline}, attempts {attempts}; expected more than 0"
            )
        self.name, self.servers = name, [server.rstrip("/") for server in servers]
        self.deadline, self.attempts = deadline, attempts
        token = os.environ.get(token_env, "").strip()
        self._headers = {"Authorization": f"Bearer {token}".encode()} if token else {}
        self._tls = ssl.create_default_context()
        self._rest = dict.fromkeys(self.servers, 0.0)  # until when each is left alone

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return asyncio.run(self._score(images, list(prompts)))

    async def _score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        n, parts, first = len(prompts), len(self.servers), random.randrange(len(self.servers))
        bounds = [n * part // parts for part in range(parts + 1)]
        trouble: dict[int, str] = {}  # the latest of each slice
        async with httpx2.AsyncClient(
            headers=self._headers,
            timeout=httpx2.Timeout(None, connect=CONNECT),
            verify=self._tls,
            trust_env=False,
        ) as http:
            try:
                async with asyncio.timeout(self.deadline) as limit:
                    slices = [
                        self._slice(
                            http,
                            images[start:stop],
                            prompts[start:stop],
                            first + k,
                            limit.when(),
                            trouble,
                        )
                        for k, (start, stop) in enumerate(itertools.pairwise(bounds))
                        if start < stop
                    ]
                    return torch.cat(await asyncio.gather(*slices))
            except TimeoutError:
                latest = "; ".join(trouble.values()) or f"no answer from {', '.join(self.servers)}"
                raise RewardError(
                    f"reward {self.name!r} has no scores after {self.deadline:g} s "
                    f"(config.reward.options.{self.name}.deadline): {latest}"
                ) from None

    async def _slice(
        self,
        http: httpx2.AsyncClient,
        images: torch.Tensor,
        prompts: list[str],
        turn: int,
        end: float,
        trouble: dict[int, str],
    ) -> torch.Tensor:
        """The scores of a slice, from whichever server gives them before `end` (the event loop's time)."""
        body = save({"images": images.cpu().contiguous()}, {"prompts": json.dumps(prompts)})
        failed = set()
        try:
            async for attempt in AsyncRetrying(
                stop=stop_after_attempt(self.attempts),
                wait=wait_exponential_jitter(multiplier=0.5, max=15, jitter=0.5),
                retry=retry_if_exception_type(_Trouble),
                reraise=True,
            ):
                with attempt:
                    done = attempt.retry_state.attempt_number - 1
                    rested = self._rested()
                    server = rested[(turn + done) % len(rested)]
                    left = end - asyncio.get_running_loop().time()
                    try:
                        return await self._ask(
                            http,
                            server,
                            body,
                            len(prompts),
                            left / max(1, len(self.servers) - done),
                        )
                    except _Trouble as error:
                        trouble[turn] = str(error)
                        self._rest[server] = time.monotonic() + REST
                        failed |= {server} if isinstance(error, _Failed) else set()
                        if len(failed) == len(self.servers):
                            raise RewardError(str(error)) from error
                        raise
        except _Trouble as error:
            raise RewardError(f"{error} (given up after {self.attempts} attempts)") from error

    async def _ask(
        self, http: httpx2.AsyncClient, server: str, body: bytes, count: int, seconds: float
    ) -> torch.Tensor:
        """One attempt at one server."""
        where = f"reward {self.name!r}, server {server}"
        try:
            async with asyncio.timeout(seconds):
                answer = await http.post(
                    f"{server}/score/{quote(self.name, safe='')}",
                    headers={"Content-Length": str(len(body))},
                    content=_chunks(body),
                )
        except TimeoutError:
            raise _Trouble(f"{where}: no answer within {seconds:.3g} s") from None
        except httpx2.TransportError as error:
            raise _Trouble(f"{where}: {type(error).__name__} {error}") from error
        if answer.status_code != 200:
            kind = _Trouble if answer.status_code in TRY_AGAIN else RewardError
            kind = _Failed if answer.status_code == 500 else kind
            raise kind(f"{where} answered {answer.status_code}: {_error_text(answer)}")
        try:
            scores = torch.tensor(answer.json()["scores"], dtype=torch.float32)
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise _Trouble(
                f"{where}: the answer holds no list of scores ({type(error).__name__}: {error})"
            ) from error
        if scores.shape != (count,) or not scores.isfinite().all():
            raise _Trouble(
                f"{where} answered {list(scores.shape)} scores, {int((~scores.isfinite()).sum())} of them not finite; "
                f"expected {count} finite numbers"
            )
        return scores

    def _rested(self) -> list[str]:
        """The servers without recent trouble, or all where there are none."""
        now = time.monotonic()
        return [server for server in self.servers if self._rest[server] <= now] or self.servers


async def _chunks(body: bytes) -> AsyncIterator[bytes]:
    """In pieces, since each layer of HTTP copies what it is given."""
    for start in range(0, len(body), CHUNK):
        yield body[start : start + CHUNK]


def _is_address(server: str) -> bool:
    try:
        url = httpx2.URL(server)
    except (httpx2.InvalidURL, TypeError):
        return False
    return url.scheme in ("http", "https") and bool(url.host)


def _error_text(answer: httpx2.Response) -> str:
    try:
        return answer.json()["error"]
    except (KeyError, TypeError, ValueError):  # not from reward_bridge/server.py
        return answer.text[:200]
