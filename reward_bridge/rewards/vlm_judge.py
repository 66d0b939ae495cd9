"""P(yes) by a vision-language model behind an OpenAI-compatible endpoint (vLLM, SGLang, ...)."""

import asyncio
import io
import os
from collections.abc import Sequence
from typing import Any

import httpx2
import numpy as np
import torch
from PIL import Image

from reward_bridge.openai_chat import ChatClient, Endpoint, RequestFailed, check_key, data_url

QUESTION = (
    "Is this picture a real photograph, taken by a camera, rather than a computer-generated image? "
    "Answer with one word, yes or no."
)
SPACES = " \t\r\n▁Ġ"  # the last two mark a leading space in token vocabularies


class VlmJudge:
    """Asks a yes/no question about each picture. The score is P(yes) of the answer's first token.

    P(yes) = p(yes) / (p(yes) + p(no)), where each term sums the spellings, in upper or lower case
    and with or without leading spaces, among the 20 most likely tokens. `{prompt}` in the question
    is replaced by the picture's prompt.

    `url` is the endpoint up to and including /v1, and `api_key_env` the environment variable that
    holds its key, if it needs one. Up to `concurrency` requests run at a time. Each waits up to
    `timeout` seconds for the server's next bytes and is sent up to `attempts` times if the server
    is busy (429), broken (5xx), silent or unreachable. The whole call fails after `deadline`
    seconds; keep that below config.reward.deadline. `device` is not used; "cpu" saves GPU memory.
    """

    def __init__(
        self,
        device: str,
        url: str,
        model: str,
        question: str = QUESTION,
        api_key_env: str | None = None,
        concurrency: int = 8,
        timeout: float = 30.0,
        attempts: int = 4,
        deadline: float = 100.0,
    ):
        self.endpoint = Endpoint(model, url.rstrip("/"), _key_from_environment(api_key_env))
        self.question = question
        self.concurrency = concurrency
        self.timeout = timeout
        self.attempts = attempts
        self.deadline = deadline

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """uint8 [n, 3, h, w] and n prompts -> float32 [n].

        Raises ValueError if the endpoint fails, is too slow, or answers anything but yes or no.
        """
        return asyncio.run(self._score(images.permute(0, 2, 3, 1).cpu().numpy(), prompts))

    async def _score(self, pictures: np.ndarray, prompts: Sequence[str]) -> torch.Tensor:
        """uint8 [n, h, w, 3] and n prompts -> float32 [n]."""
        gate = asyncio.Semaphore(self.concurrency)
        client = ChatClient(self.endpoint, attempts=self.attempts, timeout=self.timeout)
        answers = []
        for picture, prompt in zip(pictures, prompts, strict=True):
            answers.append(self._ask(client, gate, picture, prompt))
        try:
            async with client, asyncio.timeout(self.deadline):
                scores = await asyncio.gather(*answers)
        except TimeoutError:
            raise ValueError(
                f"{self.endpoint.url} has not answered {len(prompts)} questions within "
                f"{self.deadline:g} s (config.reward.options.vlm_judge.deadline)"
            ) from None
        return torch.tensor(scores, dtype=torch.float32)

    async def _ask(
        self, client: ChatClient, gate: asyncio.Semaphore, picture: np.ndarray, prompt: str
    ) -> float:
        """uint8 [h, w, 3] -> P(yes)."""
        # The picture is encoded inside the gate, so that only `concurrency` of them are in memory.
        async with gate:
            try:
                tokens = await client.ask(self._body(picture, prompt), self._read)
            except RequestFailed as error:
                raise ValueError(
                    f"{self.endpoint.url} failed: {error}; check url, model and api_key_env in "
                    "config.reward.options.vlm_judge"
                ) from error
        return p_yes(tokens)

    def _read(self, response: httpx2.Response) -> list[tuple[str, float]]:
        try:
            return top_tokens(response)
        except (ValueError, LookupError, TypeError) as error:
            text = self.endpoint.scrub(response.text)[:200]
            raise ValueError(
                f"{response.url} answered without the first token's log-probabilities: {text!r}; "
                "expected choices[0].logprobs.content[0].top_logprobs: use a server and a model "
                "that return log-probabilities"
            ) from error

    def _body(self, picture: np.ndarray, prompt: str) -> dict[str, Any]:
        """The request: the picture, the question, and the log-probabilities of one token."""
        question = self.question.replace("{prompt}", prompt)
        content = [
            {"type": "image_url", "image_url": {"url": data_url(_png(picture), "png")}},
            {"type": "text", "text": question},
        ]
        return {
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": 20,
        }


def _png(picture: np.ndarray) -> bytes:
    """uint8 [h, w, 3] as a lossless file."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", compress_level=1)
    return file.getvalue()


def top_tokens(response: httpx2.Response) -> list[tuple[str, float]]:
    """Return (token, log-probability) of the most likely tokens at the answer's first position.

    Raises ValueError, LookupError or TypeError if the response has none.
    """
    top = response.json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return [(entry["token"], float(entry["logprob"])) for entry in top]


def p_yes(tokens: Sequence[tuple[str, float]]) -> float:
    """Return P(yes) from (token, log-probability) pairs. A missing answer has probability 0.

    Raises ValueError if neither yes nor no is among the tokens.
    """
    yes = _log_probability("yes", tokens)
    no = _log_probability("no", tokens)
    if yes.isinf() and no.isinf():
        raise ValueError(
            "the model began its answer with neither yes nor no but one of "
            f"{[token for token, _ in tokens[:5]]}; phrase the question so that it has to "
            "(config.reward.options.vlm_judge.question), or use another model"
        )
    return (yes - no).sigmoid().item()


def _log_probability(word: str, tokens: Sequence[tuple[str, float]]) -> torch.Tensor:
    """The log of the summed probabilities of all spellings of a word; -inf if there is none."""
    spellings = [logp for token, logp in tokens if token.strip(SPACES).lower() == word]
    return torch.tensor(spellings, dtype=torch.float64).logsumexp(0)


def _key_from_environment(variable: str | None) -> str:
    """The endpoint's key; "" without a variable."""
    if variable is None:
        return ""
    if variable not in os.environ:
        raise ValueError(
            f"the environment has no variable {variable!r}, the config's "
            "reward.options.vlm_judge.api_key_env; export it with the endpoint's key"
        )
    check_key(os.environ[variable], variable)
    return os.environ[variable]
