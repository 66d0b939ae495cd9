"""A client for OpenAI-compatible chat endpoints, with bounded retries and rate limits.

The arena's judge (judges/api.py) and the rewards by chat models (rewards/chat_judge.py) use it. No
message of this module contains the endpoint's address or key.
"""

import asyncio
import base64
import datetime
import email.utils
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx2
import tenacity

from reward_bridge.addresses import proxy_hint, proxy_options
from reward_bridge.outage import outage_of

CHECK_SECONDS = 5.0  # for an answer to the question whether an endpoint is there
# Seconds. An endpoint that asks for a longer wait (as when a daily quota is spent) is given up.
LONGEST_WAIT = 600.0
BACK_OFF = tenacity.wait_random_exponential(multiplier=0.5, max=20)

# Error codes in a response's body, as OpenAI and compatible servers use them.
NO_QUOTA = ("insufficient_quota", "insufficient_balance", "billing_hard_limit_reached")
FILTERED = ("content_filter", "content_policy_violation", "responsible_ai_policy_violation")

Result = TypeVar("Result")


class RequestFailed(Exception):
    """The endpoint will not answer this request."""


class TemporaryFailure(RequestFailed):
    """The request failed, but a retry may succeed."""


class EndpointUnavailable(RequestFailed):
    """The endpoint will answer no request for now: wrong key, no quota, or a very long wait."""


class ContentFiltered(RequestFailed):
    """The endpoint's content filter rejected the request."""


@dataclass(frozen=True)
class Endpoint:
    """Where a model is served. Its repr hides the address and the key."""

    model: str
    url: str = field(repr=False)  # up to and including /v1
    key: str = field(repr=False)  # "" if the endpoint needs none

    def scrub(self, text: str) -> str:
        """Return the text without the key and the address."""
        url = httpx2.URL(self.url)
        secrets = (self.key, self.url, url.userinfo.decode(), url.netloc.decode(), url.host)
        for secret in secrets:
            if secret:
                text = text.replace(secret, "...")
        return text

    def excerpt(self, text: str) -> str:
        """Return the first 300 characters of a scrubbed text, on one line."""
        return " ".join(self.scrub(text).split())[:300]


def check_key(key: str, variable: str) -> None:
    """Raise ValueError if an HTTP header cannot carry the key; the message has no part of it."""
    if not (key.isascii() and key.isprintable()):
        raise ValueError(
            f"{variable} holds characters that an HTTP header cannot carry; copy the key again"
        )


