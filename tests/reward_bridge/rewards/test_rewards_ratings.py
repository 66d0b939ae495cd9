"""Rewards that read levels or ratings in a chat model's answers, from a made-up endpoint."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("httpx2")

from reward_bridge.reward import RewardError  # noqa: E402
from reward_bridge.rewards import make_reward  # noqa: E402
from reward_bridge.rewards.deqa import expected_level  # noqa: E402
from reward_bridge.rewards.ratings import QwenVlScore, UnifiedReward, VisualQualityR1  # noqa: E402
from tests.helpers.goldens import GOLDENS  # noqa: E402
from tests.helpers.pictures import pictures  # noqa: E402

IMAGES = pictures(2, 16, 24)


def made(name, server, **options):
    return make_reward(name, "cpu", {"url": server.url, "model": "eye-7b"} | options)


def written(*texts):
    return {"choices": [{"message": {"content": text}} for text in texts]}


def first_token(**tokens):
    top = [{"token": token, "logprob": float(np.log(p))} for token, p in tokens.items()]
    position = {**top[0], "top_logprobs": top}
    return {"choices": [{"message": {"content": "?"}, "logprobs": {"content": [position]}}]}


# -- Ratings


@pytest.mark.parametrize(
    ("name", "texts", "scores", "asked"),
    [
        (
            "unifiedreward",
            ["Sharp, and all is there.\nFinal Score: 4.5", "**Final Score:** 2"],
            [0.9, 0.4],
            "a red cat",
        ),
        ("qwen_vl_score", ["Blurred. <Score>1</Score>", "<Score> 3.5 </Score>"], [0.2, 0.7], ""),
        (
            "visualquality_r1",
            ["<think>2 cats</think><answer>3.25</answer>", "<answer>9</answer>"],
            [3.25, 5.0],
            "<answer>",
        ),
    ],
)
def test_ratings_are_read(server, name, texts, scores, asked):
    by_prompt = {"a red cat": texts[0], "a dog": texts[1]}

    def reply(number, body):
        picture = body["messages"][0]["content"][0]["image_url"]["url"]
        with server.lock:
            place = urls.setdefault(picture, len(urls))
        return 200, written(list(by_prompt.values())[place])

    urls = {}
    server.reply = reply
    reward = made(name, server, concurrency=1)
    assert reward(IMAGES, list(by_prompt)).tolist() == pytest.approx(scores)
    question = server.requests[0][2]["messages"][0]["content"][1]["text"]
    assert asked in question
    assert "{prompt}" not in question


@pytest.mark.parametrize("case", json.loads(
    (GOLDENS / "10_rewards" / "visualquality_parse.json").read_text())["cases"],
    ids=lambda case: case["text"][:20],
)  # fmt: skip
def test_visualquality_r1_reads_as_realgen_v2_does(case):
    """Where RealGen-V2 makes up a 1, there is no rating."""
    rating = VisualQualityR1.rating(case["text"])
    assert case["score"] == (1.0 if rating is None else rating)
    has_digit = any(letter.isdigit() for letter in case["text"])
    assert (rating is None) == (not has_digit)


@pytest.mark.parametrize(
    ("reward", "text", "rating"),
    [
        (UnifiedReward, "Final Score: 5", 5.0),
        (UnifiedReward, "final score - 3.75 of 5", 3.75),
        (UnifiedReward, "Final Score: 7", None),
        (UnifiedReward, "Score 4, which is final", None),
        (UnifiedReward, "Final Score: high, above 4", None),
        (QwenVlScore, "<score>2</score>", 2.0),
        (QwenVlScore, "<Score>0</Score>", None),
        (QwenVlScore, "3", None),
    ],
)
def test_what_is_a_rating(reward, text, rating):
    assert reward.rating(text) == rating


def test_sampled_answers_are_averaged_and_seeded(server):
    server.reply = lambda number, body: (200, written("<answer>2</answer>", "<answer>4</answer>"))
    reward = made("visualquality_r1", server, request={"n": 2, "top_k": None}, concurrency=1)
    assert reward(IMAGES, ["a", "a"]).tolist() == [3.0, 3.0]
    assert reward(IMAGES, ["a", "b"]).tolist() == [3.0, 3.0]
    bodies = [body for _, _, body in server.requests]
    seeds = [body["seed"] for body in bodies]
    assert seeds[0] == seeds[2]  # the same picture and prompt
    assert len(set(seeds)) == 3
    assert bodies[0]["n"] == 2
    assert bodies[0]["temperature"] == 1.0
    assert "top_k" not in bodies[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unifiedreward", r"answered 'no idea', which has no rating: 'Final Score: ' and"),
        ("visualquality_r1", r"has no rating: a number in <answer> tags; the picture is kept"),
    ],
)
def test_an_answer_without_a_rating_is_a_refusal(server, tmp_path, monkeypatch, name, message):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    server.reply = lambda number, body: (200, written("no idea"))
    with pytest.raises(RewardError, match=message):
        made(name, server)(IMAGES, ["a", "b"])
    lenient = made(name, server, refusal_score=1.0, max_refused=1.0)
    assert lenient(IMAGES, ["a", "b"]).tolist() == [1.0, 1.0]
    assert lenient.refused == 2


@pytest.mark.parametrize("answer", [{"choices": []}, {}, written(None)])
def test_an_answer_without_a_text_is_an_error(server, answer):
    server.reply = lambda number, body: (200, answer)
    with pytest.raises(ValueError, match=r"without a text: .*; expected choices\[0\]\.message"):
        made("qwen_vl_score", server)(IMAGES, ["a", "b"])


# -- Levels


def test_deqa_is_the_expected_level(server):
    server.reply = lambda number, body: (200, first_token(Good=0.3, fair=0.1, good=0.1, The=0.5))
    scores = made("deqa", server)(IMAGES, ["a", "b"])
    assert scores.tolist() == pytest.approx([3.8, 3.8])
    body = server.requests[0][2]
    assert body["logprobs"]
    assert body["top_logprobs"] == 20


def test_the_expected_level_over_tokens():
    def level(**tokens):
        return expected_level([(token, float(np.log(p))) for token, p in tokens.items()])

    # All five words; "ex" begins one of them, and a single letter counts for none.
    mass, expected = level(ex=0.1, Good=0.2, fair=0.3, poor=0.2, bad=0.1, b=0.1)
    assert mass == pytest.approx(0.9)
    assert expected == pytest.approx((0.5 + 0.8 + 0.9 + 0.4 + 0.1) / 0.9)
    assert level(beautiful=1.0)[0] == 0.0
    assert level(Ġexcellent=1.0) == (pytest.approx(1.0), pytest.approx(5.0))


def test_deqa_refuses_other_words(server, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    server.reply = lambda number, body: (200, first_token(The=0.999, good=0.001))
    with pytest.raises(RewardError, match=r"one of \['The', 'good'\], and the five words have a"):
        made("deqa", server)(IMAGES, ["a", "b"])
