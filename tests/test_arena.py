"""The arena: questions, judges over real HTTP, what is kept of their answers, and what these add up to."""

import base64
import contextlib
import hashlib
import http.server
import io
import json
import logging
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.optimize
from PIL import Image

torch = pytest.importorskip("torch")
for module in ("httpx2", "starlette", "tenacity", "uvicorn"):
    pytest.importorskip(module)

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import httpx2  # noqa: E402
import tenacity  # noqa: E402
from browser import browser, console_errors  # noqa: E402
from realbench import arena, judge  # noqa: E402
from realbench.results import Entry, Evaluated, Judgement, PromptSet, Scored  # noqa: E402
from realbench.standings import bradley_terry, standings  # noqa: E402
from reward_servers import end, start, wait_until  # noqa: E402

from reward_bridge.judge_server import serving  # noqa: E402
from reward_bridge.rewards import make_reward  # noqa: E402

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
Reply = tuple[int, dict[str, str], bytes] | float  # (status, headers, body), or seconds without an answer


@pytest.fixture(autouse=True)
def _no_back_off(monkeypatch):
    monkeypatch.setattr(judge, "BACK_OFF", tenacity.wait_none())


def settings(**changed) -> SimpleNamespace:
    return SimpleNamespace(**(SETTINGS | changed))


def make(folder: Path, entries: Sequence[str] = ("base", "tuned"), lines: int = 3, size: int = 16) -> Evaluated:
    """Pictures of one colour, brighter from entry to entry; an entry named photo... holds photographs."""
    folder.mkdir(exist_ok=True)
    pictures = []
    for e, entry in enumerate(entries):
        for line in range(lines):
            file = folder / f"{entry}_{line}.png"
            Image.new("RGB", (size, size), (40 + 60 * e, 20 * line, 90)).save(file)
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            pictures.append(Scored(entry, "short", line, 0, file, digest, size, size, {}))
    kinds = [Entry(name, "photographs" if name.startswith("photo") else "folder", str(folder)) for name in entries]
    prompts = PromptSet("short", [f"a prompt, number {i}" for i in range(lines)], [""] * lines)
    return Evaluated([prompts], kinds, [], pictures, [])


def chat(content: str | None, **changed) -> Reply:
    message = {"role": "assistant", "content": content, "refusal": changed.pop("refusal", None)}
    choice = {"message": message, "finish_reason": "stop", **changed}
    return 200, {}, json.dumps({"choices": [choice]}).encode()


def failing(status: int, message: str = "", code: str | None = None, **headers: str) -> Reply:
    return status, headers, json.dumps({"error": {"message": message, "type": code, "code": code}}).encode()


def brightness(body: dict) -> tuple[int, int]:
    """The red of both pictures of a request."""
    parts = [p["image_url"]["url"] for p in body["messages"][0]["content"] if p["type"] == "image_url"]
    images = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in parts]
    return tuple(image.getpixel((0, 0))[0] for image in images)


def brighter(_: int, body: dict) -> Reply:
    first, second = brightness(body)
    return chat(f"I looked.\nVerdict: {1 if first > second else 2}")


@contextlib.contextmanager
def judging(reply: Callable[[int, dict], Reply]) -> Iterator[SimpleNamespace]:
    """An endpoint that answers request n (from 1) as told; `seen` are the requests, `times` when they came."""
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
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(judge.URL_ENV, url)
            patch.setenv(judge.MODEL_ENV, "org/judge-1")
            patch.setenv(judge.KEY_ENV, KEY)
            try:
                yield SimpleNamespace(url=url, seen=seen, times=times)
            finally:
                done.set()
                server.shutdown()


def run(evaluated: Evaluated, folder: Path, judge: str = "api", **changed) -> tuple[list[Judgement], str]:
    said = []
    return arena.judge_all(evaluated, settings(**changed), judge, folder, 0, said.append), "\n".join(said)


def kept(folder: Path, protocol: str = "balanced") -> list[dict]:
    file = folder / "org%2Fjudge-1" / f"{protocol}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


# --- questions and answers


def test_realgen_verdicts_are_read_as_the_reference_reads_them():
    golden = json.loads((Path(__file__).parent / "goldens/11_arena/arena_parse.json").read_text())
    names = {"first": "image_1", "second": "image_2", None: "unknown"}
    read = [names[arena.read_realgen(case["response"])] for case in golden["cases"]]
    assert read == [case["verdict"] for case in golden["cases"]]
    assert {name: read.count(name) for name in golden["counts"]} == golden["counts"]


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Hands look odd in 1.\n\nVerdict: 2", "second"),
        ("**Verdict: 1**\n", "first"),
        ("verdict: TIE.", "tie"),
        ("Verdict: 1\nVerdict: 2", "second"),
        ("Verdict: 1 or 2", None),
        ("Verdict: 12", None),
        ("Verdict: 1\nBut I am not sure.", None),
        ("The verdict: 1", None),
        ("Image 1 is better", None),
        ("", None),
    ],
)
def test_balanced_verdicts_are_the_last_line_or_none(reply, verdict):
    assert arena.read_balanced(reply) == verdict


