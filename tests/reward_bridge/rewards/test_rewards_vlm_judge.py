import base64
import io
import json
import logging
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
pytest.importorskip("httpx2")
tenacity = pytest.importorskip("tenacity")

from reward_bridge.bridge import RewardBridge  # noqa: E402
from reward_bridge.reward import RewardError  # noqa: E402
from reward_bridge.rewards import make_reward  # noqa: E402
from reward_bridge.rewards.yes_no import p_yes  # noqa: E402
from tests.helpers.faults import dead_proxy, lying_server  # noqa: E402


def pictures(n, height, width):
    return torch.randint(
        256, (n, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


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


def spelled(*tokens):
    """A chat completion: for each token of the answer, the probabilities at its position."""
    content = []
    for position in tokens:
        top = [{"token": token, "logprob": float(np.log(p))} for token, p in position.items()]
        content.append({**top[0], "top_logprobs": top})
    text = "".join(position["token"] for position in content)
    return {"choices": [{"message": {"content": text}, "logprobs": {"content": content}}]}


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
        "max_tokens": 5,
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


@pytest.mark.parametrize(
    ("tokens", "p"),
    [
        ([{"**": 0.96, "##": 0.04}, {"Yes": 0.6, "No": 0.3}], 2 / 3),
        ([{"```": 1.0}, {"\n": 1.0}, {"yes": 0.2, "no": 0.6}], 0.25),
        # A model that answers "**Yes" half of the time and else "No"
        ([{"**": 0.5, "No": 0.4, "Yes": 0.1}, {"Yes": 0.8, "No": 0.2}], 0.5),
        # What comes after the first word is not read.
        ([{"No": 0.75, "Yes": 0.25}, {"yes": 1.0}], 0.25),
        ([{"\u0120No": 0.75, "\u0120Yes": 0.25}, {"yes": 1.0}], 0.25),
    ],
)
def test_vlm_judge_steps_over_marks_before_the_word(server, tokens, p):
    server.reply = lambda number, body: (200, spelled(*tokens))
    assert judge(server)(pictures(1, 16, 16), [""]).tolist() == pytest.approx([p])


REFUSALS = [
    ((200, spelled({"**": 1.0}, {"Maybe": 1.0})), r"answered '\*\*Maybe': it began"),
    (
        (200, spelled({"I": 1.0, "Yes": 1e-6, "No": 1e-7})),
        r"P\(yes\) \+ P\(no\) = 1\.1e-06 is less",
    ),
    (
        (200, {"choices": [{"message": {"content": None, "refusal": "I can't."}}]}),
        r"it answered \"I can't\.\"",
    ),
    (
        (200, {"choices": [{"message": {"content": ""}, "finish_reason": "content_filter"}]}),
        "it was stopped by a content filter",
    ),
    (
        (400, {"error": {"code": "content_filter", "message": "no"}}),
        r"it rejected it by a content filter \(no\)",
    ),
]


@pytest.mark.parametrize(("reply", "message"), REFUSALS)
def test_a_refusal_names_the_prompt_and_keeps_the_picture(
    server, tmp_path, monkeypatch, reply, message
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    good = (200, answer(yes=1.0))
    server.reply = lambda number, body: reply if "second" in str(body) else good
    images = pictures(3, 16, 16)
    bridge = RewardBridge(
        {"vlm_judge": judge(server, question="{prompt}", concurrency=1)},
        {"vlm_judge": "cpu"},
        deadline=20,
        retries=3,
    )
    with pytest.raises(RewardError, match=message) as raised:
        bridge.submit(images, ["first", "second", "third"]).result()
    bridge.close()
    text = str(raised.value)
    assert text.startswith("reward 'vlm_judge': eye-7b refused 1 of 3 pictures; for the prompt")
    assert "'second'" in text
    assert "config.reward.options.vlm_judge.refusal_score" in text
    assert len(server.requests) == 3  # the same picture would be refused again
    (file,) = tmp_path.glob("refused_*.png")
    assert f"the picture is kept: {file};" in text
    assert (np.asarray(Image.open(file)) == images[1].permute(1, 2, 0).numpy()).all()


def test_refusals_count_what_the_options_say_up_to_a_share(server, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    server.reply = lambda number, body: (
        (200, answer(I=1.0)) if "bad" in str(body) else (200, answer(yes=0.3, no=0.1))
    )
    reward = judge(server, question="{prompt}", refusal_score=-1.0, max_refused=0.5)
    bridge = RewardBridge({"vlm_judge": reward}, {"vlm_judge": "cpu"}, deadline=20, retries=0)
    assert bridge.refused == {"vlm_judge": 0}
    images = pictures(4, 16, 16)
    for call in range(1, 5):
        scores = bridge.submit(images, ["a", "bad", "b", "c"]).result().rewards["vlm_judge"]
        assert scores.tolist() == pytest.approx([0.75, -1, 0.75, 0.75])
        assert bridge.refused == {"vlm_judge": call}

    # Said after 1, 2 and 4 refusals
    lines = [record.getMessage() for record in caplog.records]
    assert [line[-8:] for line in lines] == ["1 so far", "2 so far", "4 so far"]
    assert "refused 1 of 4 pictures; for the prompt 'bad' it answered '?'" in lines[0]
    assert "each refusal counts -1, 1 so far" in lines[0]
    assert len(list(tmp_path.glob("refused_*.png"))) == 3

    with pytest.raises(RewardError, match=r"refused 3 of 4 .* more than \S+max_refused, 0\.5"):
        bridge.submit(images, ["bad", "bad", "bad", "c"]).result()
    bridge.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000/v1"}, r"vlm_judge\.url is 'localhost:8000/v1'; expected an add"),
        ({"refusal_score": float("nan")}, r"vlm_judge\.refusal_score is nan; expected a number"),
        ({"max_refused": 0.0}, r"vlm_judge\.max_refused is 0\.0; expected a share above 0, at mo"),
        ({"max_refused": 10}, r"vlm_judge\.max_refused is 10; expected a share"),
    ],
)
def test_vlm_judge_checks_its_options(options, message):
    with pytest.raises(ValueError, match=message):
        make_reward("vlm_judge", "cpu", {"url": "http://a/v1", "model": "m", **options})


@pytest.mark.parametrize("logprob", [0.9, float("nan"), "high"])
def test_what_is_no_log_probability_is_an_error(server, logprob):
    reply = answer(yes=1.0)
    reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"][0]["logprob"] = logprob
    server.reply = lambda number, body: (200, reply)
    with pytest.raises(ValueError, match="without the first token's log-probabilities"):
        judge(server)(pictures(1, 16, 16), [""])


def test_a_judge_on_this_machine_is_asked_without_the_proxy(server):
    server.reply = lambda number, body: (200, answer(yes=0.3, no=0.1))
    with dead_proxy():
        assert judge(server)(pictures(1, 16, 16), [""]).tolist() == pytest.approx([0.75])


def test_a_judge_that_goes_and_comes_back_is_told_twice(monkeypatch, caplog):
    """Eight requests at a time fail together, and every one is repeated."""
    caplog.set_level(logging.INFO, "reward_bridge")
    monkeypatch.setattr("reward_bridge.openai_chat.BACK_OFF", tenacity.wait_none())
    content = json.dumps(answer(yes=0.3, no=0.1)).encode()
    images, prompts = pictures(8, 16, 16), [""] * 8
    with lying_server(lambda path, body: (200, {}, content)) as url:
        reward = judge(SimpleNamespace(url=f"{url}/v1"))
        reward(images, prompts)
    for _ in range(2):
        with pytest.raises(ValueError, match="failed: ConnectError"):
            reward(images, prompts)
    with lying_server(lambda path, body: (200, {}, content), int(url.split(":")[2])):
        reward(images, prompts)
        reward(images, prompts)
    lost, back = [record.getMessage() for record in caplog.records]
    assert lost.startswith(f"lost the judge eye-7b at {url}/v1: ConnectError")
    assert lost.endswith("; each request is sent up to 4 times")
    assert back == f"the judge eye-7b at {url}/v1 is back after 0 s"


@pytest.mark.parametrize(
    ("models", "question", "message"),
    [
        (401, (200, answer(yes=0.5)), r"/v1 failed: HTTP 401; check url, model and api_key_env"),
        (200, (404, b"no such model"), r"failed: HTTP 404 no such model; check .*; the prompt"),
        (200, (200, {}), r"without the first token's log-probabilities"),
        (200, (200, answer(yes=0.5)), None),
        (403, (200, answer(I=0.5)), None),
        (404, (200, answer(yes=0.5)), None),
    ],
)
def test_the_judge_is_asked_before_anything_is_loaded(models, question, message, caplog):
    def reply(path, body):
        if path == "/v1/models":
            return models, {}, b""
        status, content = question
        return status, {}, content if isinstance(content, bytes) else json.dumps(content).encode()

    with lying_server(reply) as url:
        reward = judge(SimpleNamespace(url=f"{url}/v1"))
        if message is None:
            reward.check_connection()
        else:
            with pytest.raises(ValueError, match=message):
                reward.check_connection()
    with pytest.raises(ValueError, match="failed: ConnectError"):
        reward.check_connection()
    assert not caplog.records  # the errors say it
