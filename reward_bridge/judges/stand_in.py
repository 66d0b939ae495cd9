"""A judge of pictures that needs no network: a reward's scores, spoken as an OpenAI-compatible chat model speaks.

    GET  /v1/models             the one model, named after its reward
    POST /v1/chat/completions   a chat with two pictures as data URLs -> the one that scores higher, in the form that
                                its text demands ("Verdict:", or RealGen's "More Realistic Image:")

Errors are {"error": {"message", "type", "code"}}: 400 the body is not that, 404 no such model or page, 413 too many
bytes, 500 the reward failed.
"""

import base64
import binascii
import contextlib
import io
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from reward_bridge.bridge import Reward
from reward_bridge.rewards import make_reward
from reward_bridge.server import bind

BODY_MIB = 128  # two large lossless pictures in base64
MARGIN = 0.01  # of scores; closer ones are a tie
FORMATS = ("PNG", "JPEG", "WEBP")


def say_verdict(scores: Sequence[float], margin: float) -> str:
    difference = scores[0] - scores[1]
    return f"Verdict: {'tie' if abs(difference) < margin or not difference else '1' if difference > 0 else '2'}"


def say_realgen(scores: Sequence[float], margin: float) -> str:
    """RealGen's question knows no tie: whatever is higher wins, and equal ones get an answer that names neither."""
    difference = scores[0] - scores[1]
    chosen = "neither" if not difference else "Image 1" if difference > 0 else "Image 2"
    return f"More Realistic Image: {chosen}\nReason: scores of {scores[0]:.4f} and {scores[1]:.4f}."


FORMS: dict[str, Callable[[Sequence[float], float], str]] = {
    "verdict:": say_verdict,
    "more realistic image:": say_realgen,
}


def make_app(name: str, reward: Reward, margin: float) -> Starlette:
    """The ASGI application; the pictures are scored one at a time, on the device that the reward was made for."""
    one_at_a_time = threading.Lock()

    def score(picture: np.ndarray) -> float:
        with one_at_a_time, torch.inference_mode():
            return float(reward(torch.from_numpy(picture).permute(2, 0, 1)[None], [""])[0])

    def answer(body: bytes) -> dict:
        model, text, urls = _parse(body)
        if model != name:
            raise HTTPException(404, f"there is no model {model!r} here; this server has {name!r}")
        form = next((say for words, say in FORMS.items() if words in text.lower()), None)
        if form is None:
            raise HTTPException(
                400, f"the text demands no form of answer that is known: {', '.join(FORMS)}"
            )
        pictures = [_decode(url) for url in urls]
        try:
            scores = [score(picture) for picture in pictures]
        except Exception as error:
            raise HTTPException(500, f"the reward {name} failed: {error}") from error
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": name,
            "choices": [
                {
                    "index": 0,
                    "message": {
                        "role": "assistant",
                        "content": form(scores, margin),
                        "refusal": None,
                    },
                    "finish_reason": "stop",
                }
            ],
            "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
        }

    async def complete(request: Request) -> Response:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > BODY_MIB * 2**20:
                raise HTTPException(413, f"the body is over {BODY_MIB} MiB; send smaller pictures")
        return JSONResponse(await run_in_threadpool(answer, bytes(body)))

    async def models(_: Request) -> Response:
        return JSONResponse(
            {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "realgen_jax"}]}
        )

    return Starlette(
        routes=[
            Route("/v1/chat/completions", complete, methods=["POST"]),
            Route("/v1/models", models),
        ],
        exception_handlers={HTTPException: _error},
    )


@contextlib.contextmanager
def serving(
    reward: str, port: int = 0, device: str = "cpu", margin: float = MARGIN
) -> Iterator[str]:
    """The server in a thread, for this machine only; gives its address, up to and with /v1.

    Raises ValueError for a reward that cannot be made, OSError for a port that is taken; 0 takes a free one.
    """
    app = make_app(reward, make_reward(reward, device, {}), margin)
    with in_thread(app, port) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


@contextlib.contextmanager
def in_thread(app: Starlette, port: int) -> Iterator:
    """Any ASGI application behind 127.0.0.1 while the block runs; gives the listening socket."""
    listener = bind("127.0.0.1", port, "")
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    listener.listen()  # who asks before the thread is ready waits
    thread.start()
    try:
        yield listener
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def _parse(body: bytes) -> tuple[str, str, list[str]]:
    """(model, all text, both pictures' URLs) of a chat."""
    try:
        asked = json.loads(body)
        model, messages = asked["model"], asked["messages"]
        parts = []
        for message in messages:
            content = message["content"]
            parts += [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = "\n".join(part["text"] for part in parts if part["type"] == "text")
        urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        streams = asked.get("stream")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise HTTPException(400, f"the body is no chat: {type(error).__name__} {error}") from None
    if streams:
        raise HTTPException(400, "answers are not streamed here; ask without stream")
    if len(urls) != 2:
        raise HTTPException(400, f"the chat has {len(urls)} pictures (image_url); expected two")
    return model, text, urls


def _decode(url: str) -> np.ndarray:
    """A data URL -> uint8 [h, w, 3]."""
    try:
        head, _, data = url.partition(",")
        if not (head.startswith("data:image/") and head.endswith(";base64")):
            raise ValueError("it begins otherwise")
        with Image.open(
            io.BytesIO(base64.b64decode(data, validate=True)), formats=FORMATS
        ) as image:
            return np.array(image.convert("RGB"))
    except (
        ValueError,
        OSError,
        AttributeError,
        SyntaxError,
        binascii.Error,
        Image.DecompressionBombError,
    ) as error:
        raise HTTPException(
            400,
            f"a picture is no data URL of {', '.join(FORMATS)} in base64, data:image/png;base64,...: {error}",
        ) from None


async def _error(_: Request, error: HTTPException) -> Response:
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    code = "model_not_found" if error.status_code == 404 else None
    return JSONResponse(
        {"error": {"message": error.detail, "type": kind, "param": None, "code": code}},
        error.status_code,
    )
