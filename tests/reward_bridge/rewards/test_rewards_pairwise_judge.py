"""Pictures of a prompt judged two by two, by a made-up endpoint."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
pytest.importorskip("httpx2")

from reward_bridge.reward import RewardError  # noqa: E402
from reward_bridge.rewards import make_reward  # noqa: E402
from tests.helpers.bridges import bridge  # noqa: E402
from tests.reward_bridge.rewards.test_rewards_vlm_judge import answer  # noqa: E402

PROMPTS = ["a cat"] * 3 + ["a dog"] * 3
# The brightness of six pictures, and their win rates within the two prompts.
LEVELS = [10, 30, 20, 200, 200, 0]
RATES = [0.0, 1.0, 0.5, 0.75, 0.75, 0.0]


def pictures():
    return torch.tensor(LEVELS, dtype=torch.uint8).reshape(6, 1, 1, 1).expand(6, 3, 8, 8)


def levels(body):
    """The brightness of the pictures in a request, in order, and its question."""
    *images, text = body["messages"][0]["content"]
    found = []
    for image in images:
        data = image["image_url"]["url"].partition(",")[2]
        found.append(int(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).mean()))
    return found, text["text"]


def brighter(number, body):
    """Yes if the first picture is brighter; of equal ones, always the first."""
    (first, second), _ = levels(body)
    return 200, answer(yes=0.9, no=0.1) if first >= second else answer(yes=0.2, no=0.7)


def judge(endpoint, **options):
    options = {"url": endpoint.url, "model": "eye-7b", **options}
    return make_reward("pairwise_judge", "cpu", options)


def scored(reward, **options):
    both = bridge(reward, **options)
    return both.submit(pictures(), PROMPTS, group=3).result().rewards["odd"]


def test_each_pair_of_a_prompt_is_asked_in_both_orders(server):
    server.reply = brighter
    assert scored(judge(server, question="{prompt}?")).tolist() == RATES
    asked = sorted(levels(body) for _, _, body in server.requests)
    pairs = [([a, b], "a cat?") for a in LEVELS[:3] for b in LEVELS[:3] if a != b]
    pairs += [([a, b], "a dog?") for a in (0,) for b in (200, 200)]
    pairs += [([b, a], "a dog?") for a in (0,) for b in (200, 200)]
    pairs += [([200, 200], "a dog?")] * 2
    assert asked == sorted(pairs)


def test_a_preference_for_the_first_place_cancels(server):
    server.reply = lambda number, body: (200, answer(Yes=0.9, no=0.1))
    assert scored(judge(server)).tolist() == [0.5] * 6


def test_groups_stay_whole_in_small_batches(server):
    server.reply = brighter
    assert scored(judge(server), batch_size=2).tolist() == RATES


def test_a_refused_order_is_half_a_tie(server):
    """The second prompt's black picture is not looked at."""

    def reply(number, body):
        found, _ = levels(body)
        return (200, answer(maybe=1.0)) if 0 in found else brighter(number, body)

    server.reply = reply
    reward = judge(server, refusal_score=0.5, max_refused=0.5)
    assert scored(reward).tolist() == [0.0, 1.0, 0.5, 0.5, 0.5, 0.5]
    assert reward.refused == 4
    with pytest.raises(RewardError, match="'pairwise_judge': eye-7b refused 4 of 12 pairs of pic"):
        scored(judge(server))


def test_a_wrong_option_is_named(server):
    with pytest.raises(ValueError, match=r"config.reward.options.pairwise_judge.url is 'here'"):
        judge(server, url="here")
    with pytest.raises(ValueError, match=r"pairwise_judge: got an unexpected .* 'orders'"):
        judge(server, orders=2)


def test_the_connection_is_checked_with_two_pictures(server):
    server.reply = lambda number, body: (200, answer(yes=0.9, no=0.1))
    judge(server).check_connection()
    assert levels(server.requests[-1][2])[0] == [128, 128]
