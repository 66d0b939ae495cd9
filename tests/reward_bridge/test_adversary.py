"""Rewards that learn: the moving average, exact resume, replicas, the way through the bridge."""

import os
import shutil
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from realgen_jax.checkpoint import RestoreError
from realgen_jax.training.learning import restore
from reward_bridge.adversary import Adversary
from reward_bridge.bridge import RewardBridge
from reward_bridge.reward import RewardError, TrainableReward
from tests.helpers.adversaries import adversary, epoch, generated, write_references
from tests.helpers.goldens import ROOT


@pytest.fixture
def folder(tmp_path):
    return write_references(tmp_path)


def test_it_learns_and_its_average_gives_the_reward(folder):
    reward = adversary(folder, max_passes=20, ema_decay=0.5)
    before = reward(generated(9), [""] * 8)
    frozen = reward.average[3].weight
    assert frozen is reward.learner.model[3].weight  # not a second copy
    for seed in range(5):
        found = epoch(reward, seed)
    assert found["accuracy"] > 0.9
    assert found["steps"] == 5 * 20 * 2
    assert found["history"] == 6
    assert (reward(generated(9), [""] * 8) < before - 0.1).all()
    assert not torch.equal(reward.average[0].weight, reward.learner.model[0].weight)
    assert not reward.average.training
    assert not reward.learner.model.training


def test_average_of_the_first_steps_by_hand(folder):
    reward = adversary(folder, max_passes=1, batch_size=0, ema_decay=0.99)
    w0 = reward.learner.model[0].weight.detach().clone()
    epoch(reward, 0)
    w1 = reward.learner.model[0].weight.detach().clone()
    torch.testing.assert_close(reward.average[0].weight, 0.1 * w0 + 0.9 * w1)  # (1 + 0) / (10 + 0)
    a1 = reward.average[0].weight.clone()
    epoch(reward, 1)
    torch.testing.assert_close(
        reward.average[0].weight, 2 / 11 * a1 + 9 / 11 * reward.learner.model[0].weight
    )
    plain = adversary(folder, max_passes=1, ema_decay=0.0)
    epoch(plain, 0)
    assert torch.equal(plain.average[0].weight, plain.learner.model[0].weight)


def test_passes_end_at_the_target(folder):
    assert epoch(adversary(folder, target_accuracy=0.0), 0)["passes"] == 1
    assert epoch(adversary(folder, target_accuracy=1.1), 0)["passes"] == 3


def test_restored_it_goes_on_to_the_last_bit(folder):
    whole = adversary(folder, schedule="plateau")
    for seed in range(4):
        whole.due(seed, 0.5, 0.6)
        epoch(whole, seed)
    first = adversary(folder, schedule="plateau")
    for seed in range(2):
        first.due(seed, 0.5, 0.6)
        epoch(first, seed)
    state = first.state()
    epoch(first, 7)  # what happens afterwards does not reach what was kept
    second = adversary(folder, schedule="plateau")
    second.restore(state)
    assert second.state() == state
    for seed in range(2, 4):
        second.due(seed, 0.5, 0.6)
        epoch(second, seed)
    assert second.state() == whole.state()
    other = adversary(folder)
    other.restore(state, with_history=False)
    assert not other.history.pairs
    other.learner.model[3].requires_grad_(True)
    wrong = Adversary("bright", other.learner, other.settings, other.references, "cpu", None)
    with pytest.raises(
        ValueError,
        match=r"in the checkpoint, 'bright' has trained other weights than this config trains, "
        r"such as 3\.(bias|weight)",
    ):
        wrong.restore(state)


def test_a_checkpoint_without_what_was_learnt_is_an_error(folder):
    reward, said = adversary(folder), []
    saved = {}
    checkpoints = SimpleNamespace(read=lambda epoch, name: saved.get(name))
    with pytest.raises(RestoreError, match="checkpoint 4 holds no state of the reward 'bright'"):
        restore({"bright": reward}, checkpoints, 4, said.append)
    other = adversary(folder)
    other.learner.model[3].requires_grad_(True)
    wider = Adversary("bright", other.learner, other.settings, other.references, "cpu", None)
    saved["rewards/bright-0.safetensors"] = wider.state()
    with pytest.raises(
        RestoreError, match="checkpoint 4: in the checkpoint, 'bright' has trained other weights"
    ):
        restore({"bright": reward}, checkpoints, 4, said.append)
    epoch(reward, 0)
    saved["rewards/bright-0.safetensors"] = state = reward.state()
    epoch(reward, 1)
    restore({"bright": reward}, checkpoints, 4, said.append)
    assert reward.state() == state
    assert not said


