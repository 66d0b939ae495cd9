"""The arena: questions, judges over real HTTP, and what is kept of their answers."""

import base64
import contextlib
import hashlib
import io
import json
import logging
import signal
import time

import numpy as np
import pytest
from PIL import Image

from tests.helpers.goldens import GOLDENS, ROOT

torch = pytest.importorskip("torch")
for module in ("httpx2", "starlette", "tenacity", "uvicorn"):
    pytest.importorskip(module)


import httpx2  # noqa: E402
import tenacity  # noqa: E402

from realgen_jax.realbench import arena, questions  # noqa: E402
from realgen_jax.realbench.results import Judgement, Results, ScoredPicture  # noqa: E402
from reward_bridge import openai_chat  # noqa: E402
from reward_bridge.judges import api as judge  # noqa: E402
from reward_bridge.judges import make_judge  # noqa: E402
from reward_bridge.judges.stand_in import serving  # noqa: E402
from reward_bridge.rewards import make_reward  # noqa: E402
from tests.helpers.arena_judges import (  # noqa: E402
    KEY,
    brighter,
    brightness,
    chat,
    failing,
    judging,
    kept,
    make,
    run,
    settings,
)
from tests.helpers.reward_servers import end, start  # noqa: E402


@pytest.fixture(autouse=True)
def _no_back_off(monkeypatch):
    monkeypatch.setattr(openai_chat, "BACK_OFF", tenacity.wait_none())


# --- questions and answers


def test_realgen_verdicts_are_read_as_the_reference_reads_them():
    golden = json.loads((GOLDENS / "11_arena/arena_parse.json").read_text())
    names = {"first": "image_1", "second": "image_2", None: "unknown"}
    read = [names[questions.read_realgen(case["response"])] for case in golden["cases"]]
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
    assert questions.read_balanced(reply) == verdict


def test_the_questions_do_not_answer_themselves():
    """A judge that repeats what it was asked names no verdict."""
    for name in ("realgen", "balanced"):
        protocol = questions.PROTOCOLS[name]
        assert protocol.read(protocol.text) is None


def test_questions_of_each_protocol(tmp_path):
    evaluated = make(tmp_path, ("base", "photos", "tuned"), lines=4)

    def asked(protocol, **changed):
        protocol = questions.PROTOCOLS[protocol]
        made, incomplete = questions.make_questions(
            evaluated, settings(**changed), protocol, seed=1
        )
        assert not incomplete
        return sorted((q.first.line, q.first.entry, q.second.entry) for q in made)

    both = [
        ("base", "photos"),
        ("base", "tuned"),
        ("photos", "base"),
        ("photos", "tuned"),
        ("tuned", "base"),
    ]
    both.append(("tuned", "photos"))
    assert asked("balanced") == [(line, *pair) for line in range(4) for pair in both]
    assert asked("balanced", prompts=2, pairs="first") == [
        (line, *pair) for line in (0, 2) for pair in both if "base" in pair
    ]
    assert asked("realgen") == [
        (line, entry, "photos") for line in range(4) for entry in ("base", "tuned")
    ]
    once = asked("human")
    assert len(once) == 12
    assert len({(line, frozenset(pair)) for line, *pair in once}) == 12
    assert once == asked("human")
    assert {first < second for _, first, second in once} == {True, False}


def test_prompts_are_spread_evenly():
    assert questions.spread(10, 0) == list(range(10))
    assert questions.spread(10, 4) == [0, 2, 5, 7]
    assert questions.spread(3, 9) == [0, 1, 2]


