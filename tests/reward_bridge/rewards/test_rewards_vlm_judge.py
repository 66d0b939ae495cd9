import base64
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
pytest.importorskip("httpx2")
pytest.importorskip("tenacity")

from reward_bridge.rewards import make_reward  # noqa: E402
from reward_bridge.rewards.vlm_judge import p_yes  # noqa: E402


def pictures(n, height, width):
    return torch.randint(
        256, (n, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


@pytest.fixture
def server():
    """A local endpoint; a test sets `reply(number of the request, body) -> (status, answer)`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.requests.append((self.path, dict(self.headers), body))
                number = len(state.requests)
            status, answer = state.reply(number, body)
            answer = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.handle_error = lambda *args: None  # of clients that have gone
    state = SimpleNamespace(
        requests=[], lock=threading.Lock(), url=f"http://127.0.0.1:{http.server_port}/v1"
    )
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield state
    http.shutdown()
    http.server_close()


def answer(**tokens):
    """A chat completion whose first token has these probabilities."""
    top = [{"token": token, "logprob": float(np.log(p))} for token, p in tokens.items()]
    return {
        "choices": [
            {
                "message": {"content": "?"},
                "logprobs": {"content": [{**top[0], "top_logprobs": top}]},
            }
        ]
    }


def judge(server, **options):
    return make_reward("vlm_judge", "cpu", {"url": server.url, "model": "eye-7b"} | options)


def test_vlm_judge_asks_about_each_picture(server, monkeypatch):
    """Scores keep the pictures' order though the first answers come last, three at a time."""
    images, prompts = pictures(6, 40, 56), [f"prompt {i}" for i in range(6)]
    busy, most = set(), []

    def reply(number, body):
        image, text = body["messages"][0]["content"]
        head, _, data = image["image_url"]["url"].partition(",")
        index = int(text["text"].removeprefix("Is {this} prompt ").removesuffix("?"))
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        assert head == "data:image/png;base64"
        assert (pixels == images[index].permute(1, 2, 0).numpy()).all()
        with server.lock:
            busy.add(number)
            most.append(len(busy))
        time.sleep(0.04 + 0.01 * (5 - index))
        with server.lock:
            busy.remove(number)
        return 200, answer(Yes=0.1 + 0.1 * index, no=0.2)

    server.reply = reply
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    scores = judge(server, question="Is {this} {prompt}?", api_key_env="JUDGE_KEY", concurrency=3)(
        images, prompts
    )
    p = 0.1 + 0.1 * np.arange(6)
    np.testing.assert_allclose(scores, p / (p + 0.2), rtol=1e-6)
    assert scores.dtype == torch.float32
    assert max(most) == 3
    path, headers, body = server.requests[0]
    assert (path, headers["Authorization"]) == ("/v1/chat/completions", "Bearer s3cret")
    del body["messages"]
    assert body == {
        "model": "eye-7b",
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 20,
    }


def test_vlm_judge_adds_up_spellings():
    def logs(**tokens):
        return [(token.replace("_", " "), float(np.log(p))) for token, p in tokens.items()]

    assert p_yes(
        logs(yes=0.2, Yes=0.1, _YES=0.1, No=0.05, _no=0.05, Yesterday=0.3)
    ) == pytest.approx(0.8)
    assert p_yes([("\u0120yes", -1.0), ("\u2581No", -1.0)]) == pytest.approx(0.5)
    assert p_yes([("yes", -1000.0), ("yes", -1000.0), ("no", -1000.0)]) == pytest.approx(2 / 3)
    assert p_yes(logs(yes=0.9, maybe=0.1)) == 1
    assert p_yes(logs(maybe=0.1, no=0.9)) == 0
    with pytest.raises(ValueError, match=r"neither yes nor no but one of \['maybe', 'I'\]"):
        p_yes(logs(maybe=0.1, I=0.9))


@pytest.mark.parametrize("first", [429, 500, 503])
def test_vlm_judge_tries_again_where_that_may_help(server, first):
    server.reply = lambda number, body: (
        (first, b"busy") if number == 1 else (200, answer(yes=0.3, no=0.1))
    )
    assert judge(server)(pictures(1, 16, 16), [""]).tolist() == pytest.approx([0.75])
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("reply", "asked", "message"),
    [
        ((429, b"slow down"), 2, r"429.* slow down; check url, model and api_key_env"),
        ((404, b"no such model"), 1, r"404.* no such model; check url, model"),
        (
            (200, b"<html>hello</html>"),
            1,
            r"without the first token's log-probabilities: '<html>hello",
        ),
        (
            (200, {"choices": [{"message": {"content": "yes"}, "logprobs": None}]}),
            1,
            r"without the first token's",
        ),
        ((200, answer(I=0.9, The=0.1)), 1, r"neither yes nor no but one of \['I', 'The'\]"),
    ],
)
def test_vlm_judge_names_what_is_wrong(server, reply, asked, message):
    server.reply = lambda number, body: reply
    with pytest.raises(ValueError, match=message):
        judge(server, attempts=2)(pictures(1, 16, 16), [""])
    assert len(server.requests) == asked


def test_vlm_judge_gives_up_on_silence(server):
    stop = threading.Event()
    server.reply = lambda number, body: (stop.wait(5), (200, {}))[1]
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"failed: no answer within 0\.1 s; check url"):
        judge(server, attempts=2, timeout=0.1)(pictures(2, 16, 16), [""] * 2)
    assert time.monotonic() - start < 3
    with pytest.raises(ValueError, match=r"has not answered 9 questions within 0\.2 s"):
        judge(server, deadline=0.2)(pictures(9, 16, 16), [""] * 9)
    assert time.monotonic() - start < 4
    stop.set()
    with pytest.raises(ValueError, match=r"failed: ConnectError"):
        judge(SimpleNamespace(url="http://127.0.0.1:9/v1"), attempts=1)(pictures(1, 16, 16), [""])


def test_vlm_judge_wants_the_key_it_was_told_of(server, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ValueError, match=r"no variable 'JUDGE_KEY'.*export it"):
        judge(server, api_key_env="JUDGE_KEY")


def test_vlm_judge_never_prints_its_key(server, monkeypatch):
    """An endpoint that repeats what it was sent."""
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    server.reply = lambda number, body: (400, b"wrong key s3cret")
    with pytest.raises(ValueError, match=r"HTTP 400 wrong key \.\.\.;") as raised:
        judge(server, api_key_env="JUDGE_KEY")(pictures(1, 16, 16), [""])
    assert "s3cret" not in str(raised.value)
    server.reply = lambda number, body: (200, b"no chat s3cret")
    with pytest.raises(ValueError, match="without the first token's") as raised:
        judge(server, api_key_env="JUDGE_KEY")(pictures(1, 16, 16), [""])
    assert "s3cret" not in str(raised.value)
    monkeypatch.setenv("JUDGE_KEY", "s3\ncret")
    with pytest.raises(ValueError, match="JUDGE_KEY holds characters") as raised:
        judge(server, api_key_env="JUDGE_KEY")
    assert "cret" not in str(raised.value)