def test_through_the_bridge(folder):
    reward = adversary(folder)
    assert isinstance(reward, TrainableReward)

    def flat(images, prompts):
        return torch.zeros(len(prompts))

    assert not isinstance(flat, TrainableReward)
    bridge = RewardBridge(
        {"bright": reward, "flat": flat},
        dict.fromkeys(("bright", "flat"), "cpu"),
        deadline=20,
        retries=0,
    )
    images, prompts = generated(0), [f"p{i}" for i in range(8)]
    evaluation = bridge.submit(images, prompts).result()  # nothing is observed
    assert set(evaluation.rewards) == {"bright", "flat"}
    assert evaluation.references == {}
    scores = bridge.submit(images, prompts, observe=3).result()
    assert list(scores.rewards) == ["bright", "flat"]
    assert list(scores.references) == ["bright"]
    assert scores.references["bright"].dtype == np.float32
    real = reward.draw(prompts, 3, 8, 8)
    np.testing.assert_array_equal(scores.references["bright"], reward(real, prompts).detach())
    found = bridge.learn({"bright": 5}, {"bright": 60.0}).result()
    alone = adversary(folder)
    alone.observe(real, images, prompts)
    assert found == {"bright": alone.update(5)}
    assert alone.state() == reward.state()
    assert bridge.learn({}, {}).result() == {}
    with pytest.raises(RewardError, match="'bright' failed to learn"):  # nothing was observed since
        bridge.learn({"bright": 5}, {"bright": 60.0}).result()


@pytest.mark.parametrize("content", [None, b"no picture", "another picture"])
def test_a_reference_that_changes_in_the_middle_is_named(folder, content):
    reward = adversary(folder)
    (folder / "3.png").unlink()
    if content == "another picture":
        shutil.copy(folder / "0.png", folder / "3.png")
    elif content is not None:
        (folder / "3.png").write_bytes(content)
    with pytest.raises(RewardError, match=r"a reference has changed since the start: .*3\.png"):
        reward.draw(["x"] * 6, 0, 8, 8)


def test_a_loss_that_is_not_finite_ends_it(folder):
    reward = adversary(folder)
    reward.learner.loss = lambda model, real, generated, prompts: (torch.tensor(float("nan")), {})
    with pytest.raises(FloatingPointError, match="the loss of 'bright' is nan after 0 steps"):
        epoch(reward, 0)


REPLICA = """
    import sys, torch
    from torch import distributed
    from tests.helpers.adversaries import SETTINGS, Brightness, generated
    from reward_bridge.adversary import Adversary, join
    from reward_bridge.adversary_settings import Settings
    from reward_bridge.references import References
    rank, folder = int(sys.argv[1]), sys.argv[2]
    def tell(key, text):
        import pathlib, time
        file = pathlib.Path(folder) / "port.txt"
        if text is not None:
            file.with_suffix(".part").write_text(text); file.with_suffix(".part").rename(file)
        while not file.exists():
            time.sleep(0.01)
        return file.read_text()
    groups = join(tell, "127.0.0.1", rank, 2, ["bright", "other"])
    learner = Brightness()
    learner.model[1].p = 0.0
    changes = {{"batch_size": 0, "history_size": 0, "max_passes": 2}}
    settings = Settings.read("bright", {{**SETTINGS, **changes}})
    references = References(folder + "/pictures", "", [])
    reward = Adversary("bright", learner, settings, references, "cpu", groups["bright"])
    prompts = [f"p{{i}}" for i in range(8)]
    real, fake, mine = reward.draw(prompts, 0, 8, 8), generated(0), slice(4 * rank, 4 * rank + 4)
    reward.observe(real[mine], fake[mine], prompts[mine])
    found = reward.update(rank)
    torch.save((found, dict(reward.average.state_dict())), folder + f"/{{rank}}.pt")
    with torch.no_grad():
        reward.average[0].weight += rank  # somebody spoils one of them
    reward.observe(real[mine], fake[mine], prompts[mine])
    try:
        reward.update(rank)
    except RuntimeError as error:
        print(error)
    distributed.barrier()
"""


def test_two_replicas_learn_as_one_does(folder, tmp_path):
    (tmp_path / "pictures").mkdir()
    for file in folder.glob("*.png"):
        file.rename(tmp_path / "pictures" / file.name)
    program = textwrap.dedent(REPLICA.format())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    processes = []
    for rank in range(2):
        command = [sys.executable, "-c", program, str(rank), str(tmp_path)]
        processes.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        )
    outputs = [process.communicate(timeout=90)[0] for process in processes]
    (first, weights), (second, others) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    reward = adversary(tmp_path / "pictures", batch_size=0, history_size=0, max_passes=2)
    reward.learner.model[1].p = 0.0
    whole = epoch(reward, 0)
    assert first["loss"] == pytest.approx(whole["loss"], abs=1e-6)
    for name, value in reward.average.state_dict().items():
        torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=0)
    assert (
        "the replicas of 'bright' differ: those of processes [1] have other weights" in outputs[0]
    )
    assert "processes [0]" in outputs[1]
