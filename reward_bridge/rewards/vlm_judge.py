"""P(yes) by any vision-language model behind an OpenAI-compatible endpoint (vLLM, SGLang, a hosted one)."""

import asyncio
import base64
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import httpx2
import numpy as np
import tenacity
import torch
from PIL import Image

QUESTION = (
    "Is this picture a real photograph, taken by a camera, rather than a computer-generated image? "
    "Answer with one word, yes or no."
)
SPACES = " \t\r\n▁Ġ"  # the last two: how vocabularies write a leading space


class VlmJudge:
    """One yes/no question about each picture; the score is P(yes) of the answer's first token.

    P(yes) = p(yes) / (p(yes) + p(no)), each summed over upper and lower case and leading spaces among the 20 likeliest
    tokens. `{prompt}` in the question stands for the picture's prompt.

    `url` is the endpoint up to and with /v1, `api_key_env` the environment variable that holds its key, if it wants
    one. `concurrency` requests run at a time. Each waits `timeout` seconds for the server's next word, and is sent up
    to `attempts` times where the server is busy (429), broken (5xx), silent or out of reach; `deadline` seconds after
    the call nothing is waited for any more: keep it below config.reward.deadline. `device` plays no part: "cpu" saves
    the GPU's memory.
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
        self.url, self.model, self.question = f"{url.rstrip('/')}/chat/completions", model, question
        self.concurrency, self.timeout, self.deadline = concurrency, timeout, deadline
        self.headers = _authorization(api_key_env)
        self.retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(_may_pass),
            stop=tenacity.stop_after_attempt(attempts),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=20),
            reraise=True,
        )

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return asyncio.run(self._score(images.permute(0, 2, 3, 1).cpu().numpy(), prompts))

    async def _score(self, pictures: np.ndarray, prompts: Sequence[str]) -> torch.Tensor:
        gate = asyncio.Semaphore(self.concurrency)
        async with httpx2.AsyncClient(headers=self.headers, timeout=self.timeout) as http:
            try:
                async with asyncio.timeout(self.deadline):
                    answers = [
                        self._ask(http, gate, *pair) for pair in zip(pictures, prompts, strict=True)
                    ]
                    return torch.tensor(await asyncio.gather(*answers), dtype=torch.float32)
            except TimeoutError:
                raise ValueError(
                    f"{self.url} has not answered {len(prompts)} questions within {self.deadline:g} s "
                    "(config.reward.options.vlm_judge.deadline)"
                ) from None

    async def _ask(
        self, http: httpx2.AsyncClient, gate: asyncio.Semaphore, picture: np.ndarray, prompt: str
    ) -> float:
        """uint8 [h, w, 3] -> P(yes). Raises ValueError where the endpoint fails or answers anything else."""
        question = self.question.replace("{prompt}", prompt)
        try:
            async with (
                gate
            ):  # a picture is written as a file when its turn comes, not all of them at once
                image = {"type": "image_url", "image_url": {"url": data_url(picture)}}
                body = {
                    "model": self.model,
                    "messages": [
                        {"role": "user", "content": [image, {"type": "text", "text": question}]}
                    ],
                    "max_tokens": 1,
                    "temperature": 0,
                    "logprobs": True,
                    "top_logprobs": 20,
                }
                answer = await self.retrying(self._post, http, body)
        except httpx2.HTTPError as error:
            said = error.response.text[:200] if isinstance(error, httpx2.HTTPStatusError) else ""
            raise ValueError(
                f"{self.url} failed: {error!r} {said}; check url, model and api_key_env in "
                "config.reward.options.vlm_judge"
            ) from error
        return p_yes(top_tokens(answer))

    async def _post(self, http: httpx2.AsyncClient, body: Mapping[str, Any]) -> httpx2.Response:
        return (await http.post(self.url, json=body)).raise_for_status()


def data_url(picture: np.ndarray) -> str:
    """uint8 [h, w, 3] as a lossless PNG in text."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def top_tokens(answer: httpx2.Response) -> list[tuple[str, float]]:
    """(token, log-probability) of the likeliest at the answer's first position."""
    try:
        top = answer.json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return [(entry["token"], float(entry["logprob"])) for entry in top]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{answer.url} answered without the first token's log-probabilities: {answer.text[:200]!r}; expected "
            "choices[0].logprobs.content[0].top_logprobs: take a server and a model that give logprobs"
        ) from error


def p_yes(tokens: Sequence[tuple[str, float]]) -> float:
    """Of (token, log-probability). A side that is not among the tokens counts as 0; raises ValueError without both."""

    def total(word: str) -> torch.Tensor:
        found = [logp for token, logp in tokens if token.strip(SPACES).lower() == word]
        return torch.tensor(found, dtype=torch.float64).logsumexp(0)

    yes, no = total("yes"), total("no")
    if yes.isinf() and no.isinf():
        raise ValueError(
            f"the model began its answer with neither yes nor no but one of {[token for token, _ in tokens[:5]]}; put "
            "the question so that it must (config.reward.options.vlm_judge.question), or take another model"
        )
    return (yes - no).sigmoid().item()


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, httpx2.HTTPStatusError):
        return error.response.status_code == 429 or error.response.status_code >= 500
    return isinstance(error, httpx2.TransportError)


def _authorization(api_key_env: str | None) -> dict[str, str]:
    if api_key_env is None:
        return {}
    if api_key_env not in os.environ:
        raise ValueError(
            f"the environment has no variable {api_key_env!r}, the config's reward.options.vlm_judge.api_key_env; "
            "export it with the endpoint's key"
        )
    return {"Authorization": f"Bearer {os.environ[api_key_env]}"}
