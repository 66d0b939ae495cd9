"""A vision-language model as the judge, behind any OpenAI-compatible endpoint that takes pictures.

The endpoint's address and key are never printed or stored, and no error contains them.
"""

import asyncio
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx2

from reward_bridge.addresses import is_address
from reward_bridge.judges import Failures, Keep, Question, Say
from reward_bridge.openai_chat import (
    ChatClient,
    ContentFiltered,
    Endpoint,
    EndpointUnavailable,
    RequestFailed,
    TemporaryFailure,
    check_key,
    data_url,
)

URL_ENV = "REALGEN_JUDGE_URL"
MODEL_ENV = "REALGEN_JUDGE_MODEL"
KEY_ENV = "REALGEN_JUDGE_KEY"


class NoVerdict(TemporaryFailure):
    """A reply without a verdict. The argument is the reply."""


class ApiJudge:
    """Asks a model behind an endpoint, several questions at a time."""

    is_person = False

    def __init__(self, endpoint: Endpoint, settings: Any):
        """settings: config.evaluate.arena."""
        self.name = endpoint.model
        self.endpoint = endpoint
        self.settings = settings

    def check_connection(self) -> None:
        """Raise ValueError if nothing answers at the endpoint, or if it refuses the key."""
        try:
            asyncio.run(self._check())
        except RequestFailed as error:
            raise ValueError(
                f"{_name(self.endpoint)} cannot be asked: {error}; check {URL_ENV} and {KEY_ENV}"
            ) from None

    async def _check(self) -> None:
        async with _client(self.endpoint, self.settings) as client:
            await client.check()

    def compare(
        self, questions: Sequence[Question], *, answered: int, keep: Keep, say: Say
    ) -> None:
        """Ask all questions and `keep` each verdict at once; say which questions failed."""
        failures = asyncio.run(ask_all(self.endpoint, questions, self.settings, keep))
        failures.report(self.name, say)


def endpoint_from_environment() -> Endpoint:
    """Return the endpoint that the environment variables describe.

    Raises ValueError naming the variable that is missing or wrong, without its value.
    """
    url = os.environ.get(URL_ENV, "").strip()
    model = os.environ.get(MODEL_ENV, "").strip()
    key = os.environ.get(KEY_ENV, "").strip()

    for name, value in ((URL_ENV, url), (MODEL_ENV, model)):
        if not value:
            raise ValueError(
                f"the environment has no {name}; export {URL_ENV} (the endpoint up to and "
                f"including /v1), {MODEL_ENV} and, if the endpoint needs a key, {KEY_ENV}"
            )

    if not is_address(url):
        raise ValueError(
            f"{URL_ENV} holds no address; expected one such as https://api.example.com/v1"
        )

    check_key(key, KEY_ENV)
    return Endpoint(model, url.rstrip("/"), key)


async def ask_all(
    endpoint: Endpoint, questions: Sequence[Question], settings: Any, keep: Keep
) -> Failures:
    """Ask `settings.concurrency` questions at a time and `keep` each verdict and reply at once.

    If a reply has no verdict, the question is asked again, up to `settings.attempts` times in all,
    as after a temporary failure of the endpoint. If the last reply has none either, the verdict is
    "unreadable". A question without a reply has failed and is not kept. Asking stops after
    `settings.max_failures` failures in a row, or as soon as the endpoint says that it will not
    answer any more.

    No temperature or token limit is sent, because several hosted models reject them.
    """
    session = _Session(endpoint, settings, keep)
    remaining = iter(questions)
    async with _client(endpoint, settings, lambda: bool(session.failures.stopped)) as client:
        workers = [session.work(client, remaining) for _ in range(settings.concurrency)]
        await asyncio.gather(*workers)
    return session.failures


def _name(endpoint: Endpoint) -> str:
    """What errors and log lines call the judge."""
    return f"the judge {endpoint.model}"


def _client(
    endpoint: Endpoint, settings: Any, stopped: Callable[[], bool] = lambda: False
) -> ChatClient:
    return ChatClient(
        endpoint,
        name=_name(endpoint),
        attempts=settings.attempts,
        timeout=settings.timeout,
        total_timeout=settings.timeout,
        requests_per_minute=settings.requests_per_minute,
        stopped=stopped,
    )


class _Session:
    """What the workers of one call share: the failures so far, and how many came in a row."""

    def __init__(self, endpoint: Endpoint, settings: Any, keep: Keep):
        self.endpoint = endpoint
        self.max_failures = settings.max_failures
        self.keep = keep
        self.failures = Failures()
        self.in_a_row = 0

    async def work(self, client: ChatClient, remaining: Iterator[Question]) -> None:
        """Ask one question after another until none is left or asking has stopped."""
        for question in remaining:
            await self.ask(client, question)
            if self.failures.stopped:
                return

    async def ask(self, client: ChatClient, question: Question) -> None:
        """Ask one question; keep its verdict, or count its failure."""

        def read(response: httpx2.Response) -> tuple[str, str]:
            return read_reply(self.endpoint, response, question)

        try:
            # Encoding two pictures takes a while, so it runs in a thread.
            message = await asyncio.to_thread(make_message, question)
            body = {"messages": [{"role": "user", "content": message}]}
            verdict, reply = await client.ask(body, read)
        except NoVerdict as error:
            verdict, reply = "unreadable", str(error)
        except ContentFiltered as error:
            verdict, reply = "refused", str(error)
        except EndpointUnavailable as error:
            self.failures.stopped = str(error)
            return
        except (RequestFailed, ValueError) as error:
            self._count_failure(str(error))
            return

        self.in_a_row = 0
        self.keep(question, verdict, self.endpoint.scrub(reply))

    def _count_failure(self, reason: str) -> None:
        self.in_a_row += 1
        self.failures.reasons[reason] += 1
        if self.in_a_row >= self.max_failures and not self.failures.stopped:
            self.failures.stopped = (
                f"{self.in_a_row} questions in a row failed, the last one: {reason}"
            )


def make_message(question: Question) -> list[dict[str, Any]]:
    """Return the content of a chat message: the text, then both pictures.

    Raises ValueError if a picture has changed since it was scored.
    """
    content: list[dict[str, Any]] = [{"type": "text", "text": question.text}]
    for position in ("first", "second"):
        url = data_url(question.picture(position), question.image_format.lower())
        content.append({"type": "image_url", "image_url": {"url": url}})
    return content


def read_reply(
    endpoint: Endpoint, response: httpx2.Response, question: Question
) -> tuple[str, str]:
    """Return (verdict, reply) of a chat completion.

    Raises NoVerdict if the reply has no verdict, TemporaryFailure for anything but a chat
    completion.
    """
    try:
        choice = response.json()["choices"][0]
        message = choice["message"]
        reply = message.get("content") or ""
        refusal = message.get("refusal") or ""
        filtered = choice.get("finish_reason") == "content_filter"
        if not isinstance(reply, str) or not isinstance(refusal, str):
            raise TypeError
    except (ValueError, LookupError, TypeError, AttributeError):
        raise TemporaryFailure(
            f"the response is not a chat completion: {endpoint.excerpt(response.text)!r}"
        ) from None

    if refusal or filtered:
        return "refused", refusal or reply
    verdict = question.read(reply)
    if verdict is None:
        raise NoVerdict(reply)
    return verdict, reply


def make_judge(settings: Any) -> ApiJudge:
    """The judge `api`, for the endpoint in the environment. settings: config.evaluate.arena."""
    return ApiJudge(endpoint_from_environment(), settings)
