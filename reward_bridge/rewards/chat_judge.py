"""Questions about pictures to a model behind an OpenAI-compatible endpoint (vLLM, ...).

What the rewards by chat models share. What they ask, and how an answer becomes a score, is in
yes_no.py (P(yes)), deqa.py (words for levels) and ratings.py (numbers).
"""

import asyncio
import io
import logging
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import torch
from PIL import Image

from reward_bridge.addresses import is_address
from reward_bridge.openai_chat import (
    ChatClient,
    ContentFiltered,
    Endpoint,
    RequestFailed,
    check_key,
    data_url,
)
from reward_bridge.reward import RewardError

# The pictures of a question, uint8 [h, w, 3] each, and their prompt.
Question = tuple[Sequence[np.ndarray], str]


class Refusal(Exception):
    """An answer that gives no score. The argument says what it was."""


class RefusalError(RewardError, ValueError):
    """The model refused pictures, and the options do not allow that. It would do so again."""


class ChatJudge:
    """Asks questions about pictures and makes a score of each answer, with `read`.

    `{prompt}` in the question is replaced by the pictures' prompt.

    `url` is the endpoint up to and including /v1, and `api_key_env` the environment variable that
    holds its key, if it needs one. Up to `concurrency` requests run at a time. Each waits up to
    `timeout` seconds for the server's next bytes and is sent up to `attempts` times if the server
    is busy (429), broken (5xx), silent or unreachable. The whole call fails after `deadline`
    seconds; keep that below config.reward.deadline. `device` is not used; "cpu" saves GPU memory.

    `request` holds entries of the requests that replace `sampling`'s or are added to them; None
    removes one. With "n" above 1, a score is the mean over the answers of a request.

    An answer is a refusal if `read` makes no score of it, or if a content filter rejects the
    pictures. It is an error, unless `refusal_score` says what it counts. Then up to the share
    `max_refused` of a call's questions may be refused. `refused` is the number of refusals so far;
    they are logged whenever it has doubled.
    """

    name = ""  # of the reward, for errors
    asks = ""  # the question, unless the option `question` has another one
    shown = 1  # pictures in a question
    expected = ""  # what the question must make the model answer, for errors
    needs = ""  # what an answer of the endpoint must hold, for errors
    place = ""  # where in the answer that is, and what helps if it is not there
    sampling: Mapping[str, Any] = {}  # entries of a request besides model and messages

    def __init__(
        self,
        device: str,
        url: str,
        model: str,
        question: str | None = None,
        api_key_env: str | None = None,
        concurrency: int = 8,
        timeout: float = 30.0,
        attempts: int = 4,
        deadline: float = 100.0,
        refusal_score: float | None = None,
        max_refused: float = 0.1,
        request: Mapping[str, Any] | None = None,
    ):
        self.options = f"config.reward.options.{self.name}"
        if not is_address(url):
            raise ValueError(
                f"{self.options}.url is {url!r}; expected an address such as "
                "http://localhost:8000/v1"
            )
        if refusal_score is not None and not math.isfinite(refusal_score):
            raise ValueError(f"{self.options}.refusal_score is {refusal_score}; expected a number")
        if not 0 < max_refused <= 1:
            raise ValueError(
                f"{self.options}.max_refused is {max_refused}; expected a share above 0, at most 1"
            )
        key = _key_from_environment(api_key_env, self.options)
        self.endpoint = Endpoint(model, url.rstrip("/"), key)
        self.question = question or self.asks
        self.concurrency = concurrency
        self.timeout = timeout
        self.attempts = attempts
        self.deadline = deadline
        self.refusal_score = refusal_score
        self.max_refused = max_refused
        entries = {**self.sampling, **(request or {})}
        self.request = {key: value for key, value in entries.items() if value is not None}
        self.refused = 0
        self._refused_when_told = 0

    def check_connection(self) -> None:
        """Ask about a grey picture, whatever the answer. Raises ValueError as a call does."""
        asyncio.run(self._check())
        picture = np.full((64, 64, 3), 128, np.uint8)
        asyncio.run(self._answers([((picture,) * self.shown, "a grey square")]))

    async def _check(self) -> None:
        async with self._client() as client:
            try:
                await client.check()
            except RequestFailed as error:
                raise self._failure(error) from error

    def read(self, choice: Mapping[str, Any]) -> float:
        """The score of a choice of a chat completion.

        Raises Refusal if it gives none, and ValueError, LookupError, TypeError or AttributeError if
        it lacks what `needs` names.
        """
        raise NotImplementedError

    def ask_each(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Ask about each picture, uint8 [n, 3, h, w]: float32 [n]. Raises as `ask` does."""
        pictures = images.permute(0, 2, 3, 1).cpu().numpy()
        return self.ask(
            [((picture,), text) for picture, text in zip(pictures, prompts, strict=True)]
        )

    def ask(self, questions: Sequence[Question]) -> torch.Tensor:
        """The scores of n questions' answers: float32 [n].

        Raises ValueError if the endpoint fails or is too slow, and RefusalError for more refusals
        than the options allow.
        """
        answers = asyncio.run(self._answers(questions))

        refusals = {}
        scores = []
        for number, answer in enumerate(answers):
            if isinstance(answer, Refusal):
                refusals[number] = answer
            scores.append(self.refusal_score if isinstance(answer, Refusal) else answer)
        if refusals:
            self._count(refusals, questions)
        return torch.tensor(scores, dtype=torch.float32)

    def _client(self) -> ChatClient:
        name = f"the judge {self.endpoint.model} at {self.endpoint.url}"
        return ChatClient(self.endpoint, name=name, attempts=self.attempts, timeout=self.timeout)

    def _failure(self, error: RequestFailed, detail: str = "") -> ValueError:
        return ValueError(
            f"{self.endpoint.url} failed: {error}; check url, model and api_key_env in "
            f"{self.options}{detail}"
        )

    async def _answers(self, questions: Sequence[Question]) -> list[float | Refusal]:
        """The score of each question's answer, or a refusal."""
        gate = asyncio.Semaphore(self.concurrency)
        client = self._client()
        answers = [self._ask(client, gate, question) for question in questions]
        try:
            async with client, asyncio.timeout(self.deadline):
                return await asyncio.gather(*answers)
        except TimeoutError:
            raise ValueError(
                f"{self.endpoint.url} has not answered {len(questions)} questions within "
                f"{self.deadline:g} s ({self.options}.deadline)"
            ) from None

    async def _ask(
        self, client: ChatClient, gate: asyncio.Semaphore, question: Question
    ) -> float | Refusal:
        """The score of a question's answer, or a refusal."""
        # Pictures are encoded inside the gate, so that only `concurrency` questions are in memory.
        async with gate:
            try:
                return await client.ask(self._body(question), self._read)
            except Refusal as refusal:
                return refusal
            except ContentFiltered as error:
                return Refusal(f"rejected it by a content filter ({error})")
            except RequestFailed as error:
                raise self._failure(error, f"; the prompt was {question[1]!r}") from error

    def _read(self, response: httpx2.Response) -> float:
        """The mean score of an answer's choices. Raises Refusal, or ValueError without `needs`."""
        try:
            scores = []
            for choice in response.json()["choices"]:
                raise_if_filtered(choice)
                scores.append(self.read(choice))
            return sum(scores) / len(scores)
        except (ValueError, LookupError, TypeError, AttributeError, ZeroDivisionError) as error:
            text = self.endpoint.scrub(response.text)[:200]
            raise ValueError(
                f"{response.url} answered without {self.needs}: {text!r}; expected {self.place}"
            ) from error

    def _body(self, question: Question) -> dict[str, Any]:
        """The request: pictures, question, and how the model shall answer."""
        pictures, prompt = question
        content: list[dict[str, Any]] = []
        for picture in pictures:
            url = data_url(_png(picture), "png")
            content.append({"type": "image_url", "image_url": {"url": url}})
        content.append({"type": "text", "text": self.question.replace("{prompt}", prompt)})
        return {"messages": [{"role": "user", "content": content}], **self.request}

    def _count(self, refusals: Mapping[int, Refusal], questions: Sequence[Question]) -> None:
        """Count refusals {number of the question: refusal}. Raises RefusalError for too many."""
        self.refused += len(refusals)
        allowed = 0.0 if self.refusal_score is None else self.max_refused
        is_error = len(refusals) > allowed * len(questions)
        if not is_error and self.refused < 2 * self._refused_when_told:
            return
        self._refused_when_told = self.refused

        # Keep the first of the refused pictures, to look at it.
        number = min(refusals)
        pictures, prompt = questions[number]
        asked = "pictures" if self.shown == 1 else "pairs of pictures"
        said = self.endpoint.scrub(
            f"{self.endpoint.model} refused {len(refusals)} of {len(questions)} {asked}; for the "
            f"prompt {prompt!r} it {refusals[number]}"
        )
        said += f"; the picture is kept: {_keep(pictures[0])}"

        if not is_error:
            logging.getLogger(__name__).warning(
                "reward %r: %s; each refusal counts %g, %d so far",
                self.name,
                said,
                self.refusal_score,
                self.refused,
            )
        elif self.refusal_score is None:
            raise RefusalError(
                f"reward {self.name!r}: {said}; phrase {self.options}.question so that the model "
                f"has to answer {self.expected}, use another model, or set "
                f"{self.options}.refusal_score"
            )
        else:
            raise RefusalError(
                f"reward {self.name!r}: {said}; more than {self.options}.max_refused, "
                f"{self.max_refused:g}"
            )


def _keep(picture: np.ndarray) -> str:
    """Write uint8 [h, w, 3] to a file among the temporary ones; return its path, or why not."""
    try:
        with tempfile.NamedTemporaryFile(prefix="refused_", suffix=".png", delete=False) as file:
            file.write(_png(picture))
    except OSError as error:
        return f"not, because of {error}"
    return str(Path(file.name))


def _png(picture: np.ndarray) -> bytes:
    """uint8 [h, w, 3] as a lossless file."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", compress_level=1)
    return file.getvalue()


def raise_if_filtered(choice: Mapping[str, Any]) -> None:
    """Raise Refusal if a choice of a chat completion says that the request was refused."""
    refusal = choice["message"].get("refusal")
    if refusal:
        raise Refusal(f"answered {str(refusal)[:200]!r}")
    if choice.get("finish_reason") == "content_filter":
        raise Refusal("was stopped by a content filter")


def _key_from_environment(variable: str | None, options: str) -> str:
    """The endpoint's key; "" without a variable."""
    if variable is None:
        return ""
    if variable not in os.environ:
        raise ValueError(
            f"the environment has no variable {variable!r}, the config's "
            f"{options.removeprefix('config.')}.api_key_env; export it with the endpoint's key"
        )
    check_key(os.environ[variable], variable)
    return os.environ[variable]