def test_the_questions_do_not_answer_themselves():
    """A judge that repeats what it was asked names no verdict."""
    for name in ("realgen", "balanced"):
        assert arena.PROTOCOLS[name]["read"](arena.PROTOCOLS[name]["question"]) is None


def test_questions_of_each_protocol(tmp_path):
    evaluated = make(tmp_path, ("base", "photos", "tuned"), lines=4)

    def asked(protocol, **changed):
        made, lacking = arena.questions(evaluated, settings(**changed), protocol, seed=1)
        assert not lacking
        return sorted((q.first.line, q.first.entry, q.second.entry) for q in made)

    both = [("base", "photos"), ("base", "tuned"), ("photos", "base"), ("photos", "tuned"), ("tuned", "base")]
    both.append(("tuned", "photos"))
    assert asked("balanced") == [(line, *pair) for line in range(4) for pair in both]
    assert asked("balanced", prompts=2, pairs="first") == [
        (line, *pair) for line in (0, 2) for pair in both if "base" in pair
    ]
    assert asked("realgen") == [(line, entry, "photos") for line in range(4) for entry in ("base", "tuned")]
    once = asked("human")
    assert len(once) == 12
    assert len({(line, frozenset(pair)) for line, *pair in once}) == 12
    assert once == asked("human")
    assert {first < second for _, first, second in once} == {True, False}


def test_prompts_are_spread_evenly():
    assert arena.spread(10, 0) == list(range(10))
    assert arena.spread(10, 4) == [0, 2, 5, 7]
    assert arena.spread(3, 9) == [0, 1, 2]


def test_settings_that_ask_for_what_is_not_there(tmp_path, monkeypatch):
    evaluated = make(tmp_path)
    for changed in ({"protocol": "realgen"}, {"pairs": "photographs"}):
        with pytest.raises(ValueError, match="photographs"):
            run(evaluated, tmp_path, "embedded", **changed)
    with pytest.raises(ValueError, match="pairs is 'some'"):
        run(evaluated, tmp_path, "embedded", pairs="some")
    with pytest.raises(ValueError, match="protocol is 'fair'"):
        run(evaluated, tmp_path, "embedded", protocol="fair")
    for name in (judge.URL_ENV, judge.MODEL_ENV, judge.KEY_ENV):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=judge.URL_ENV):
        run(evaluated, tmp_path)
    monkeypatch.setenv(judge.URL_ENV, "api.example.com/v1?secret")
    monkeypatch.setenv(judge.MODEL_ENV, "m")
    with pytest.raises(ValueError, match="holds no address") as raised:
        run(evaluated, tmp_path)
    assert "secret" not in str(raised.value)
    monkeypatch.setenv(judge.URL_ENV, "https://api.example.com/v1")
    monkeypatch.setenv(judge.KEY_ENV, "sk-se\ncret")
    with pytest.raises(ValueError, match="no HTTP header") as raised:
        run(evaluated, tmp_path)
    assert "cret" not in str(raised.value)
    with pytest.raises(ValueError, match="there is only"):
        run(make(tmp_path, ("base",)), tmp_path, "embedded")


def test_pictures_are_told_apart_from_those_that_lack(tmp_path):
    evaluated = make(tmp_path / "pictures")
    evaluated.pictures.pop()  # tuned, line 2
    with judging(brighter) as server:
        judgements, said = run(evaluated, tmp_path)
    assert len(server.seen) == len(judgements) == 4
    assert "1 prompts of 'short' without a picture of both base and tuned are left out" in said
    assert "WARNING" not in said


# --- a judge over HTTP


def test_what_is_sent(tmp_path):
    evaluated = make(tmp_path / "pictures", ("base", "photos"), lines=1)
    with judging(lambda *_: chat("More realistic image: Image 2")) as server:
        judgements, _ = run(evaluated, tmp_path, protocol="realgen")
        path, headers, body = server.seen[0]
        content = body["messages"][0]["content"]
        assert path == "/v1/chat/completions"
        assert headers["Authorization"] == f"Bearer {KEY}"
        assert body["model"] == "org/judge-1"
        assert body.keys() == {"model", "messages"}
        assert [part["type"] for part in content] == ["text", "image_url", "image_url"]
        assert content[1]["image_url"]["url"].startswith("data:image/jpeg;base64,")
        assert np.allclose(brightness(body), (40, 100), atol=3)
        run(evaluated, tmp_path)
        assert server.seen[1][2]["messages"][0]["content"][1]["image_url"]["url"].startswith("data:image/png;base64,")
    assert judgements == [Judgement("short", 0, "base", "photos", "second", "More realistic image: Image 2")]


