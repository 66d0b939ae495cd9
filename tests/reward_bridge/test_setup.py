"""A run's rewards from its config: what is refused, where they run, what is loaded."""

import pytest
import torch
from ml_collections import ConfigDict

from reward_bridge.adversary import Adversary
from reward_bridge.devices import Allotment
from reward_bridge.setup import (
    encoder_problems,
    missing_rewards,
    negative_problems,
    open_rewards,
    reward_devices,
    reward_problems,
)
from tests.helpers.adversaries import SETTINGS, write_references
from tests.helpers.pictures import pictures

PROMPTS = ["a photo"] * 2
OWN = """
from tests.helpers.adversaries import Brightness

class Frozen:
    def __init__(self, device, scale):
        self.scale = scale

    def __call__(self, images, prompts):
        return self.scale * images.float().mean((1, 2, 3))

class Silent:
    pass

class Learning(Brightness):
    def __init__(self, device, scale):
        super().__init__()
"""


def reward_config(**changes):
    """config.reward with the embedded detector."""
    config = {
        "fn": {"embedded_detector": 1.0},
        "held_out": ("jpeg_compressibility",),
        "watched": (),
        "metrics": (),
        "options": {},
        "device": "cpu",
        "devices": {},
        "share_gpu": False,
        "batch_size": 0,
        "deadline": 20.0,
        "retries": 0,
        "adversarial": {},
        "references": {"path": "", "root": ""},
    }
    return ConfigDict({**config, **changes})


def opened(reward, names=None, **options):
    """open_rewards with JAX on the CPU."""
    options = {"hide_from_jax": pytest.fail, "jax_platforms": "cpu", **options}
    return open_rewards(reward, names, **options)


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module of the user's own, own_setup."""
    (tmp_path / "own_setup.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)


# -- Checks


def test_rewards_without_a_logarithm_are_told():
    assert negative_problems(reward_config()) == []
    (problem,) = negative_problems(reward_config(fn={"jpeg_compressibility": 1.0, "hpsv3": 1.0}))
    assert "those of hpsv3, jpeg_compressibility can be negative" in problem


def test_a_good_config_has_no_problems(tmp_path):
    write_references(tmp_path)
    assert reward_problems(reward_config()) == []
    learning = reward_config(
        metrics=("embedded_sharpness",),
        adversarial={"embedded_detector": SETTINGS},
        references={"path": str(tmp_path), "root": ""},
    )
    assert reward_problems(learning, ("embedded_held_out",)) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"held_out": ("embedded_detector",)},
            "embedded_detector: both in config.reward.fn (trained on) and in "
            "config.reward.held_out; choose one",
        ),
        (
            {"adversarial": {"pickscore": SETTINGS}},
            "config.reward.adversarial has pickscore, which is not trained on (config.reward.fn)",
        ),
        (
            {
                "options": {"embedded_detector": {"servers": ("http://a:1",)}},
                "adversarial": {"embedded_detector": SETTINGS},
            },
            "embedded_detector is computed by servers and cannot learn; remove it from "
            "config.reward.adversarial, or its servers from config.reward.options",
        ),
        (
            {
                "adversarial": {
                    "embedded_detector": {
                        **SETTINGS,
                        "schedule": "every",
                        "skip_generator": True,
                        "cycle": 2,
                    }
                }
            },
            "config.reward.adversarial.embedded_detector: it learns in every epoch (learn_epochs "
            "2, cycle 2), and with skip_generator the generator would never be trained; expected "
            "learn_epochs below cycle",
        ),
        (
            {
                "fn": {"reward": 1.0},
                "options": {
                    "reward": {
                        "class": "reward_bridge.rewards.jpeg_compressibility:JpegCompressibility"
                    }
                },
            },
            "'reward' cannot be the name of a reward; expected letters, digits, '-' and '_', and "
            "none of reward, prompt_std",
        ),
        (
            {"held_out": ("embedded_detector_at_start",)},
            "config.reward.held_out has embedded_detector_at_start, the frozen copy of a reward "
            "that learns, but embedded_detector does not learn (config.reward.adversarial)",
        ),
        (
            {"device": "cuda:7"},
            "there is no device 'cuda:7': torch sees 0 CUDA devices on this machine",
        ),
        (
            {"options": {"embedded_detector": {"path": "/nowhere"}}},
            "config.reward.options.embedded_detector.path is '/nowhere', which does not exist; "
            "docs/rewards.md says where the weights come from",
        ),
    ],
)
def test_each_problem_is_one_line(changes, problem):
    assert reward_problems(reward_config(**changes)) == [problem]


