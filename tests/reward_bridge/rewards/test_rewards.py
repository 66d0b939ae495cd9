"""Finding rewards by name and checking their options; the JPEG reward."""

import importlib
import io
import sys

import pytest
import torch
from PIL import Image

from reward_bridge.learners import make_learner
from reward_bridge.rewards import REWARDS, make_reward
from tests.helpers.pictures import pictures


def test_unknown_rewards_are_named():
    with pytest.raises(ValueError, match=r"there is no reward 'beauty'; choose from .*clip_score"):
        make_reward("beauty", "cpu", {})
    for target in REWARDS.values():
        module, _, name = target.partition(":")
        assert hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "clip_score",
            {"pth": "x"},
            r"options\.clip_score: .*'path'; ClipScore takes path, scale, dtype",
        ),
        (
            "clip_score",
            {"path": "x", "pth": "x"},
            r"options\.clip_score: got an unexpected keyword argument 'pth'",
        ),
        (
            "jpeg_compressibility",
            {"servers": ["http://a:1"], "quality": 3},
            r"'quality'; RemoteReward takes servers, ",
        ),
    ],
)
def test_wrong_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_reward(name, "cpu", options)


OWN = """
import torch

class Constant:
    def __init__(self, device, value):
        self.value = value

    def __call__(self, images, prompts):
        return torch.full((len(prompts),), self.value)

class Silent:
    def __init__(self, device):
        pass

broken = 1
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module of the user's own, own_rewards."""
    (tmp_path / "own_rewards.py").write_text(OWN)
    (tmp_path / "broken_rewards.py").write_text("class Broken(\n")
    (tmp_path / "failing_rewards.py").write_text("undefined\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("own_rewards", "broken_rewards", "failing_rewards"):
        sys.modules.pop(name, None)


def test_a_class_of_the_users_own(own_module):
    options = {"class": "own_rewards:Constant", "value": 0.5}
    images = pictures(2, 8, 8)
    for name in ("mine", "clip_score"):  # a name of its own, or one that the table has too
        assert make_reward(name, "cpu", options)(images, ["a"] * 2).tolist() == [0.5, 0.5]
    with pytest.raises(
        ValueError, match=r"options\.mine: missing .*'value'; Constant takes value$"
    ):
        make_reward("mine", "cpu", {"class": "own_rewards:Constant"})


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("own_rewards", r"is 'own_rewards'; expected 'package\.module:Class'$"),
        (":Constant", r"is ':Constant'; expected 'package\.module:Class'$"),
        (3, r"is 3; expected 'package\.module:Class'$"),
        (
            "nowhere.rewards:X",
            r"is .*, and the module nowhere\.rewards cannot be imported \(No module named",
        ),
        (
            "broken_rewards:Broken",
            r"is .*, and the module broken_rewards cannot be imported \(.*never closed",
        ),
        (
            "failing_rewards:X",
            r"is .*, and the module failing_rewards cannot be imported \(NameError: name 'undef",
        ),
        ("own_rewards:Missing", r"is .*, but the module own_rewards has no Missing$"),
    ],
)
def test_a_class_that_cannot_be_used_is_named(own_module, target, message):
    with pytest.raises(ValueError, match=rf"^config\.reward\.options\.mine\.class {message}"):
        make_reward("mine", "cpu", {"class": target, "value": 1.0})
    with pytest.raises(
        ValueError, match=rf"^config\.reward\.options\.mine\.class {message}"
    ) as error:
        make_learner("mine", "cpu", {"class": target})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("Silent", r"names Silent, which has neither __call__\(images, prompts\) nor score_groups"),
        ("broken", r"names a int; expected a class$"),
    ],
)
def test_a_class_that_is_no_reward_is_named(own_module, target, message):
    with pytest.raises(ValueError, match=rf"^config\.reward\.options\.mine\.class {message}"):
        make_reward("mine", "cpu", {"class": f"own_rewards:{target}"})


def test_a_class_that_is_no_learner_is_named(own_module):
    message = r"mine\.class names Constant, which has no prepare\(\); a learner has prepare, "
    with pytest.raises(ValueError, match=message):
        make_learner("mine", "cpu", {"class": "own_rewards:Constant", "value": 1.0})


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"'ocr' needs the package rapidocr.*realgen_jax\[ocr\]"):
        make_reward("ocr", "cpu", {})


def test_jpeg_compressibility_is_minus_the_files_size():
    images = pictures(3, 64, 96)
    scores = make_reward("jpeg_compressibility", "cpu", {})(images, ["a"] * 3)
    for pixels, score in zip(images, scores, strict=True):
        file = io.BytesIO()
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=95)
        assert score == pytest.approx(-len(file.getvalue()) / 500_000)
    flat = torch.zeros(1, 3, 64, 96, dtype=torch.uint8)
    assert make_reward("jpeg_compressibility", "cpu", {})(flat, ["a"]) > scores.max()
