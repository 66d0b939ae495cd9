"""Yes/no questions about pictures to a model behind an OpenAI-compatible endpoint (vLLM, ...).

What the rewards `vlm_judge` (one picture a question) and `pairwise_judge` (two) share.
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
from reward_bridge.rewards.yes_no import (
    ANSWER_TOKENS,
    LEAST_MASS,
    no_answer,
    p_answer,
    p_yes,
    top_tokens,
)

# The pictures of a question, uint8 [h, w, 3] each, and their prompt.
Question = tuple[Sequence[np.ndarray], str]


class Refusal(Exception):
    """An answer that is neither yes nor no. The argument says what it was."""


class RefusalError(RewardError, ValueError):
    """The model refused pictures, and the options do not allow that. It would do so again."""


class ChatJudge:
    """Asks yes/no questions about pictures. The answer is P(yes) of its first word.

    P(yes) = p(yes) / (p(yes) + p(no)), where each term sums the spellings, in upper or lower case
    and with or without leading spaces, among the 20 most likely tokens. Tokens without a letter or
    digit before the word, as in "**Yes**", are stepped over (`top_tokens`). `{prompt}` in the
    question is replaced by the pictures' prompt.

    `url` is the endpoint up to and including /v1, and `api_key_env` the environment variable that
    holds its key, if it needs one. Up to `concurrency` requests run at a time. Each waits up to
    `timeout` seconds for the server's next bytes and is sent up to `attempts` times if the server
    is busy (429), broken (5xx), silent or unreachable. The whole call fails after `deadline`
    seconds; keep that below config.reward.deadline. `device` is not used; "cpu" saves GPU memory.

    An answer is a refusal if it is neither yes nor no, if p(yes) + p(no) is below LEAST_MASS, or if
    a content filter rejects the pictures. It is an error, unless `refusal_score` says what it
    counts. Then up to the share `max_refused` of a call's questions may be refused. `refused` is
    the number of refusals so far; they are logged whenever it has doubled.
    """

    name = ""  # of the reward, for errors
    asks = ""  # the question, unless the option `question` has another one
    shown = 1  # pictures in a question

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

    def p_yes(self, questions: Sequence[Question]) -> torch.Tensor:
        """P(yes) of n questions: float32 [n].

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
        """P(yes) of each question, or a refusal."""
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
        """P(yes) of a question, or a refusal."""
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
        """P(yes) of an answer. Raises Refusal, or ValueError without log-probabilities."""
        try:
            choice = response.json()["choices"][0]
            raise_if_filtered(choice)
            tokens = top_tokens(choice)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            text = self.endpoint.scrub(response.text)[:200]
            raise ValueError(
                f"{response.url} answered without the first token's log-probabilities: {text!r}; "
                "expected choices[0].logprobs.content[0].top_logprobs: use a server and a model "
                "that return log-probabilities"
            ) from error

        mass = p_answer(tokens)
        if mass < LEAST_MASS:
            answer = str(choice["message"].get("content"))[:200]
            raise Refusal(
                f"answered {answer!r}: it {no_answer(tokens)}, and P(yes) + P(no) = {mass:.2g} is "
                f"less than {LEAST_MASS}"
            )
        return p_yes(tokens)

    def _body(self, question: Question) -> dict[str, Any]:
        """The request: pictures, question, and the log-probabilities of the first tokens."""
        pictures, prompt = question
        content: list[dict[str, Any]] = []
        for picture in pictures:
            url = data_url(_png(picture), "png")
            content.append({"type": "image_url", "image_url": {"url": url}})
        content.append({"type": "text", "text": self.question.replace("{prompt}", prompt)})
        return {
            "messages": [{"role": "user", "content": content}],
            "max_tokens": ANSWER_TOKENS,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": 20,
        }

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
                f"has to answer yes or no, use another model, or set {self.options}.refusal_score"
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
