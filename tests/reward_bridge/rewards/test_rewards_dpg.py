"""dpg: the share of yes answers, with questions that depend on others, from a made-up endpoint."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("httpx2")

from reward_bridge.rewards import make_reward  # noqa: E402
from reward_bridge.rewards.dpg import Dpg, DpgQuestion, share  # noqa: E402
from tests.helpers.pictures import pictures  # noqa: E402

HEADER = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,tuple,question_natural_language"
)
ROWS = (
    '1,"a brown dog, asleep",,1,0,entity,,Is there a dog?',
    '1,"a brown dog, asleep",,2,1,attribute,,Is the dog brown?',
    '1,"a brown dog, asleep",,3,"1, 2",other,,Is the brown dog asleep?',
    "2,a red car,,1,0,entity,,Is there a car?",
    "2,a red car,,2,1,attribute,,Is the car red?",
)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "dpg_bench.csv"
    path.write_text("\n".join([HEADER, *ROWS]) + "\n")
    return path


def answer(yes):
    top = [{"token": t, "logprob": float(np.log(p))} for t, p in (("yes", yes), ("no", 1 - yes))]
    position = {**top[0], "top_logprobs": top}
    return {"choices": [{"message": {"content": "?"}, "logprobs": {"content": [position]}}]}


def test_questions_are_asked_and_dependent_ones_need_their_parents(server, file):
    p_yes = {"Is there a dog?": 0.9, "Is the dog brown?": 0.2, "Is the brown dog asleep?": 0.8,
             "Is there a car?": 0.7, "Is the car red?": 0.6}  # fmt: skip

    def reply(number, body):
        text = body["messages"][0]["content"][1]["text"]
        question = text.partition("?")[0] + "?"
        assert text.endswith("answer with one word, yes or no.")
        return 200, answer(p_yes[question])

    server.reply = reply
    reward = make_reward("dpg", "cpu", {"url": server.url, "model": "eye", "prompts": str(file)})
    scores = reward(pictures(2, 16, 16), ["a red car", "a brown dog, asleep"])
    assert scores.tolist() == pytest.approx([1.0, 1 / 3])
    assert len(server.requests) == 5
    with pytest.raises(ValueError, match="the prompt 'a cat' is not in config"):
        reward(pictures(1, 16, 16), ["a cat"])
    with pytest.raises(ValueError, match="the prompt 'a cat' is not in config"):
        Dpg.check_prompt("a cat", {"prompts": str(file)})


def test_a_no_is_passed_on():
    chain = [DpgQuestion(1, "", ()), DpgQuestion(2, "", (1,)), DpgQuestion(3, "", (2,))]
    assert share(chain, [True, True, True]) == 1
    assert share(chain, [False, True, True]) == 0
    assert share(chain, [True, True, False]) == pytest.approx(2 / 3)
    assert share([DpgQuestion(1, "", (9,))], [True]) == 1  # the file has no question 9
    either = [DpgQuestion(1, "", ()), DpgQuestion(2, "", ()), DpgQuestion(3, "", (1, 2))]
    assert share(either, [True, False, True]) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["1,a cat,,one,0,entity,,Is there a cat?"], "line 2, is no question of DPG-Bench"),
        (["1,a cat,,1,0,entity,,"], "an empty text or question"),
        ([], "is empty"),
    ],
)
def test_bad_files_are_named(tmp_path, rows, message):
    file = tmp_path / f"{abs(hash(message))}.csv"
    file.write_text("\n".join([HEADER, *rows]) + "\n")
    with pytest.raises(ValueError, match=message):
        make_reward("dpg", "cpu", {"url": "http://a/v1", "model": "m", "prompts": str(file)})


def test_another_table_is_refused(tmp_path):
    file = tmp_path / "other.csv"
    file.write_text("text,score\n")
    with pytest.raises(ValueError, match="has no column item_id, proposition_id, dependency, que"):
        make_reward("dpg", "cpu", {"url": "http://a/v1", "model": "m", "prompts": str(file)})
    with pytest.raises(FileNotFoundError, match="'/nowhere', which does not exist"):
        make_reward("dpg", "cpu", {"url": "http://a/v1", "model": "m", "prompts": "/nowhere"})