def test_answers_are_kept_and_not_asked_for_again(tmp_path):
    evaluated = make(tmp_path / "pictures")
    with judging(brighter) as server:
        judgements, said = run(evaluated, tmp_path)
        assert len(server.seen) == len(judgements) == 6
        assert all((j.verdict == "first") == (j.first == "tuned") for j in judgements)
        assert not said
        again, _ = run(evaluated, tmp_path)
        assert again == judgements
        assert len(server.seen) == 6
        Image.new("RGB", (16, 16), (250, 0, 0)).save(evaluated.pictures[0].file)  # base, line 0: now the brightest
        digest = hashlib.sha256(evaluated.pictures[0].file.read_bytes()).hexdigest()
        evaluated.pictures[0] = Scored(**{**vars(evaluated.pictures[0]), "sha256": digest})
        changed, _ = run(evaluated, tmp_path)
        assert len(server.seen) == 8
        assert {j.verdict for j in changed if j.line == 0 and j.first == "base"} == {"first"}


def test_a_full_stop_in_the_middle_of_a_line_loses_that_line_only(tmp_path):
    evaluated = make(tmp_path / "pictures")
    with judging(brighter) as server:
        judgements, _ = run(evaluated, tmp_path)
        file = tmp_path / "org%2Fjudge-1" / "balanced.jsonl"
        file.write_bytes(file.read_bytes()[:-20])
        again, _ = run(evaluated, tmp_path)
        assert again == judgements
        assert len(server.seen) == 7
        assert len(kept(tmp_path)) == 6
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join([lines[0], "not a judgement\n", *lines[1:]]))
        with pytest.raises(ValueError, match="line 2"):
            run(evaluated, tmp_path)


def test_an_interrupted_call_has_kept_every_answer(tmp_path):
    evaluated = make(tmp_path / "pictures", lines=8)

    def stop_at_five(n, body):
        return 30.0 if n >= 5 else brighter(n, body)

    with judging(stop_at_five) as server, pytest.MonkeyPatch.context() as patch:
        append = arena.appending

        @contextlib.contextmanager
        def interrupting(file):
            with append(file) as write:

                def write_or_stop(*answer):
                    record = write(*answer)
                    if len(kept(tmp_path)) == 4:  # they are in the file, not only on their way
                        raise KeyboardInterrupt
                    return record

                yield write_or_stop

        patch.setattr(arena, "appending", interrupting)
        with pytest.raises(KeyboardInterrupt):
            run(evaluated, tmp_path)
        assert len(kept(tmp_path)) == 4
        before = len(server.seen)
    with judging(brighter) as server:
        judgements, _ = run(evaluated, tmp_path)
        assert len(server.seen) == 12
        assert len(judgements) == 16
    assert before >= 4


def test_refusals_ties_and_what_cannot_be_read_are_kept_apart(tmp_path):
    evaluated = make(tmp_path / "pictures", lines=3)
    replies = {
        0: chat(None, refusal="I would rather not."),
        1: chat("Verdict: 1", finish_reason="content_filter"),
        2: failing(400, "turned away", "content_filter"),
        3: chat("Verdict: tie"),
        4: chat("Hard to say."),
        5: chat(None),
    }
    numbers = {}  # of the pairs, as they come

    def reply(_, body):
        return replies[numbers.setdefault((*brightness(body), str(body)[-80:]), len(numbers))]

    with judging(reply) as server:
        judgements, said = run(evaluated, tmp_path, concurrency=1)
        assert [j.verdict for j in judgements] == ["refused"] * 3 + ["tie"] + ["unreadable"] * 2
        assert len(server.seen) == 4 + 2 * 3  # what cannot be read is asked for three times in all
        assert [record["reply"] for record in kept(tmp_path)][:2] == ["I would rather not.", "Verdict: 1"]
        again, _ = run(evaluated, tmp_path)
        assert again == judgements
        assert len(server.seen) == 10
    assert not said


def test_what_passes_is_asked_again(tmp_path):
    evaluated = make(tmp_path / "pictures", lines=1)
    bad = [failing(500, "oops"), failing(429, "slow down"), (200, {}, b"<html>"), chat("Hm.")]

    def reply(n, body):
        return bad[n - 1] if n <= len(bad) else brighter(n, body)

    with judging(reply) as server:
        judgements, said = run(evaluated, tmp_path, concurrency=1, attempts=5)
    assert [j.verdict for j in judgements] in (["second", "first"], ["first", "second"])
    assert len(server.seen) == 6
    assert not said


def test_failures_are_counted_but_neither_kept_nor_won(tmp_path):
    evaluated = make(tmp_path / "pictures", lines=4)
    broken = True

    def reply(n, body):
        return failing(503, "overloaded") if broken and brightness(body)[0] == 40 else brighter(n, body)

    with judging(reply) as server:
        judgements, said = run(evaluated, tmp_path, max_failures=100)
        assert len(judgements) == len(kept(tmp_path)) == 4
        assert len(server.seen) == 4 + 4 * 3
        assert "4 questions came to nothing: HTTP 503 overloaded" in said
        assert "judged 4 of 8 pairs in both orders; the same command goes on" in said
        broken = False
        judgements, said = run(evaluated, tmp_path)
        assert len(judgements) == 8
        assert len(server.seen) == 20
        assert not said


