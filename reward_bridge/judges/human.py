"""A person as the judge, on a local web page that shows two pictures.

The page is only reachable from this machine. The person chooses with clicks or arrow keys.
"""

import secrets
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route

from reward_bridge.judges import Keep, Question, Say
from reward_bridge.judges.local_server import serve_in_thread

PAGE = Path(__file__).parent / "human.html"
POSITIONS = {"left": "first", "right": "second"}


class HumanJudge:
    """Shows every pair to a person and stores each verdict when it is given."""

    name = "human"
    is_person = True

    def __init__(self, port: int):
        """port: of the page; 0 takes a free one."""
        self.port = port

    def compare(
        self, questions: Sequence[Question], *, answered: int, keep: Keep, say: Say
    ) -> None:
        """Serve the page until the person ends the session, on the page or with Ctrl-C.

        answered: the number of pairs judged in earlier calls. Raises OSError for a port in use.
        """
        finished = threading.Event()
        token = secrets.token_urlsafe(16)
        page = JudgingPage(questions, answered, keep, finished.set, say)
        with serve_in_thread(page.app(token), self.port) as listener:
            address = f"http://127.0.0.1:{listener.getsockname()[1]}/{token}/"
            say(f"judge here: {address}   (Ctrl-C ends it; every verdict is saved at once)")
            if not _wait_or_interrupt(finished):
                say("arena: ended; run the same command again to continue with the next pair")


def _wait_or_interrupt(finished: threading.Event) -> bool:
    """Wait for the event. Returns False if Ctrl-C came first, which here ends only the session.

    In another thread than the main one, Ctrl-C keeps its meaning.
    """
    if threading.current_thread() is not threading.main_thread():
        return finished.wait()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return finished.wait()
    except KeyboardInterrupt:
        return False
    finally:
        signal.signal(signal.SIGINT, before)


class JudgingPage:
    """The page's state and request handlers."""

    def __init__(
        self,
        questions: Sequence[Question],
        answered: int,
        keep: Keep,
        finish: Callable[[], None],
        say: Say,
    ):
        self.questions = questions
        self.total = answered + len(questions)
        self.keep = keep
        self.finish = finish
        self.say = say
        self.waiting = list(range(len(questions)))  # indices of questions without a verdict
        self.judged: list[int] = []  # indices, in the order of their verdicts

    def app(self, token: str) -> Starlette:
        """Return the ASGI application.

        Every route is under the token. No other site knows it, so none can send a verdict.
        """
        routes = [
            Route("/", self.page),
            Route("/pair", self.pair),
            Route("/picture/{n:int}/{side}", self.picture),
            Route("/verdict", self.verdict, methods=["POST"]),
            Route("/undo", self.undo, methods=["POST"]),
            Route("/finish", self.end, methods=["POST"]),
        ]
        hosts = Middleware(
            TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"], www_redirect=False
        )
        return Starlette(routes=[Mount(f"/{token}", routes=routes)], middleware=[hosts])

    def state(self) -> Response:
        """The pair to show, the one to preload, and the progress."""
        current = self.waiting[0] if self.waiting else None
        following = self.waiting[1] if len(self.waiting) > 1 else None
        prompt = "" if current is None else self.questions[current].prompt
        return JSONResponse(
            {
                "pair": current,
                "prompt": prompt,
                "next": following,
                "done": self.total - len(self.waiting),
                "total": self.total,
                "undo": bool(self.judged),
            }
        )

    async def page(self, _: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        policy = (
            "default-src 'none'; img-src 'self' data:; connect-src 'self'; "
            f"style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        headers = {
            "Content-Security-Policy": policy,
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }
        html = PAGE.read_text(encoding="utf-8").replace("{nonce}", nonce)
        return HTMLResponse(html, headers=headers)

    async def pair(self, _: Request) -> Response:
        return self.state()

    async def picture(self, request: Request) -> Response:
        n = request.path_params["n"]
        side = request.path_params["side"]
        if n >= len(self.questions) or side not in POSITIONS:
            raise HTTPException(404)

        try:
            question = self.questions[n]
            content = await run_in_threadpool(question.picture, POSITIONS[side])
        except ValueError as error:
            # The pair cannot be shown: skip it.
            if n in self.waiting:
                self.waiting.remove(n)
                self.say(f"arena: {error}; its pair is left out")
            raise HTTPException(410) from None

        headers = {"Cache-Control": "private, max-age=600"}
        return Response(content, media_type="image/png", headers=headers)

    async def verdict(self, request: Request) -> Response:
        body = await _json_object(request)
        n = body.get("pair")
        verdict = body.get("verdict")
        if verdict not in ("first", "second", "tie"):
            raise HTTPException(400, "verdict: expected first, second or tie")

        # A second click on the same pair changes nothing.
        if n in self.waiting:
            self.keep(self.questions[n], verdict, "")
            self.waiting.remove(n)
            self.judged.append(n)
        return self.state()

    async def undo(self, _: Request) -> Response:
        if self.judged:
            n = self.judged.pop()
            self.keep(self.questions[n], "undone", "")
            self.waiting.insert(0, n)
        return self.state()

    async def end(self, _: Request) -> Response:
        self.finish()
        return JSONResponse({})


async def _json_object(request: Request) -> Mapping:
    try:
        body = await request.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise HTTPException(400, "expected a JSON object")
    return body


def make_judge(settings: Any) -> HumanJudge:
    """The judge `human`. settings: config.evaluate.arena."""
    return HumanJudge(settings.port)
