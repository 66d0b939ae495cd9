"""For the tests of the arena: pictures, settings and an endpoint that answers as told."""

import base64
import contextlib
import hashlib
import http.server
import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

for module in ("torch", "httpx2", "starlette", "tenacity", "uvicorn"):
    pytest.importorskip(module)


from realgen_jax.realbench import arena  # noqa: E402
from realgen_jax.realbench.results import Entry, Judgement, PromptSet, Results, ScoredPicture  # noqa: E402
from reward_bridge.judges import api, make_judge  # noqa: E402

KEY = "sk-very/secret+key"
SETTINGS = {
    "protocol": "balanced",
    "pairs": "all",
    "prompts": 0,
    "concurrency": 4,
    "requests_per_minute": 0.0,
    "timeout": 5.0,
    "attempts": 3,
    "max_failures": 3,
    "port": 0,
}
Reply = (
    tuple[int, dict[str, str], bytes] | float
)  # (status, headers, body), or seconds without an answer


def settings(**changed) -> SimpleNamespace:
    return SimpleNamespace(**(SETTINGS | changed))


def make(
    folder: Path, entries: Sequence[str] = ("base", "tuned"), lines: int = 3, size: int = 16
) -> Results:
    """Pictures of one colour, brighter from entry to entry; an entry photo... has photographs."""
    folder.mkdir(exist_ok=True)
    pictures = []
    for e, entry in enumerate(entries):
        for line in range(lines):
            file = folder / f"{entry}_{line}.png"
            Image.new("RGB", (size, size), (40 + 60 * e, 20 * line, 90)).save(file)
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            pictures.append(ScoredPicture(entry, "short", line, 0, file, digest, size, size, {}))
    kinds = [
        Entry(name, "photographs" if name.startswith("photo") else "folder", str(folder))
        for name in entries
    ]
    prompts = PromptSet("short", [f"a prompt, number {i}" for i in range(lines)], [""] * lines)
    return Results([prompts], kinds, [], pictures, [])


def chat(content: str | None, **changed) -> Reply:
    message = {"role": "assistant", "content": content, "refusal": changed.pop("refusal", None)}
    choice = {"message": message, "finish_reason": "stop", **changed}
    return 200, {}, json.dumps({"choices": [choice]}).encode()


def failing(status: int, message: str = "", code: str | None = None, **headers: str) -> Reply:
    return (
        status,
        headers,
        json.dumps({"error": {"message": message, "type": code, "code": code}}).encode(),
    )


def brightness(body: dict) -> tuple[int, int]:
    """The red of both pictures of a request."""
    parts = [
        p["image_url"]["url"] for p in body["messages"][0]["content"] if p["type"] == "image_url"
    ]
    images = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in parts]
    return tuple(image.getpixel((0, 0))[0] for image in images)


def brighter(_: int, body: dict) -> Reply:
    first, second = brightness(body)
    return chat(f"I looked.\nVerdict: {1 if first > second else 2}")


@contextlib.contextmanager
def judging(reply: Callable[[int, dict], Reply]) -> Iterator[SimpleNamespace]:
    """An endpoint that answers request n, from 1, with `reply(n, body)`.

    `seen` are the requests, `times` when they came.
    """
    seen, times, lock, done = [], [], threading.Lock(), threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                seen.append((self.path, dict(self.headers), body))
                times.append(time.monotonic())
                n = len(seen)
            answer = reply(n, body)
            if isinstance(answer, float):
                done.wait(answer)
                return
            status, headers, content = answer
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_):  # clients that went away
            pass

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(api.URL_ENV, url)
            patch.setenv(api.MODEL_ENV, "org/judge-1")
            patch.setenv(api.KEY_ENV, KEY)
            try:
                yield SimpleNamespace(url=url, seen=seen, times=times)
            finally:
                done.set()
                server.shutdown()


def run(
    results: Results, folder: Path, kind: str = "api", seed: int = 0, **changed
) -> tuple[list[Judgement], str]:
    """Judge everything; returns the judgements and what was said."""
    said = []
    judgements = arena.judge_all(
        results,
        make_judge(kind, settings(**changed)),
        settings(**changed),
        folder,
        seed=seed,
        say=said.append,
    )
    return judgements, "\n".join(said)


def kept(folder: Path, protocol: str = "balanced") -> list[dict]:
    file = folder / "org%2Fjudge-1" / f"{protocol}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