@pytest.mark.parametrize(
    "reply",
    [
        failing(401, f"Incorrect API key provided: {KEY}"),
        failing(403, "no"),
        failing(429, "You exceeded your current quota", "insufficient_quota"),
        failing(429, "tomorrow", Retry_After="50000"),
    ],
)
def test_a_judge_that_will_not_answer_is_left_alone_at_once(tmp_path, reply):
    with judging(lambda *_: reply) as server:
        judgements, said = run(make(tmp_path / "pictures"), tmp_path, concurrency=1)
    assert judgements == []
    assert len(server.seen) == 1
    assert "is left alone" in said
    assert "judged 0 of 6" in said
    assert KEY not in said


def test_a_judge_that_only_fails_is_left_alone(tmp_path):
    with judging(lambda *_: failing(404, "no such model")) as server:
        _, said = run(make(tmp_path / "pictures", lines=10), tmp_path, concurrency=1)
    assert len(server.seen) == 3
    assert "3 questions in a row came to nothing, the last one: HTTP 404 no such model" in said


def test_silence_and_absence(tmp_path):
    evaluated = make(tmp_path / "pictures", lines=1)
    with judging(lambda *_: 5.0) as server:
        judgements, said = run(evaluated, tmp_path, timeout=0.1, attempts=2)
        assert len(server.seen) == 4
        assert "2 questions came to nothing: no answer within 0.1 s" in said
        port = server.url.split(":")[2]
    with judging(brighter), pytest.MonkeyPatch.context() as patch:
        patch.setenv(judge.URL_ENV, f"http://127.0.0.1:{port}")
        judgements, said = run(evaluated, tmp_path)
        assert "2 questions came to nothing: ConnectError" in said
        assert "127.0.0.1" not in said
    assert judgements == []


def test_a_rest_that_is_asked_for_is_kept_by_all(tmp_path):
    def reply(n, body):
        return failing(429, "slow down", Retry_After="0.4") if n == 1 else brighter(n, body)

    with judging(reply) as server:
        run(make(tmp_path / "pictures", lines=4), tmp_path, concurrency=1)
    gaps = np.diff(server.times)
    assert gaps[0] >= 0.38
    assert len(server.times) == 9


def test_requests_per_minute(tmp_path):
    with judging(brighter) as server:
        run(make(tmp_path / "pictures"), tmp_path, requests_per_minute=1200.0)  # every 50 ms
    assert server.times[-1] - server.times[0] >= 5 * 0.05 - 0.02


def test_retry_after_is_seconds_or_a_date():
    assert judge._retry_after("7") == 7
    assert judge._retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    in_a_minute = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))
    assert 55 < judge._retry_after(in_a_minute) < 61
    assert judge._retry_after("") == judge._retry_after("soon") == 0


