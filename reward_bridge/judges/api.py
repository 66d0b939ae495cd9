"""Asking a judge: any vision-language model behind an OpenAI-compatible endpoint that takes two pictures.

Neither the endpoint's address nor its key is ever printed, kept or part of an error.
"""

import asyncio
import datetime
import email.utils
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx2
import tenacity

URL_ENV, MODEL_ENV, KEY_ENV = "REALGEN_JUDGE_URL", "REALGEN_JUDGE_MODEL", "REALGEN_JUDGE_KEY"
LONGEST_WAIT = (
    600.0  # seconds; an endpoint that asks for more (the day's quota is spent) is left alone
)
BACK_OFF = tenacity.wait_random_exponential(multiplier=0.5, max=20)
NO_QUOTA = ("insufficient_quota", "insufficient_balance", "billing_hard_limit_reached")
FILTERED = ("content_filter", "content_policy_violation", "responsible_ai_policy_violation")

Question = TypeVar("Question")
Message = list[Mapping[str, Any]]


class Passing(Exception):
    """Asked again, the question may be answered."""


class Unreadable(Passing):
    """An answer, the argument, without a verdict."""


class Lasting(Exception):
    """This question will not be answered."""


class Closed(Exception):
    """No question will be answered for now."""


@dataclass(frozen=True)
class Endpoint:
    model: str
    url: str = field(repr=False)  # up to and with /v1
    key: str = field(repr=False)  # "": none

    def scrub(self, text: str) -> str:
        """The text without the key and the address."""
        url = httpx2.URL(self.url)
        for secret in (self.key, self.url, url.userinfo.decode(), url.netloc.decode(), url.host):
            text = text.replace(secret, "...") if secret else text
        return text

    def says(self, text: str) -> str:
        return " ".join(self.scrub(text).split())[:300]


@dataclass
class Outcome:
    failures: Counter[str]  # reason -> questions that came to nothing
    stopped: str = ""  # why the judge was left alone


def endpoint_from_environment() -> Endpoint:
    """Raises ValueError naming the variable that is missing or wrong, but not what it holds."""
    url, model, key = (os.environ.get(name, "").strip() for name in (URL_ENV, MODEL_ENV, KEY_ENV))
    for name, value in ((URL_ENV, url), (MODEL_ENV, model)):
        if not value:
            raise ValueError(
                f"the environment has no {name}; export {URL_ENV} (the endpoint up to and with /v1), {MODEL_ENV} and, "
                f"where it wants one, {KEY_ENV}"
            )
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL:
        parsed = httpx2.URL()
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(
            f"{URL_ENV} holds no address; expected one such as https://api.example.com/v1"
        )
    if not (key.isascii() and key.isprintable()):
        raise ValueError(
            f"{KEY_ENV} holds characters that no HTTP header carries; copy the key once more"
        )
    return Endpoint(model, url.rstrip("/"), key)


