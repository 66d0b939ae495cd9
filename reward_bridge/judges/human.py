"""A person as the judge: a page, for this machine only, that shows two pictures and takes clicks or arrow keys."""

import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route

from realgen_jax.realbench.arena import Question, encode
from realgen_jax.realbench.results import Evaluated
from reward_bridge.judges.stand_in import in_thread

PAGE = Path(__file__).parent / "human.html"
Append = Callable[[Question, str, str], Mapping]


def judge_by_hand(
    evaluated: Evaluated,
    left: Sequence[Question],
    total: int,
    append: Append,
    port: int,
    say: Callable[[str], None],
) -> None:
    """Serve the page until the person ends it, there or with Ctrl-C. Every click is appended at once.

    `left` are the questions that are shown, of `total` with those judged before. Raises OSError for a port in use.
    """
    finished, token = threading.Event(), secrets.token_urlsafe(16)
    app = make_app(evaluated, left, total, append, token, finished.set, say)
    with in_thread(app, port) as listener:
        say(
            f"judge here: http://127.0.0.1:{listener.getsockname()[1]}/{token}/   (Ctrl-C ends it; every click is kept)"
        )
        try:
            finished.wait()
        except KeyboardInterrupt:
            say("arena: ended; the same command goes on with the next pair")


def make_app(
    evaluated: Evaluated,
    left: Sequence[Question],
    total: int,
    append: Append,
    token: str,
    finish: Callable[[], None],
    say: Callable[[str], None],
) -> Starlette:
    """The ASGI application. Everything lies below the token, which no other site knows, so none can send a verdict."""
    waiting, judged = list(range(len(left))), []  # numbers of questions

    def state() -> Response:
        n = waiting[0] if waiting else None
        question = left[n] if waiting else None
        return JSONResponse(
            {
                "pair": n,
                "prompt": evaluated.set(question.first.set).prompts[question.first.line]
                if question
                else "",
                "next": waiting[1] if len(waiting) > 1 else None,
                "done": total - len(waiting),
                "total": total,
                "undo": bool(judged),
            }
        )

    async def page(_: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; img-src 'self' data:; connect-src 'self'; style-src 'nonce-{nonce}'; "
            f"script-src 'nonce-{nonce}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        headers = {
            "Content-Security-Policy": policy,
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }
        return HTMLResponse(
            PAGE.read_text(encoding="utf-8").replace("{nonce}", nonce), headers=headers
        )

    async def show(_: Request) -> Response:
        return state()

    async def picture(request: Request) -> Response:
        n, side = request.path_params["n"], request.path_params["side"]
        if n >= len(left) or side not in ("left", "right"):
            raise HTTPException(404)
        try:
            shown = left[n].first if side == "left" else left[n].second
            content = await run_in_threadpool(encode, shown, "PNG")
        except ValueError as error:
            if n in waiting:
                waiting.remove(n)
                say(f"arena: {error}; its pair is left out")
            raise HTTPException(410) from None
        return Response(
            content, media_type="image/png", headers={"Cache-Control": "private, max-age=600"}
        )

    async def verdict(request: Request) -> Response:
        given = await _json(request)
        n, said = given.get("pair"), given.get("verdict")
        if said not in ("first", "second", "tie"):
            raise HTTPException(400, "verdict: expected first, second or tie")
        if n in waiting:  # not the second click on it
            append(left[n], said, "")
            waiting.remove(n)
            judged.append(n)
        return state()

    async def undo(_: Request) -> Response:
        if judged:
            n = judged.pop()
            append(left[n], "undone", "")
            waiting.insert(0, n)
        return state()

    async def end(_: Request) -> Response:
        finish()
        return JSONResponse({})

    routes = [
        Route("/", page),
        Route("/pair", show),
        Route("/picture/{n:int}/{side}", picture),
        Route("/verdict", verdict, methods=["POST"]),
        Route("/undo", undo, methods=["POST"]),
        Route("/finish", end, methods=["POST"]),
    ]
    hosts = Middleware(
        TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"], www_redirect=False
    )
    return Starlette(routes=[Mount(f"/{token}", routes=routes)], middleware=[hosts])


async def _json(request: Request) -> Mapping:
    try:
        given = await request.json()
    except ValueError:
        given = None
    if not isinstance(given, dict):
        raise HTTPException(400, "expected a JSON object")
    return given
