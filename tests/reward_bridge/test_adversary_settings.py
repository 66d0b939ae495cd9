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


def test_settings_say_what_is_wrong():
    with pytest.raises(
        ValueError, match=r"adversarial\.x: missing key quality, unknown key kwality; adversary\(\)"
    ):
        Settings.read("x", {**{k: v for k, v in SETTINGS.items() if k != "quality"}, "kwality": 1})