def test_the_key_and_the_address_appear_nowhere(tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    evaluated = make(tmp_path / "pictures", lines=4)

    def echo(n, body):
        """An endpoint that repeats what it was sent, in replies, refusals and errors."""
        told = f"{KEY} at {server.url}"
        return [
            chat(f"{told}\nVerdict: 1"),
            chat(None, refusal=told),
            chat(told),
            failing(500, told),
            (502, {}, told.encode()),
        ][n % 5]

    with judging(echo) as server:
        judgements, said = run(evaluated, tmp_path, max_failures=100)
        assert KEY not in repr(judge.endpoint_from_environment())
        host = server.url.split("/")[2]
    captured = capfd.readouterr()
    files = [file.read_text() for file in tmp_path.rglob("*.jsonl")]
    assert files
    for text in (said, caplog.text, captured.out, captured.err, str(judgements), *files):
        assert KEY not in text
        assert host not in text
    assert any("first" in record["verdict"] for record in kept(tmp_path))


def test_a_picture_that_has_changed_is_not_judged(tmp_path):
    evaluated = make(tmp_path / "pictures")
    evaluated.pictures[0].file.write_bytes(b"something else")
    with judging(brighter) as server:
        judgements, said = run(evaluated, tmp_path)
    assert len(server.seen) == len(judgements) == 4
    assert "base_0.png has changed since it was scored" in said


# --- the stand-in


def test_the_stand_in_judges_over_http(tmp_path):
    """Noise against a photograph, both ways round; and no picture is better than itself."""
    photographs = np.load(ROOT / "tests/goldens/photographs.npz")
    photo = next(iter(photographs.values()))
    photo = photo[0] if photo.ndim == 4 else photo
    photo = photo.transpose(1, 2, 0) if photo.shape[0] == 3 else photo
    evaluated = make(tmp_path / "pictures", ("noise", "photos"), lines=1)
    rng = np.random.default_rng(0)
    for i, array in enumerate([rng.integers(0, 256, (64, 64, 3), np.uint8), photo]):
        scored = evaluated.pictures[i]
        Image.fromarray(array).save(scored.file)
        digest = hashlib.sha256(scored.file.read_bytes()).hexdigest()
        evaluated.pictures[i] = Scored(**{**vars(scored), "sha256": digest})
    judgements, _ = run(evaluated, tmp_path, "embedded")
    assert {(j.first, j.verdict) for j in judgements} == {("noise", "second"), ("photos", "first")}
    judgements, _ = run(evaluated, tmp_path, "embedded", protocol="realgen")
    reward = make_reward("embedded_held_out", "cpu", {})
    sent = [np.array(Image.open(io.BytesIO(arena.encode(p, "JPEG")))) for p in evaluated.pictures]
    scores = [reward(torch.from_numpy(array).permute(2, 0, 1)[None], [""]).item() for array in sent]
    better = 1 if scores[0] > scores[1] else 2
    assert [j.verdict for j in judgements] == [("first", "second")[better - 1]]
    assert judgements[0].reply.startswith(f"More Realistic Image: Image {better}\nReason: ")
    assert (tmp_path / "embedded_held_out" / "realgen.jsonl").exists()
    same = Evaluated(evaluated.sets, evaluated.entries, [], [evaluated.pictures[0]], [])
    copied = Scored(**{**vars(evaluated.pictures[0]), "entry": "photos"})
    same.pictures.append(copied)
    judgements, _ = run(same, tmp_path, "embedded")
    assert {j.verdict for j in judgements} == {"tie"}


def test_the_stand_in_tells_what_is_wrong(tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"

    def body(*urls, text="Verdict:", model="embedded_held_out", **more):
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        return {
            "model": model,
            "messages": [{"role": "user", "content": [{"type": "text", "text": text}, *parts]}],
            **more,
        }

    with serving("embedded_held_out") as address:
        assert httpx2.get(f"{address}/models").json()["data"][0]["id"] == "embedded_held_out"
        cases = [
            (body(url), 400, "1 pictures"),
            (body(url, "https://example.com/a.png"), 400, "data URL"),
            (body(url, "data:image/png;base64,AAAA"), 400, "data URL"),
            (body(url, url, text="Which?"), 400, "no form of answer"),
            (body(url, url, model="gpt"), 404, "'gpt'"),
            (body(url, url, stream=True), 400, "streamed"),
            ({"messages": 3}, 400, "no chat"),
        ]
        for sent, status, words in cases:
            answer = httpx2.post(f"{address}/chat/completions", json=sent)
            assert answer.status_code == status
            assert words in answer.json()["error"]["message"]
            assert answer.json()["error"]["type"] == "invalid_request_error"
        assert httpx2.post(f"{address}/chat/completions", content=b"{").status_code == 400
        good = httpx2.post(f"{address}/chat/completions", json=body(url, url)).json()
        assert good["choices"][0]["message"]["content"] == "Verdict: tie"
    with pytest.raises(ValueError, match="no reward 'x'"), serving("x"):
        pass


def test_the_script_says_how_to_use_it():
    process = start(["scripts/serve_judge.py", "--port=0"])
    try:
        first, *_ = lines = [process.stdout.readline() for _ in range(3)]
        address = first.split()[-1]
        assert f"{judge.URL_ENV}={address} {judge.MODEL_ENV}=embedded_held_out" in lines[2]
        assert httpx2.get(f"{address}/models").json()["data"][0]["id"] == "embedded_held_out"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    finally:
        end(process)


# --- what it adds up to


def told(a: str, b: str, *verdicts: tuple[int, str], name: str = "short") -> list[Judgement]:
    """Of pictures a, b in this order: (line, verdict)."""
    return [Judgement(name, line, a, b, verdict, "") for line, verdict in verdicts]


def add_up(judgements, entries=("a", "b"), protocol="balanced", confidence=0.95, resamples=2000, seed=0):
    given = SimpleNamespace(confidence=confidence, resamples=resamples)
    return standings(judgements, entries, given, np.random.default_rng(seed), judge="j", protocol=protocol)


def test_pairs_in_both_orders_by_hand():
    """Scores of a: 1, 1/2 (first twice), 3/4 (a tie and a win), 0, and three pairs that lack an order."""
    judgements = told(
        "a", "b", (0, "first"), (1, "first"), (2, "tie"), (3, "second"), (4, "first"), (5, "refused"), (6, "first")
    ) + told("b", "a", (0, "second"), (1, "first"), (2, "second"), (3, "first"), (4, "unreadable"), (5, "first"))
    found = add_up(judgements)
    (match,) = found.matches
    assert (match.a, match.b) == ("a", "b")
    assert (match.wins, match.losses, match.ties, match.pairs) == (2, 1, 1, 4)
    assert match.win_rate == (1 + 0.5 + 0.75 + 0) / 4
    assert (match.refused, match.unreadable, match.incomplete) == (1, 1, 3)
    assert match.low < match.win_rate < match.high
    assert found.counts == {"first": 7, "second": 3, "tie": 1, "refused": 1, "unreadable": 1}
    assert found.first_share[0] == 7 / 10
    assert (found.judge, found.protocol) == ("j", "balanced")
    (turned,) = add_up(judgements, ("b", "a")).matches
    assert turned.win_rate == 1 - match.win_rate
    assert (turned.wins, turned.losses) == (1, 2)


def test_the_papers_win_rate_by_hand():
    """count1 / (count1 + count2): what cannot be read is in neither."""
    judgements = told("a", "photos", (0, "first"), (1, "second"), (2, "second"), (3, "unreadable"))
    (match,) = add_up(judgements, ("a", "photos"), "realgen").matches
    assert match.win_rate == 1 / 3
    assert (match.pairs, match.unreadable, match.incomplete) == (3, 1, 1)


def test_a_person_sees_every_pair_once():
    judgements = told("a", "b", (0, "first"), (2, "tie")) + told("b", "a", (1, "first"))
    (match,) = add_up(judgements, protocol="human").matches
    assert (match.wins, match.losses, match.ties, match.win_rate) == (1, 1, 1, 0.5)


def test_intervals_are_those_of_the_binomial():
    """30 wins of 50 pairs: the bootstrap's percentiles are the quantiles of Binomial(50, 0.6) / 50."""
    judgements = told("a", "b", *((line, "first" if line < 30 else "second") for line in range(50)))
    (match,) = add_up(judgements, protocol="human", resamples=20000).matches
    assert match.win_rate == 0.6
    assert (match.low, match.high) == pytest.approx((0.46, 0.74), abs=0.021)  # scipy.stats.binom.ppf: 23, 37
    (narrower,) = add_up(judgements, protocol="human", resamples=20000, confidence=0.5).matches
    assert (narrower.low, narrower.high) == pytest.approx((0.56, 0.64), abs=0.021)  # 28, 32


def test_intervals_draw_prompts_not_answers():
    """Both sets of a prompt are drawn together: twice the same answers make no interval narrower."""
    once = told("a", "b", *((line, "first" if line % 3 else "second") for line in range(30)))
    twice = once + [Judgement("long", *list(vars(one).values())[1:]) for one in once]
    (a,), (b,) = (add_up(judgements, protocol="human").matches for judgements in (once, twice))
    assert b.pairs == 2 * a.pairs
    assert (b.win_rate, b.low, b.high) == (a.win_rate, a.low, a.high)


def test_one_prompt_has_no_interval_and_none_no_rate():
    found = add_up(told("a", "b", (0, "first")), protocol="human")
    assert found.matches[0].win_rate == 1
    assert math.isnan(found.matches[0].low)
    assert math.isnan(found.ratings[0].high)
    nothing = add_up(told("a", "b", (0, "refused"), (1, "unreadable")), protocol="human")
    assert math.isnan(nothing.matches[0].win_rate)
    assert nothing.matches[0].incomplete == 2
    assert all(math.isnan(rating.rating) for rating in nothing.ratings)
    empty = add_up([])
    assert not empty.matches
    assert len(empty.ratings) == 2


def test_a_judge_that_always_says_first_finds_no_difference():
    lines = [(line, "first") for line in range(10)]
    judgements = [one for a in "abc" for b in "abc" if a != b for one in told(a, b, *lines)]
    found = add_up(judgements, "abc")
    for match in found.matches:
        assert (match.win_rate, match.low, match.high, match.ties) == (0.5, 0.5, 0.5, 10)
    assert found.first_share == (1, 1, 1)
    assert [one.rating for one in found.ratings] == pytest.approx([1000] * 3)


def test_two_players_in_closed_form():
    """Both cells are met exactly: s_a - s_b = (logit(7/10) - logit(4/10)) / 2 and gamma their mean, with the prior's
    quarter of a win and of a loss in each.
    """
    judgements = told("a", "b", *((i, "first" if i < 7 else "second") for i in range(10)))
    judgements += told("b", "a", *((i, "first" if i < 4 else "second") for i in range(10)))
    score = np.array([[[0, 7], [4, 0]]])
    count = np.array([[[0, 10], [10, 0]]])
    strengths, gamma = bradley_terry(score, count, True)
    ab, ba = math.log(7.25 / 3.25), math.log(4.25 / 6.25)
    assert strengths[0, 0] - strengths[0, 1] == pytest.approx((ab - ba) / 2, abs=1e-9)
    assert gamma[0] == pytest.approx((ab + ba) / 2, abs=1e-9)
    best, worst = add_up(judgements).ratings
    assert (best.entry, worst.entry) == ("a", "b")
    assert best.rating - worst.rating == pytest.approx(400 / math.log(10) * (ab - ba) / 2)
    assert best.rating + worst.rating == pytest.approx(2000)
    assert best.low < best.rating < best.high


def test_ratings_are_the_likeliest():
    """Against scipy's minimiser on the likelihood as it is written, with the prior's ties."""
    rng = np.random.default_rng(3)
    count = rng.integers(1, 30, (4, 4)) * (1 - np.eye(4))
    score = np.round(count * rng.random((4, 4)) * 2) / 2

    def loss(x):
        total = 0.0
        for i in range(4):
            for j in range(4):
                if i != j:
                    z = x[i] - x[j] + x[4]
                    total += (count[i, j] + 0.5) * np.logaddexp(0, z) - (score[i, j] + 0.25) * z
        return total + x[:4].sum() ** 2

    best = scipy.optimize.minimize(loss, np.zeros(5), tol=1e-10).x
    strengths, gamma = bradley_terry(score[None], count[None], True)
    np.testing.assert_allclose([*strengths[0], gamma[0]], best, atol=1e-4)


def simulate(strengths, gamma, lines, seed=0, both=True):
    """Answers of a judge that follows Bradley and Terry's model, with a liking for what it sees first."""
    rng, judgements = np.random.default_rng(seed), []
    names = "abcd"[: len(strengths)]
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            if i < j or (both and i != j):
                p = 1 / (1 + np.exp(-(strengths[i] - strengths[j] + gamma)))
                drawn = rng.random(lines) < p
                judgements += told(a, b, *((line, "first" if won else "second") for line, won in enumerate(drawn)))
    return judgements


def test_a_known_ranking_is_found_through_the_bias():
    truth = np.array([0.9, 0.2, -0.3, -0.8])
    found = add_up(simulate(truth, 1.0, 1500), "abcd", resamples=300)
    assert [one.entry for one in found.ratings] == list("abcd")
    for one, strength in zip(found.ratings, truth, strict=True):
        assert one.rating == pytest.approx(1000 + 400 / math.log(10) * strength, abs=15)
        assert one.low < one.rating < one.high
    assert found.first_share[1] > 0.5


def test_both_orders_cancel_the_bias_and_one_does_not():
    """Strengths 0.4 apart and a bias of 1: P(a wins) = (sigmoid(1.4) + 1 - sigmoid(0.6)) / 2 = 0.578 over both orders,
    near the unbiased sigmoid(0.4) = 0.599; in one order it seems to be sigmoid(1.4) = 0.802.
    """
    truth = [0.2, -0.2]
    (match,) = add_up(simulate(truth, 1.0, 4000)).matches
    assert match.win_rate == pytest.approx(0.578, abs=0.02)
    assert match.low < 0.578 < match.high
    (once,) = add_up(simulate(truth, 1.0, 4000, both=False), protocol="realgen").matches
    assert once.win_rate == pytest.approx(0.802, abs=0.02)
    assert once.low > 0.599


def test_separable_answers_stay_finite():
    """A hundred wins out of a hundred, in every resample."""
    judgements = [one for a, b in ("ab", "bc", "ac") for one in told(a, b, *((line, "first") for line in range(100)))]
    judgements += [one for a, b in ("ab", "bc", "ac") for one in told(b, a, *((line, "second") for line in range(100)))]
    found = add_up(judgements, "abc", resamples=50)
    assert [one.entry for one in found.ratings] == list("abc")
    assert all(np.isfinite([one.rating, one.low, one.high]).all() for one in found.ratings)


# --- a person


@contextlib.contextmanager
def page(evaluated: Evaluated, folder: Path, **changed) -> Iterator[SimpleNamespace]:
    """judge_all waiting for a person, in a thread; `judgements` is what it returned once the page has ended it."""
    said, result = [], []
    thread = threading.Thread(
        target=lambda: result.append(arena.judge_all(evaluated, settings(**changed), "human", folder, 0, said.append))
    )
    thread.start()
    try:
        wait_until(lambda: said)
        url = said[0].split()[2]
        yield SimpleNamespace(url=url, said=said, result=result, thread=thread)
    finally:
        with contextlib.suppress(httpx2.HTTPError):
            httpx2.post(f"{url}finish", json={})
        thread.join(20)
        assert not thread.is_alive()


def clicks(folder: Path) -> list[str]:
    file = folder / "human" / "human.jsonl"
    return [json.loads(line)["verdict"] for line in file.read_text().splitlines()]


def test_a_person_judges_by_clicks_and_keys_and_goes_on_later(tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    evaluated = make(tmp_path / "pictures", lines=5)

    def ready(driver):
        return driver.execute_script("return ready || pair === null")

    with browser(1280, 800) as driver:

        def press(key):
            wait_until(lambda: ready(driver))
            driver.find_element(By.TAG_NAME, "body").send_keys(key)

        def count(text):
            wait_until(lambda: driver.find_element(By.ID, "count").text == text and ready(driver))

        with page(evaluated, tmp_path) as served:
            driver.get(served.url)
            count("0 of 5")
            assert driver.execute_script("return [...document.images].every(i => i.naturalWidth === 16)")
            assert "a prompt, number" in driver.find_element(By.ID, "prompt").text
            html = driver.page_source
            assert not any(word in html for word in ("base", "tuned", str(tmp_path), evaluated.pictures[0].sha256))
            driver.find_element(By.ID, "left").click()
            count("1 of 5")
            press(Keys.ARROW_RIGHT)
            count("2 of 5")
            press(Keys.ARROW_DOWN)
            count("3 of 5")
            assert clicks(tmp_path) == ["first", "second", "tie"]
            press(Keys.BACK_SPACE)
            count("2 of 5")
            driver.find_element(By.ID, "choose-left").click()
            count("3 of 5")
            assert clicks(tmp_path) == ["first", "second", "tie", "undone", "first"]
            driver.find_element(By.ID, "finish").click()
            served.thread.join(10)
            (judgements,) = served.result
        assert [j.verdict for j in judgements] == ["first", "second", "first"]
        assert "judged 3 of 5 pairs; the same command goes on" in served.said[-1]
        with page(evaluated, tmp_path) as served:
            driver.get(served.url)
            count("3 of 5")
            press(Keys.ARROW_LEFT)
            count("4 of 5")
            press(Keys.ARROW_LEFT)
            count("5 of 5")
            assert "All pairs are judged" in driver.find_element(By.ID, "message").text
            press(Keys.BACK_SPACE)
            count("4 of 5")
            press(Keys.ARROW_DOWN)
            count("5 of 5")
            driver.find_element(By.ID, "finish").click()
            served.thread.join(10)
            (judgements,) = served.result
            wait_until(lambda: "Finished" in driver.find_element(By.ID, "message").text)
        assert [j.verdict for j in judgements] == ["first", "second", "first", "first", "tie"]
        assert not console_errors(driver)
    said = []
    again = arena.judge_all(
        evaluated, settings(), "human", tmp_path, 7, said.append
    )  # shown in another order, if at all
    assert {str(j) for j in again} == {str(j) for j in judgements}
    assert not said


def test_the_page_reads_on_a_phone(tmp_path):
    from selenium.webdriver.common.by import By

    with browser(390, 844) as driver, page(make(tmp_path / "pictures", size=64), tmp_path) as served:
        driver.get(served.url)
        wait_until(lambda: driver.execute_script("return ready"))
        size = driver.execute_script("const d = document.documentElement; return [d.scrollWidth, d.scrollHeight]")
        assert size == [390, 844]  # nothing to scroll
        boxes = [driver.find_element(By.ID, name).rect for name in ("left", "right", "choose-tie", "finish")]
        assert all(box["width"] > 40 and box["height"] > 25 and box["x"] >= 0 for box in boxes)
        assert boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"]  # one above the other
        assert boxes[0]["height"] > 200
        driver.find_element(By.ID, "right").click()
        wait_until(lambda: driver.find_element(By.ID, "count").text == "1 of 3")
        assert not console_errors(driver)


def test_the_page_is_closed_to_other_sites_and_bad_requests(tmp_path):
    evaluated = make(tmp_path / "pictures")
    with page(evaluated, tmp_path) as served:
        root = served.url.rsplit("/", 2)[0]
        assert httpx2.get(served.url).headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert httpx2.get(served.url, headers={"Host": "evil.example"}).status_code == 400
        vote = {"pair": 0, "verdict": "first"}
        assert httpx2.post(f"{root}/verdict", json=vote).status_code == 404
        assert httpx2.post(f"{root}/guess/verdict", json=vote).status_code == 404
        assert httpx2.post(f"{served.url}verdict", json=vote, headers={"Host": "evil.example"}).status_code == 400
        assert httpx2.get(f"{served.url}verdict").status_code == 405
        for wrong in (b"", b"[]", b'{"verdict": "best", "pair": 0}'):
            assert httpx2.post(f"{served.url}verdict", content=wrong).status_code == 400
        assert httpx2.get(f"{served.url}picture/99/left").status_code == 404
        assert httpx2.get(f"{served.url}picture/0/..%2f..").status_code == 404
        for _ in range(2):  # the second click on a pair is none
            assert httpx2.post(f"{served.url}verdict", json=vote).json()["done"] == 1
        for unknown in (0, 99, "1", None, [1]):
            assert httpx2.post(f"{served.url}verdict", json={"pair": unknown, "verdict": "tie"}).json()["done"] == 1
        assert clicks(tmp_path) == ["first"]


def test_a_picture_that_cannot_be_shown_is_left_out(tmp_path):
    evaluated = make(tmp_path / "pictures")
    with page(evaluated, tmp_path) as served:
        first = httpx2.get(f"{served.url}pair").json()["pair"]
        line = int(httpx2.get(f"{served.url}pair").json()["prompt"][-1])
        (tmp_path / "pictures" / f"base_{line}.png").unlink()
        sides = [httpx2.get(f"{served.url}picture/{first}/{side}").status_code for side in ("left", "right")]
        assert sorted(sides) == [200, 410]
        assert httpx2.get(f"{served.url}pair").json()["pair"] != first
    assert any(f"base_{line}.png" in text and "left out" in text for text in served.said)
