"""A reward behind an OpenAI-compatible endpoint, to try `--judge api` without a network.

    GET  /v1/models             the one model, named after its reward
    POST /v1/chat/completions   a chat with two pictures as data URLs -> the one that scores higher,
                                in the format that its text asks for ("Verdict:", or RealGen's
                                "More Realistic Image:")

Errors are {"error": {"message", "type", "code"}}: 400 for any other body, 404 for an unknown model
or page, 413 for too many bytes, 500 if the reward failed.
"""

import base64
import contextlib
import json
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from reward_bridge.bridge import Reward
from reward_bridge.judges.local_server import serve_in_thread
from reward_bridge.judges.reward import FORMATS, MARGIN, answer_for, decode_picture, score_picture
from reward_bridge.rewards import make_reward

BODY_MIB = 128  # two large lossless pictures in base64


@contextlib.contextmanager
def serving(
    reward: str, port: int = 0, device: str = "cpu", margin: float = MARGIN
) -> Iterator[str]:
    """Serve this machine from a thread; yields the address up to and including /v1.

    Port 0 takes a free one. Raises ValueError for a reward that cannot be built, OSError for a port
    in use.
    """
    app = make_app(reward, make_reward(reward, device, {}), margin)
    with serve_in_thread(app, port) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


def make_app(name: str, reward: Reward, margin: float) -> Starlette:
    """Return the ASGI application. Pictures are scored one at a time, on the reward's device."""
    stand_in = _StandIn(name, reward, margin)
    return Starlette(
        routes=[
            Route("/v1/chat/completions", stand_in.complete, methods=["POST"]),
            Route("/v1/models", stand_in.models),
        ],
        exception_handlers={HTTPException: _error},
    )


class _StandIn:
    """The endpoint's two request handlers."""

    def __init__(self, name: str, reward: Reward, margin: float):
        self.name = name
        self.reward = reward
        self.margin = margin
        self._one_at_a_time = threading.Lock()

    async def models(self, _: Request) -> Response:
        model = {"id": self.name, "object": "model", "owned_by": "realgen_jax"}
        return JSONResponse({"object": "list", "data": [model]})

    async def complete(self, request: Request) -> Response:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > BODY_MIB * 2**20:
                raise HTTPException(413, f"the body is over {BODY_MIB} MiB; send smaller pictures")
        return JSONResponse(await run_in_threadpool(self.answer, bytes(body)))

    def answer(self, body: bytes) -> dict[str, Any]:
        """Return the chat completion for a request's body. Raises HTTPException."""
        # -- Read the request.
        model, text, urls = _parse(body)
        if model != self.name:
            raise HTTPException(
                404, f"there is no model {model!r} here; this server has {self.name!r}"
            )
        try:
            answer = answer_for(text)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        pictures = [_decode(url) for url in urls]

        # -- Score both pictures.
        try:
            with self._one_at_a_time:
                scores = [score_picture(self.reward, picture) for picture in pictures]
        except Exception as error:
            raise HTTPException(500, f"the reward {self.name} failed: {error}") from error

        return _completion(self.name, answer(scores, self.margin))


def _completion(model: str, content: str) -> dict[str, Any]:
    """A chat completion in OpenAI's format."""
    message = {"role": "assistant", "content": content, "refusal": None}
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
    }


def _parse(body: bytes) -> tuple[str, str, list[str]]:
    """Return (model, all text, both pictures' URLs) of a chat."""
    try:
        request = json.loads(body)
        model = request["model"]
        parts = []
        for message in request["messages"]:
            content = message["content"]
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
            parts += content
        text = "\n".join(part["text"] for part in parts if part["type"] == "text")
        urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        streams = request.get("stream")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise HTTPException(
            400, f"the body is not a chat: {type(error).__name__} {error}"
        ) from None

    if streams:
        raise HTTPException(400, "this server does not stream; send the request without stream")
    if len(urls) != 2:
        raise HTTPException(400, f"the chat has {len(urls)} pictures (image_url); expected two")
    return model, text, urls


def _decode(url: str) -> np.ndarray:
    """A data URL -> uint8 [h, w, 3]."""
    try:
        head, _, data = url.partition(",")
        if not (head.startswith("data:image/") and head.endswith(";base64")):
            raise ValueError("it has another prefix")
        return decode_picture(base64.b64decode(data, validate=True))
    except (ValueError, AttributeError) as error:
        raise HTTPException(
            400,
            f"a picture is not a data URL of {', '.join(FORMATS)} in base64, "
            f"data:image/png;base64,...: {error}",
        ) from None


async def _error(_: Request, error: HTTPException) -> Response:
    """An error in OpenAI's format."""
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    code = "model_not_found" if error.status_code == 404 else None
    content = {"message": error.detail, "type": kind, "param": None, "code": code}
    return JSONResponse({"error": content}, error.status_code)
