"""When a reward learns, and refusals of its settings."""

import pytest

from reward_bridge.adversary_settings import SCHEDULES, Settings
from tests.helpers.adversaries import SETTINGS, adversary, write_references


@pytest.fixture
def folder(tmp_path):
    return write_references(tmp_path)


@pytest.mark.parametrize(
    ("schedule", "epochs", "wanted"),
    [
        # the first epoch in any case, then above 0.6
        ("threshold", [(0.5, 0.9), (0.61, 0.9), (0.6, 0.9)], [True, True, False]),
        # below 0.1
        ("margin", [(0.5, 0.9), (0.5, 0.61), (0.5, 0.55), (0.5, 0.4)], [True, False, True, True]),
        ("every", [(0, 0)] * 7, [True, True, False, True, True, False, True]),
        # a rise by 0.2, then 0.05 and none: two epochs in a row without 0.1; then it counts afresh
        ("plateau", [(0.5, 0), (0.7, 0), (0.75, 0), (0.7, 0), (0.3, 0), (0.35, 0), (0.3, 0)],
         [True, False, False, True, False, False, True]),
    ],
)  # fmt: skip
def test_schedules(folder, schedule, epochs, wanted):
    one = adversary(folder, schedule=schedule)
    assert [one.due(i, *means) for i, means in enumerate(epochs)] == wanted
    assert schedule in SCHEDULES


@pytest.mark.parametrize(
    ("rewards", "always_first", "epochs"),
    [
        ([0.5 + 0.009 * i for i in range(12)], False, []),  # slow, but steady: 0.045 in five epochs
        ([0.5, 0.2, 0.24, 0.28, 0.32, 0.36, 0.4], True, [0]),  # falls as it learns, then rises
        ([0.5] * 12, False, [5, 11]),
        ([0.5] * 12, True, [0, 6]),
        ([0.5 + 0.0019 * i for i in range(12)], False, [5, 11]),  # 0.0095 in five epochs
        ([0.9, 0.9, 0.5, 0.6, 0.7, 0.8, 0.9, 0.9, 0.9, 0.9, 0.9], False, [5]),
    ],
)  # fmt: skip
def test_a_plateau_is_a_rise_that_is_too_small(folder, rewards, always_first, epochs):
    changes = {"schedule": "plateau", "patience": 5, "min_rise": 0.01, "always_first": always_first}
    reward = adversary(folder, **changes)
    due = []
    for epoch, value in enumerate(rewards):
        resumed = adversary(folder, **changes)
        resumed.restore(reward.state())
        if reward.due(epoch, value, 0.0):
            due.append(epoch)
        assert resumed.due(epoch, value, 0.0) == (epoch in due)
        assert resumed.memory == reward.memory
    assert due == epochs


def test_settings_say_what_is_wrong():
    with pytest.raises(
        ValueError, match=r"adversarial\.x: missing key quality, unknown key kwality; adversary\(\)"
    ):
        Settings.read("x", {**{k: v for k, v in SETTINGS.items() if k != "quality"}, "kwality": 1})