async def ask_all(
    endpoint: Endpoint,
    questions: Iterable[Question],
    make_message: Callable[[Question], Message],
    read: Callable[[str], str | None],
    settings,
    keep: Callable[[Question, str, str], None],
) -> Outcome:
    """Put the questions, `settings.concurrency` at a time, and `keep` each one's verdict and reply at once.

    `make_message` is called in a thread, and its ValueError is this question's failure; `read` finds the verdict in a
    reply. Where the endpoint is busy (429), broken (5xx), silent or out of reach and where a reply has no verdict, the
    question is put again, `settings.attempts` times in all. If there is no verdict even then it is "unreadable";
    without a reply it has come to nothing and is not kept. After `settings.max_failures` of those in a row, or as soon
    as the endpoint says that it will answer nothing more (wrong key, no quota), what is under way ends and nothing
    else is asked.

    Neither a temperature nor a limit of tokens is sent: several hosted models refuse them.
    """
    for name in ("httpx2", "httpcore2"):  # at other levels they log addresses
        logging.getLogger(name).setLevel(logging.WARNING)
    outcome, waiting, in_a_row = Outcome(Counter()), iter(questions), 0
    pace = _Pace(settings.requests_per_minute)
    retrying = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type(Passing),
        stop=tenacity.stop_any(
            tenacity.stop_after_attempt(settings.attempts), lambda _: bool(outcome.stopped)
        ),
        wait=BACK_OFF,
        reraise=True,
    )

    async def ask(http: httpx2.AsyncClient, message: Message) -> tuple[str, str]:
        await pace.turn()
        body = {"model": endpoint.model, "messages": [{"role": "user", "content": message}]}
        try:
            async with asyncio.timeout(settings.timeout):
                answer = await http.post(f"{endpoint.url}/chat/completions", json=body)
        except (TimeoutError, httpx2.TimeoutException):
            raise Passing(f"no answer within {settings.timeout:g} s") from None
        except httpx2.HTTPError as error:
            raise Passing(endpoint.says(f"{type(error).__name__} {error}")) from None
        if not answer.is_success:
            return _judge_error(endpoint, answer, pace)
        return _judge_answer(endpoint, answer, read)

    async def settle(http: httpx2.AsyncClient, question: Question) -> None:
        nonlocal in_a_row
        try:
            message = await asyncio.to_thread(make_message, question)
            verdict, reply = await retrying(ask, http, message)
        except Unreadable as error:
            verdict, reply = "unreadable", str(error)
        except Closed as error:
            outcome.stopped = str(error)
            return
        except (Passing, Lasting, ValueError) as error:
            in_a_row += 1
            outcome.failures[str(error)] += 1
            if in_a_row >= settings.max_failures and not outcome.stopped:
                outcome.stopped = (
                    f"{in_a_row} questions in a row came to nothing, the last one: {error}"
                )
            return
        in_a_row = 0
        keep(question, verdict, endpoint.scrub(reply))

    async def work(http: httpx2.AsyncClient) -> None:
        while not outcome.stopped and (question := next(waiting, None)) is not None:
            await settle(http, question)

    headers = {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
    own = httpx2.URL(endpoint.url).host in ("127.0.0.1", "localhost")  # no proxy in between
    async with httpx2.AsyncClient(
        headers=headers, timeout=settings.timeout, trust_env=not own
    ) as http:
        await asyncio.gather(*(work(http) for _ in range(settings.concurrency)))
    return outcome


def _judge_answer(
    endpoint: Endpoint, answer: httpx2.Response, read: Callable[[str], str | None]
) -> tuple[str, str]:
    """(verdict, reply). Raises Unreadable for one without a verdict, Passing for what is no chat completion at all."""
    try:
        choice = answer.json()["choices"][0]
        message = choice["message"]
        reply, refusal = message.get("content") or "", message.get("refusal") or ""
        filtered = choice.get("finish_reason") == "content_filter"
        if not isinstance(reply, str) or not isinstance(refusal, str):
            raise TypeError
    except (ValueError, LookupError, TypeError, AttributeError):
        raise Passing(
            f"what was answered is no chat completion: {endpoint.says(answer.text)!r}"
        ) from None
    if refusal or filtered:
        return "refused", refusal or reply
    verdict = read(reply)
    if verdict is None:
        raise Unreadable(reply)
    return verdict, reply


def _judge_error(endpoint: Endpoint, answer: httpx2.Response, pace: "_Pace") -> tuple[str, str]:
    """A picture that the endpoint's filter turned away is a refusal; everything else raises."""
    try:
        said = answer.json()["error"]
        codes, text = {said.get("code"), said.get("type")}, str(said.get("message"))
    except (ValueError, LookupError, TypeError, AttributeError):
        codes, text = set(), answer.text
    status, text = answer.status_code, endpoint.says(text)
    told = f"HTTP {status} {text}".strip()
    if codes.intersection(FILTERED):
        return "refused", text
    if status in (401, 402, 403) or codes.intersection(NO_QUOTA):
        raise Closed(told)
    if status != 429 and status < 500 and status not in (408, 409):
        raise Lasting(told)
    wait = _retry_after(answer.headers.get("Retry-After", ""))
    if wait > LONGEST_WAIT:
        raise Closed(f"it wants to be left alone for {wait:.0f} s ({told})")
    pace.pause(wait)
    raise Passing(told)


def _retry_after(value: str) -> float:
    """Seconds, given as such or as a date; 0 for anything else."""
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
    """When the next request may leave: so many a minute, and none while the endpoint wants a rest."""

    def __init__(self, per_minute: float):
        self.gap = 60 / per_minute if per_minute else 0.0
        self.next = self.rest_until = 0.0

    def pause(self, seconds: float) -> None:
        self.rest_until = max(self.rest_until, time.monotonic() + seconds)

    async def turn(self) -> None:
        while (wait := max(self.next, self.rest_until) - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        self.next = max(self.next, time.monotonic()) + self.gap