def test_settings_that_ask_for_what_is_not_there(tmp_path, monkeypatch):
    evaluated = make(tmp_path)
    for changed in ({"protocol": "realgen"}, {"pairs": "photographs"}):
        with pytest.raises(ValueError, match="photographs"):
            run(evaluated, tmp_path, "embedded", **changed)
    with pytest.raises(ValueError, match="pairs is 'some'"):
        run(evaluated, tmp_path, "embedded", pairs="some")
    with pytest.raises(ValueError, match=r"arena\.concurrency is 0; expected 1 or more"):
        run(evaluated, tmp_path, "embedded", concurrency=0)
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
    with pytest.raises(
        ValueError, match=f"{judge.KEY_ENV} holds characters that an HTTP"
    ) as raised:
        run(evaluated, tmp_path)
    assert "cret" not in str(raised.value)
    embedded = make_judge("embedded", settings())
    with pytest.raises(ValueError, match="there is only 'base'"):
        arena.check_arena(make(tmp_path, ("base",)).entries, settings(), embedded)
    arena.check_arena(evaluated.entries, settings(), embedded)
    with pytest.raises(ValueError, match="no judge 'x'; choose embedded, api or human"):
        make_judge("x", settings())


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
        assert server.seen[1][2]["messages"][0]["content"][1]["image_url"]["url"].startswith(
            "data:image/png;base64,"
        )
    assert judgements == [
        Judgement("short", 0, "base", "photos", "second", "More realistic image: Image 2")
    ]


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
        Image.new("RGB", (16, 16), (250, 0, 0)).save(
            evaluated.pictures[0].file
        )  # base, line 0: now the brightest
        digest = hashlib.sha256(evaluated.pictures[0].file.read_bytes()).hexdigest()
        evaluated.pictures[0] = ScoredPicture(**{**vars(evaluated.pictures[0]), "sha256": digest})
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
        storing = arena.storing_answers

        @contextlib.contextmanager
        def interrupting(file, answers):
            with storing(file, answers) as keep:

                def keep_or_stop(*answer):
                    keep(*answer)
                    if len(kept(tmp_path)) == 4:  # they are in the file, not only in memory
                        raise KeyboardInterrupt

                yield keep_or_stop

        patch.setattr(arena, "storing_answers", interrupting)
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
        assert [record["reply"] for record in kept(tmp_path)][:2] == [
            "I would rather not.",
            "Verdict: 1",
        ]
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
        return (
            failing(503, "overloaded")
            if broken and brightness(body)[0] == 40
            else brighter(n, body)
        )

    with judging(reply) as server:
        judgements, said = run(evaluated, tmp_path, max_failures=100)
        assert len(judgements) == len(kept(tmp_path)) == 4
        assert len(server.seen) == 4 + 4 * 3
        assert "4 questions failed: HTTP 503 overloaded" in said
        assert "judged 0 of 4 pairs in both orders; run the same command again" in said
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
    assert "stopped asking org/judge-1" in said
    assert "judged 0 of 3 pairs" in said
    assert KEY not in said


def test_a_judge_that_only_fails_is_left_alone(tmp_path):
    with judging(lambda *_: failing(404, "no such model")) as server:
        _, said = run(make(tmp_path / "pictures", lines=10), tmp_path, concurrency=1)
    assert len(server.seen) == 3
    assert "3 questions in a row failed, the last one: HTTP 404 no such model" in said


def test_failures_between_answers_are_not_in_a_row(tmp_path):
    """Every second request fails, for good."""
    with judging(
        lambda n, body: brighter(n, body) if n % 2 else failing(400, "too large")
    ) as server:
        judgements, said = run(
            make(tmp_path / "pictures", lines=5), tmp_path, concurrency=1, max_failures=2
        )
    assert len(server.seen) == 10
    assert len(judgements) == 5
    assert "5 questions failed: HTTP 400 too large" in said
    assert "stopped asking" not in said


def test_silence_and_absence(tmp_path):
    evaluated = make(tmp_path / "pictures", lines=1)
    with judging(lambda *_: 5.0) as server:
        judgements, said = run(evaluated, tmp_path, timeout=0.1, attempts=2)
        assert len(server.seen) == 4
        assert "2 questions failed: no answer within 0.1 s" in said
        port = server.url.split(":")[2]
    with judging(brighter), pytest.MonkeyPatch.context() as patch:
        patch.setenv(judge.URL_ENV, f"http://127.0.0.1:{port}")
        judgements, said = run(evaluated, tmp_path)
        assert "2 questions failed: ConnectError" in said
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
    assert openai_chat.retry_after("7") == 7
    assert openai_chat.retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    in_a_minute = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))
    assert 55 < openai_chat.retry_after(in_a_minute) < 61
    assert openai_chat.retry_after("") == openai_chat.retry_after("soon") == 0


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
        evaluated.pictures[i] = ScoredPicture(**{**vars(scored), "sha256": digest})
    judgements, _ = run(evaluated, tmp_path, "embedded")
    assert {(j.first, j.verdict) for j in judgements} == {("noise", "second"), ("photos", "first")}
    judgements, _ = run(evaluated, tmp_path, "embedded", protocol="realgen")
    reward = make_reward("embedded_held_out", "cpu", {})
    sent = [
        np.array(Image.open(io.BytesIO(questions.encode_picture(p, "JPEG"))))
        for p in evaluated.pictures
    ]
    scores = [reward(torch.from_numpy(array).permute(2, 0, 1)[None], [""]).item() for array in sent]
    better = 1 if scores[0] > scores[1] else 2
    assert [j.verdict for j in judgements] == [("first", "second")[better - 1]]
    assert judgements[0].reply.startswith(f"More Realistic Image: Image {better}\nReason: ")
    assert (tmp_path / "embedded_held_out" / "realgen.jsonl").exists()
    same = Results(evaluated.sets, evaluated.entries, [], [evaluated.pictures[0]], [])
    copied = ScoredPicture(**{**vars(evaluated.pictures[0]), "entry": "photos"})
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
            (body(url, url, text="Which?"), 400, "no known form of answer"),
            (body(url, url, model="gpt"), 404, "'gpt'"),
            (body(url, url, stream=True), 400, "does not stream"),
            ({"messages": 3}, 400, "not a chat"),
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