def data_url(data: bytes, kind: str) -> str:
    """Return an image file as a data URL. kind: png, jpeg or webp."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


class ChatClient:
    """Sends chat requests to one endpoint. Use it as an async context manager.

    A request is sent up to `attempts` times if the endpoint is busy (429), broken (5xx), silent or
    unreachable, or if the response cannot be read. Waits between attempts grow and are random; a
    Retry-After header pauses all requests of this client. `stopped()` ends the retries early.

    `timeout` is the longest wait in seconds for the next bytes of a response, `total_timeout` that
    for a whole response (None: unlimited). `requests_per_minute` limits the rate (0: unlimited).

    It is logged once when the endpoint stops answering, and once when it is back. `name` is what
    these lines call it. reward_bridge/addresses.py says which endpoints are asked through a proxy.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        name: str,
        attempts: int,
        timeout: float,
        total_timeout: float | None = None,
        requests_per_minute: float = 0.0,
        stopped: Callable[[], bool] = lambda: False,
    ):
        # At more verbose levels, these loggers print addresses.
        for library in ("httpx2", "httpcore2"):
            logging.getLogger(library).setLevel(logging.WARNING)

        self.endpoint = endpoint
        self.total_timeout = total_timeout
        self.attempts = attempts
        self._outage = outage_of(name)
        self._pace = _Pace(requests_per_minute)
        self._retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(TemporaryFailure),
            stop=tenacity.stop_any(
                tenacity.stop_after_attempt(attempts), lambda _: bool(stopped())
            ),
            wait=BACK_OFF,
            reraise=True,
        )

        headers = {}
        if endpoint.key:
            headers["Authorization"] = f"Bearer {endpoint.key}"
        self._http = httpx2.AsyncClient(
            headers=headers, timeout=timeout, **proxy_options([endpoint.url])
        )

    async def __aenter__(self) -> "ChatClient":
        await self._http.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._http.__aexit__(*error)

    async def ask(
        self, body: Mapping[str, Any], read: Callable[[httpx2.Response], Result]
    ) -> Result:
        """Send a request and return what `read` makes of the response.

        body: the request without "model". `read` may raise TemporaryFailure for another attempt.
        Raises RequestFailed, or a subclass of it that says why there is no answer.
        """
        return await self._retrying(self._attempt, {"model": self.endpoint.model, **body}, read)

    async def _attempt(
        self, body: Mapping[str, Any], read: Callable[[httpx2.Response], Result]
    ) -> Result:
        await self._pace.wait()
        try:
            response = await self._send(body)
        except TemporaryFailure as error:
            self._note_failure(str(error), at_once=True)
            raise

        if response.status_code >= 500:
            self._note_failure(f"HTTP {response.status_code}", at_once=False)
        else:
            self._outage.answered()
        if not response.is_success:
            self._raise_error(response)
        return read(response)

    async def _send(self, body: Mapping[str, Any]) -> httpx2.Response:
        try:
            async with asyncio.timeout(self.total_timeout):
                return await self._http.post(f"{self.endpoint.url}/chat/completions", json=body)
        except (TimeoutError, httpx2.TimeoutException):
            seconds = self.total_timeout or self._http.timeout.read
            raise TemporaryFailure(f"no answer within {seconds:g} s") from None
        except httpx2.HTTPError as error:
            raise TemporaryFailure(self._describe(error)) from None

    def _describe(self, error: httpx2.HTTPError) -> str:
        hint = proxy_hint(self.endpoint.url)
        return self.endpoint.excerpt(f"{type(error).__name__} {error}") + hint

    def _note_failure(self, reason: str, at_once: bool) -> None:
        then = f"each request is sent up to {self.attempts} times"
        self._outage.failed(reason, then, at_once=at_once)

    async def check(self) -> None:
        """Raise RequestFailed if nothing answers at the endpoint, or if the key is wrong."""
        try:
            response = await self._http.get(f"{self.endpoint.url}/models", timeout=CHECK_SECONDS)
        except httpx2.HTTPError as error:
            raise RequestFailed(self._describe(error)) from None
        # Keys with few rights get 403 here, and servers without this page 404.
        if response.status_code == 401:
            self._raise_error(response)

    def _raise_error(self, response: httpx2.Response) -> None:
        """Raise the error of a response: retry, give up the request, or give up the endpoint."""
        codes, text = _error_of(response)
        text = self.endpoint.excerpt(text)
        status = response.status_code
        message = f"HTTP {status} {text}".strip()

        if codes.intersection(FILTERED):
            raise ContentFiltered(text)
        if status in (401, 402, 403) or codes.intersection(NO_QUOTA):
            raise EndpointUnavailable(message)
        if status != 429 and status < 500 and status not in (408, 409):
            raise RequestFailed(message)

        wait = retry_after(response.headers.get("Retry-After", ""))
        if wait > LONGEST_WAIT:
            raise EndpointUnavailable(f"the endpoint asks for a wait of {wait:.0f} s ({message})")
        self._pace.pause(wait)
        raise TemporaryFailure(message)


def _error_of(response: httpx2.Response) -> tuple[set[str | None], str]:
    """Return the error codes and the message of an error response."""
    try:
        error = response.json()["error"]
        return {error.get("code"), error.get("type")}, str(error.get("message"))
    except (ValueError, LookupError, TypeError, AttributeError):
        return set(), response.text


def retry_after(value: str) -> float:
    """Return the seconds of a Retry-After header, a number or a date; 0 for anything else."""
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        until = email.utils.parsedate_to_datetime(value)
        return max((until - datetime.datetime.now(datetime.UTC)).total_seconds(), 0.0)
    except (ValueError, TypeError):
        return 0.0


class _Pace:
    """Spaces requests evenly and pauses them while the endpoint asks for a wait."""

    def __init__(self, per_minute: float):
        self.interval = 60 / per_minute if per_minute else 0.0
        self.next_request = 0.0
        self.paused_until = 0.0

    def pause(self, seconds: float) -> None:
        self.paused_until = max(self.paused_until, time.monotonic() + seconds)

    async def wait(self) -> None:
        """Return when the next request may be sent."""
        while True:
            seconds = max(self.next_request, self.paused_until) - time.monotonic()
            if seconds <= 0:
                break
            await asyncio.sleep(seconds)
        self.next_request = max(self.next_request, time.monotonic()) + self.interval