def test_unknown_names_are_listed_with_the_known_ones():
    problems = reward_problems(
        reward_config(
            fn={"beauty": 1.0, "jpeg_compressibility": 1.0},
            held_out=("truth",),
            metrics=("fid",),
            adversarial={"jpeg_compressibility": SETTINGS},
        ),
        ("truth", "grace"),
    )
    assert len(problems) == 3
    assert problems[0].startswith(
        "there is no reward beauty, truth, grace; choose from aesthetic, "
    )
    assert problems[1].startswith(
        "config.reward.adversarial: there is no learner jpeg_compressibility; choose from dino_"
    )
    assert problems[2].startswith(
        "config.reward.metrics: there is no metric fid; choose from embedded_frechet, "
    )


def test_servers_know_what_they_have():
    reward = reward_config(options={"beauty": {"servers": ("http://a:1",), "path": "/nowhere"}})
    assert missing_rewards(reward, ["beauty"]) == []


def test_classes_of_the_users_own_are_accepted_if_they_can_be_imported(own_module):
    good = {"class": "own_setup:Frozen"}
    reward = reward_config(options={"mine": good, "yours": {"class": "own_setup:Missing"}})
    assert missing_rewards(reward, ["mine"]) == []
    problem = "config.reward.options.yours.class is 'own_setup:Missing', but the module own_setup"
    assert [line[: len(problem)] for line in missing_rewards(reward, ["mine", "yours"])] == [
        problem
    ]
    silent = reward_config(options={"mine": {"class": "own_setup:Silent"}})
    (line,) = missing_rewards(silent, ["mine"])
    assert line.startswith("config.reward.options.mine.class names Silent, which has neither")


# -- Devices


