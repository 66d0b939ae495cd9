"""Rewards that compare the pictures of a prompt: what they are handed, and where they may be."""

import re

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict

from reward_bridge.groups import (
    check_served,
    group_problems,
    groupwise,
    report_problems,
    win_rates,
)
from reward_bridge.reward import RewardError
from tests.helpers.bridges import bridge, images
from tests.helpers.goldens import golden


class Brightest:
    """The share of the other pictures of the prompt that are darker."""

    def __init__(self, device="cpu", most=99):
        self.most = most
        self.seen = []

    def score_groups(self, images, prompts, size):
        self.seen.append(len(prompts))
        if len(prompts) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        bright = images.float().mean((1, 2, 3)).reshape(-1, size)
        outcome = torch.where(
            bright[:, :, None] == bright[:, None], 0.5, (bright[:, :, None] > bright[:, None])
        )
        return torch.from_numpy(win_rates(outcome.float().numpy())).float().flatten()


class Short:
    """One score for each group."""

    def score_groups(self, images, prompts, size):
        return torch.zeros(len(prompts) // size)


RATES = [0.0, 0.5, 1.0] * 2  # of `images`, which grow brighter
PROMPTS = ["a"] * 3 + ["b"] * 3


def scored(reward, group=3, prompts=PROMPTS, **options):
    pending = bridge(reward, **options).submit(images(len(prompts)), prompts, group=group)
    return pending.result().rewards["odd"]


# -- Win rates


def test_win_rates_match_the_golden():
    case = golden("14_objectives/win_rates.npz")
    np.testing.assert_allclose(win_rates(case["outcome"]), case["rate"], rtol=1e-5, atol=1e-6)
    rounded = np.round(win_rates(case["outcome"]), 3)
    np.testing.assert_allclose(rounded, case["rate_rounded"], rtol=1e-5, atol=1e-6)


def test_win_rates_read_above_the_diagonal_only():
    outcome = np.full((3, 3), np.nan)
    outcome[np.triu_indices(3, 1)] = [1.0, 0.5, 0.0]
    below = np.where(np.isnan(outcome), 7.0, outcome)
    np.testing.assert_allclose(win_rates(below), [0.75, 0.0, 0.75])


# -- The bridge


def test_a_reward_is_handed_the_whole_groups_of_a_batch():
    reward = Brightest()
    assert scored(reward).tolist() == RATES
    assert reward.seen == [6]


@pytest.mark.parametrize(("batch_size", "seen"), [(1, [3, 3]), (2, [3, 3]), (4, [3, 3]), (6, [6])])
def test_a_batch_size_splits_no_group(batch_size, seen):
    reward = Brightest()
    assert scored(reward, batch_size=batch_size).tolist() == RATES
    assert reward.seen == seen


def test_out_of_memory_splits_no_group():
    reward = Brightest(most=3)
    assert scored(reward).tolist() == RATES
    assert reward.seen == [6, 3, 3]


def test_a_group_without_room_stops():
    with pytest.raises(RewardError, match="'odd' failed 1 times; the last error: OutOfMemoryError"):
        scored(Brightest(most=2))


def test_one_score_a_group_is_an_error():
    with pytest.raises(RewardError, match=r"'odd' returned shape \(2,\); expected \(6,\)"):
        scored(Short())


@pytest.mark.parametrize(
    ("group", "prompts"), [(1, ["a"] * 6), (4, ["a"] * 6), (2, PROMPTS), (3, ["a", "b", "a"] * 2)]
)
def test_pictures_that_are_no_groups_are_an_error(group, prompts):
    message = f"reward 'odd' compares .* handed 6 pictures that are not whole groups of {group}"
    with pytest.raises(RewardError, match=message):
        scored(Brightest(), group, prompts)


def test_other_rewards_know_no_groups():
    both = bridge(Brightest(), batch_size=2)
    scores = both.submit(images(6), PROMPTS, group=3).result().rewards
    np.testing.assert_allclose(scores["bright"], np.asarray(images(6)).mean((1, 2, 3)))


# -- Checks before anything is loaded


def reward_config(**changes):
    own = {"class": "tests.reward_bridge.test_groups:Brightest"}
    values = {"fn": {"brightest": 1.0}, "watched": (), "held_out": (), "adversarial": {}}
    return ConfigDict({**values, "options": {"brightest": own}, **changes})


def sample(**changes):
    values = {
        "train_batch_size": 8,
        "num_image_per_prompt": 4,
        "test_batch_size": 8,
        "test_images_per_prompt": 2,
        "scout": {"previews": 0},
    }
    return ConfigDict({**values, **changes})


def test_it_is_known_which_rewards_compare_pictures():
    names = ["brightest", "diversity", "embedded_detector", "unheard_of"]
    assert groupwise(reward_config(), names) == ["brightest", "diversity"]
    served = reward_config(options={"diversity": {"servers": ("http://a:1",)}})
    assert groupwise(served, ["diversity"]) == []


def test_whole_groups_have_no_problems():
    assert group_problems(reward_config(), sample()) == []
    assert group_problems(reward_config(), sample(), processes=2) == []
    alone = reward_config(fn={"embedded_detector": 1.0})
    assert group_problems(alone, sample(num_image_per_prompt=16)) == []


@pytest.mark.parametrize(
    ("changes", "processes", "message"),
    [
        ({"num_image_per_prompt": 16}, 1, "8 pictures .* not whole groups of 16"),
        ({}, 4, "2 pictures .* not whole groups of 4"),
        ({"scout": {"previews": 12}}, 1, "8 pictures .* not all 12 previews of one prompt"),
        ({"test_images_per_prompt": 1}, 1, "test_images_per_prompt is 1; expected 2 or more"),
        ({"test_images_per_prompt": 3}, 1, "test_images_per_prompt is 3; .* dividing the 8"),
    ],
)
def test_split_groups_are_refused(changes, processes, message):
    if processes > 1:
        changes = {**changes, "test_batch_size": 8 * processes}
    (problem,) = group_problems(reward_config(), sample(**changes), processes)
    assert problem.startswith("brightest: compares the pictures of a prompt, but ")
    assert re.search(message, problem)


def test_a_watched_reward_needs_no_groups_in_evaluations():
    watched = reward_config(fn={"embedded_detector": 1.0}, watched=("brightest",))
    assert group_problems(watched, sample(test_images_per_prompt=1)) == []
    (problem,) = group_problems(watched, sample(num_image_per_prompt=16))
    assert "not whole groups of 16" in problem


def test_a_report_has_no_groups():
    assert report_problems(reward_config(), ["embedded_detector"]) == []
    (problem,) = report_problems(reward_config(), ["embedded_detector", "brightest"])
    assert problem.startswith("config.evaluate.scores has brightest, which compares")


def test_a_server_has_no_groups():
    with pytest.raises(ValueError, match="the reward 'x' compares the pictures of a prompt"):
        check_served("x", Brightest())
    check_served("y", lambda images, prompts: images)
