"""A judge behind an endpoint, over real HTTP: what is sent, retried, counted and kept secret."""

import logging

import numpy as np
import pytest

for module in ("torch", "httpx2", "starlette", "tenacity", "uvicorn"):
    pytest.importorskip(module)


import tenacity  # noqa: E402

from realgen_jax.realbench.results import Judgement  # noqa: E402
from reward_bridge import openai_chat  # noqa: E402
from reward_bridge.judges import api as judge  # noqa: E402
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
from tests.helpers.faults import lying_server  # noqa: E402


@pytest.fixture(autouse=True)
def _no_back_off(monkeypatch):
    monkeypatch.setattr(openai_chat, "BACK_OFF", tenacity.wait_none())


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


def test_the_endpoint_is_asked_before_anything_is_loaded():
    with lying_server(lambda path, body: (401, {}, KEY.encode())) as url:
        arena_judge = judge.ApiJudge(openai_chat.Endpoint("org/judge-1", url, KEY), settings())
        with pytest.raises(
            ValueError, match="the judge org/judge-1 cannot be asked: HTTP 401"
        ) as no:
            arena_judge.check_connection()
    with pytest.raises(
        ValueError, match=r"cannot be asked: ConnectError .*; check REALGEN_"
    ) as away:
        arena_judge.check_connection()
    for error in (no, away):
        assert KEY not in str(error.value)
        assert "127.0.0.1" not in str(error.value)


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