def test_every_reward_has_a_device(monkeypatch):
    reward = reward_config(
        fn={"a": 1.0, "b": 1.0},
        held_out=("c", "d"),
        device="auto",
        devices={"b": "cuda:0"},
        options={"c": {"servers": ("http://x:1",)}},
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert reward_devices(reward) == {"a": "cuda:3", "b": "cuda:0", "c": "cpu", "d": "cuda:3"}
    assert reward_devices(reward, ["b", "e"]) == {"b": "cuda:0", "e": "cuda:3"}
    reward.devices.e = "cpu"
    problem = r"config\.reward\.devices has e, not among this run's rewards \(a, b, c, d\)"
    with pytest.raises(ValueError, match=problem):
        reward_devices(reward)


@pytest.mark.parametrize(
    ("device", "share", "told"),
    [
        ("cuda:3", False, False),
        ("cuda:1", False, True),
        ("cuda:1", True, False),
        ("cpu", False, False),
    ],
)
def test_text_encoders_stay_on_a_gpu_of_the_rewards(monkeypatch, device, share, told):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    reward = reward_config(device="auto", share_gpu=share)
    problems = encoder_problems(device, reward)
    assert [f"{device!r}, a GPU that trains; expected" in line for line in problems] == [
        True
    ] * told


def test_jax_is_kept_off_the_rewards_gpus_before_they_are_loaded(monkeypatch):
    """On four GPUs, which stand on the CPU here: the rewards are not loaded."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    hidden = []
    reward = reward_config(device="auto")
    rewards = opened(reward, hide_from_jax=hidden.append, jax_platforms=None, load=False)
    assert hidden == ["0,1,2"]
    assert rewards.bridge.rewards == {}
    rewards.bridge.close()


def test_shared_gpus_are_checked_for_room(monkeypatch):
    checked = []
    allotment = Allotment(frozenset({"cuda:1", "cuda:0"}), None)
    monkeypatch.setattr("reward_bridge.setup.reserve", lambda *_: allotment)
    monkeypatch.setattr("reward_bridge.setup.check_room", checked.append)
    opened(reward_config(), load=False).bridge.close()
    assert checked == ["cuda:0", "cuda:1"]


# -- Loading


def test_the_rewards_of_a_training_run(tmp_path):
    write_references(tmp_path)
    reward = reward_config(
        metrics=("embedded_sharpness",),
        options={"jpeg_compressibility": {"quality": 50}},
        adversarial={"embedded_detector": {**SETTINGS, "options": {"shift": 0}}},
        references={"path": str(tmp_path), "root": ""},
    )
    rewards = opened(reward, prompts=PROMPTS)
    assert list(rewards.bridge.rewards) == ["embedded_detector", "jpeg_compressibility"]
    assert list(rewards.learning) == ["embedded_detector"]
    adversary = rewards.learning["embedded_detector"]
    assert isinstance(adversary, Adversary)
    assert rewards.bridge.rewards["embedded_detector"] is adversary
    assert adversary.learner.shift == 0
    assert rewards.bridge.rewards["jpeg_compressibility"].quality == 50
    assert rewards.metrics["embedded_sharpness"](pictures(2, 64, 64).numpy()) > 0
    rewards.bridge.close()


def test_the_frozen_copy_of_a_reward_that_learns(tmp_path):
    """It scores as the reward does at the start, and stays so; trained weights are its own."""
    write_references(tmp_path)
    reward = reward_config(
        held_out=("embedded_detector_at_start",),
        adversarial={"embedded_detector": {**SETTINGS, "codec": "jpeg", "max_passes": 1}},
        references={"path": str(tmp_path), "root": ""},
    )
    assert reward_problems(reward) == []
    rewards = opened(reward, prompts=PROMPTS)
    images = pictures(2, 64, 64)
    names = ["embedded_detector", "embedded_detector_at_start"]
    before = rewards.bridge.submit(images, PROMPTS, observe=0).result()
    assert list(before.rewards) == names
    assert list(before.references) == names[:1]
    assert before.rewards[names[1]].tolist() == before.rewards[names[0]].tolist()

    rewards.bridge.learn({"embedded_detector": 0}, {"embedded_detector": 60.0}).result()
    after = rewards.bridge.submit(images, PROMPTS).result()
    assert after.rewards[names[1]].tolist() == before.rewards[names[1]].tolist()
    assert after.rewards[names[0]].tolist() != before.rewards[names[0]].tolist()
    rewards.bridge.close()


def test_the_frozen_copy_runs_beside_its_original():
    reward = reward_config(
        held_out=("embedded_detector_at_start",),
        adversarial={"embedded_detector": SETTINGS},
        device="cuda:0",
        devices={"embedded_detector": "cpu"},
    )
    assert set(reward_devices(reward).values()) == {"cpu"}


def test_named_rewards_are_frozen_and_come_alone():
    reward = reward_config(
        metrics=("embedded_sharpness",), adversarial={"embedded_detector": SETTINGS}
    )
    rewards = opened(reward, ["embedded_detector"])
    assert list(rewards.bridge.rewards) == ["embedded_detector"]
    assert rewards.learning == {}
    assert rewards.metrics == {}
    rewards.bridge.close()


def test_classes_of_the_users_own_score_and_learn(own_module, tmp_path):
    (tmp_path / "pictures").mkdir()
    write_references(tmp_path / "pictures")
    learning = {**SETTINGS, "options": {"class": "own_setup:Learning"}}
    reward = reward_config(
        fn={"mine": 1.0, "bright": 1.0},
        held_out=(),
        options={
            "mine": {"class": "own_setup:Frozen", "scale": 2.0},
            "bright": {"class": "own_setup:Frozen", "scale": 3.0},
        },
        adversarial={"bright": learning},
        references={"path": str(tmp_path / "pictures"), "root": ""},
    )
    assert reward_problems(reward) == []
    rewards = opened(reward, prompts=PROMPTS)
    images = pictures(2, 8, 8)
    scores = rewards.bridge.submit(images, PROMPTS, observe=0).result()
    assert scores.rewards["mine"].tolist() == (2 * images.float().mean((1, 2, 3))).tolist()
    assert list(scores.references) == ["bright"]
    rewards.bridge.close()


def test_several_processes_meet_for_the_rewards_that_learn(tmp_path):
    write_references(tmp_path)
    met = []

    def meet(names):
        met.append(names)
        return dict.fromkeys(names, "a group")

    reward = reward_config(
        adversarial={"embedded_detector": SETTINGS}, references={"path": str(tmp_path), "root": ""}
    )
    rewards = opened(reward, prompts=PROMPTS, meet=meet)
    assert met == [["embedded_detector"]]
    assert rewards.learning["embedded_detector"].group == "a group"
    rewards.bridge.close()
    opened(reward_config(), meet=meet).bridge.close()  # nothing learns
    assert len(met) == 1
