"""Rewards that learn: schedules, history, exact resume, replicas, references, and the codec that both sides pass."""

import json
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.helpers.goldens import ROOT

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from reward_bridge.adversary import SCHEDULES, Adversary, History, Settings  # noqa: E402
from reward_bridge.bridge import RewardBridge, RewardError, TrainableReward  # noqa: E402
from reward_bridge.learners import make_learner  # noqa: E402
from reward_bridge.references import References, load, recode  # noqa: E402

SETTINGS = {
    "options": {},
    "schedule": "threshold", "threshold": 0.6, "margin": 0.1, "learn_epochs": 2, "cycle": 3, "patience": 2,
    "min_rise": 0.1, "always_first": True, "skip_generator": False, "optimizer": "adamw", "learning_rate": 0.01,
    "betas": (0.9, 0.999), "weight_decay": 0.01, "batch_size": 4, "history_batch_size": 3, "history_size": 6,
    "max_passes": 3, "target_accuracy": 1.1, "ema_decay": 0.9, "codec": "none", "quality": 90, "deadline": 60.0,
}  # fmt: skip


class Brightness:
    """Logistic regression on a picture's mean colour, with dropout; and a frozen scale."""

    def __init__(self):
        self.model = nn.Sequential(
            nn.Linear(3, 8), nn.Dropout(0.2), nn.Linear(8, 1), nn.Linear(1, 1)
        )
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / 2)
        self.model[3].requires_grad_(False)
        self.model.eval()

    def prepare(self, images):
        return images

    def score(self, model, images, prompts):
        return model(images.float().mean((2, 3)) / 255).squeeze(1).sigmoid()

    def loss(self, model, real, generated, prompts):
        logits = model(torch.cat([real, generated]).float().mean((2, 3)) / 255).squeeze(1)
        target = (torch.arange(len(logits)) < len(real)).float()
        accuracy = ((logits > 0) == (target > 0)).float().mean()
        return nn.functional.binary_cross_entropy_with_logits(logits, target), {
            "accuracy": accuracy
        }


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(random.integers(128, 256, (8, 8, 3), np.uint8)).save(tmp_path / f"{i}.png")
    return tmp_path


def adversary(folder, **changes):
    settings = Settings.read("bright", {**SETTINGS, **changes})
    return Adversary("bright", Brightness(), settings, References(str(folder), "", []), "cpu", None)


def generated(seed, n=8):
    return torch.randint(
        0, 160, (n, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def epoch(one, seed, n=8):
    """What a run does with it in one epoch."""
    prompts, images = [f"p{i}" for i in range(n)], generated(seed, n)
    one.observe(one.draw(prompts, seed, 8, 8), images, prompts)
    return one.update(seed)


def test_it_learns_and_its_average_gives_the_reward(folder):
    one = adversary(folder, max_passes=20, ema_decay=0.5)
    before = one(generated(9), [""] * 8)
    frozen = one.average[3].weight
    assert frozen is one.learner.model[3].weight  # not a second copy
    for seed in range(5):
        found = epoch(one, seed)
    assert found["accuracy"] > 0.9
    assert found["steps"] == 5 * 20 * 2
    assert found["history"] == 6
    assert (one(generated(9), [""] * 8) < before - 0.1).all()
    assert not torch.equal(one.average[0].weight, one.learner.model[0].weight)
    assert not one.average.training
    assert not one.learner.model.training


def test_average_of_the_first_steps_by_hand(folder):
    one = adversary(folder, max_passes=1, batch_size=0, ema_decay=0.99)
    w0 = one.learner.model[0].weight.detach().clone()
    epoch(one, 0)
    w1 = one.learner.model[0].weight.detach().clone()
    torch.testing.assert_close(one.average[0].weight, 0.1 * w0 + 0.9 * w1)  # (1 + 0) / (10 + 0)
    a1 = one.average[0].weight.clone()
    epoch(one, 1)
    torch.testing.assert_close(
        one.average[0].weight, 2 / 11 * a1 + 9 / 11 * one.learner.model[0].weight
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
        match=r"'bright' learnt other weights than this config's, such as 3\.(bias|weight)",
    ):
        wrong.restore(state)


def test_a_checkpoint_without_what_was_learnt_is_an_error(folder):
    from realgen_jax.checkpoint import RestoreError
    from realgen_jax.training.learning import restore

    one, said = adversary(folder), []
    saved = {}
    checkpoints = SimpleNamespace(read=lambda epoch, name: saved.get(name))
    run = SimpleNamespace(adversaries={"bright": one}, checkpoints=checkpoints)
    with pytest.raises(RestoreError, match="checkpoint 4 holds no state of the reward 'bright'"):
        restore(run, 4, SimpleNamespace(say=said.append))
    other = adversary(folder)
    other.learner.model[3].requires_grad_(True)
    wider = Adversary("bright", other.learner, other.settings, other.references, "cpu", None)
    saved["rewards/bright-0.safetensors"] = wider.state()
    with pytest.raises(
        RestoreError, match="checkpoint 4: the checkpoint's 'bright' learnt other weights"
    ):
        restore(run, 4, SimpleNamespace(say=said.append))
    epoch(one, 0)
    saved["rewards/bright-0.safetensors"] = state = one.state()
    epoch(one, 1)
    restore(run, 4, SimpleNamespace(say=said.append))
    assert one.state() == state
    assert not said


def test_history_is_bounded_and_replaces_at_random():
    torch.manual_seed(0)
    history = History(4)
    assert history.draw(3) == ([], [], [])
    history.add(np.arange(3), np.arange(3), "abc")
    assert [pair[2] for pair in history.pairs] == ["a", "b", "c"]
    history.add(np.arange(3, 30), np.arange(3, 30), "x" * 27)
    assert len(history.pairs) == 4
    real, fake, prompts = history.draw(50)
    assert real == fake
    assert len(prompts) == 50
    assert {*real} == {pair[0] for pair in history.pairs}
    empty = History(0)
    empty.add(np.arange(3), np.arange(3), "abc")
    assert not empty.pairs


@pytest.mark.parametrize(
    ("schedule", "epochs", "wanted"),
    [
        ("threshold", [(0.5, 0.9), (0.61, 0.9), (0.6, 0.9)], [True, True, False]),  # the first in any case
        ("margin", [(0.5, 0.9), (0.5, 0.61), (0.5, 0.55), (0.5, 0.4)], [True, False, True, True]),  # below 0.1
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


def test_through_the_bridge(folder):
    one = adversary(folder)
    assert isinstance(one, TrainableReward)
    flat = lambda images, prompts: torch.zeros(len(prompts))  # noqa: E731
    assert not isinstance(flat, TrainableReward)
    bridge = RewardBridge(
        {"bright": one, "flat": flat},
        dict.fromkeys(("bright", "flat"), "cpu"),
        deadline=20,
        retries=0,
    )
    images, prompts = generated(0), [f"p{i}" for i in range(8)]
    assert set(bridge.submit(images, prompts).result()) == {
        "bright",
        "flat",
    }  # an evaluation: nothing is observed
    scores = bridge.submit(images, prompts, observe=3).result()
    assert set(scores) == {"bright", "flat", "bright/references"}
    real = one.draw(prompts, 3, 8, 8)
    np.testing.assert_array_equal(scores["bright/references"], one(real, prompts).detach())
    found = bridge.learn({"bright": 5}, {"bright": 60.0}).result()
    alone = adversary(folder)
    alone.observe(real, images, prompts)
    assert found == {"bright": alone.update(5)}
    assert alone.state() == one.state()
    assert bridge.learn({}, {}).result() == {}
    with pytest.raises(RewardError, match="'bright' failed to learn"):  # nothing was observed since
        bridge.learn({"bright": 5}, {"bright": 60.0}).result()


def test_a_loss_that_is_not_finite_ends_it(folder):
    one = adversary(folder)
    one.learner.loss = lambda model, real, generated, prompts: (torch.tensor(float("nan")), {})
    with pytest.raises(FloatingPointError, match="the loss of 'bright' is nan after 0 steps"):
        epoch(one, 0)


def test_settings_say_what_is_wrong():
    with pytest.raises(
        ValueError, match=r"adversarial\.x lacks quality, has kwality, which there is not"
    ):
        Settings.read("x", {**{k: v for k, v in SETTINGS.items() if k != "quality"}, "kwality": 1})
    with pytest.raises(
        ValueError, match=r"x\.schedule is 'never'; choose from threshold, margin, every, plateau"
    ):
        Settings.read("x", {**SETTINGS, "schedule": "never"})
    with pytest.raises(ValueError, match=r"x\.ema_decay is 1\.0"):
        Settings.read("x", {**SETTINGS, "ema_decay": 1.0})


REPLICA = """
    import sys, torch
    from torch import distributed
    from tests.reward_bridge.test_adversary import SETTINGS, Adversary, Brightness, References, Settings, generated
    from reward_bridge.adversary import join
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
    settings = Settings.read("bright", {{**SETTINGS, "batch_size": 0, "history_size": 0, "max_passes": 2}})
    one = Adversary("bright", learner, settings, References(folder + "/pictures", "", []), "cpu", groups["bright"])
    prompts = [f"p{{i}}" for i in range(8)]
    real, fake, mine = one.draw(prompts, 0, 8, 8), generated(0), slice(4 * rank, 4 * rank + 4)
    one.observe(real[mine], fake[mine], prompts[mine])
    found = one.update(rank)
    torch.save((found, dict(one.average.state_dict())), folder + f"/{{rank}}.pt")
    with torch.no_grad():
        one.average[0].weight += rank  # somebody spoils one of them
    one.observe(real[mine], fake[mine], prompts[mine])
    try:
        one.update(rank)
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
    begin = lambda rank: subprocess.Popen(  # noqa: E731
        [sys.executable, "-c", program, str(rank), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    outputs = [process.communicate(timeout=90)[0] for process in [begin(rank) for rank in range(2)]]
    (first, weights), (second, others) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    one = adversary(tmp_path / "pictures", batch_size=0, history_size=0, max_passes=2)
    one.learner.model[1].p = 0.0
    whole = epoch(one, 0)
    assert first["loss"] == pytest.approx(whole["loss"], abs=1e-6)
    for name, value in one.average.state_dict().items():
        torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=0)
    assert "the replicas of 'bright' differ: processes [1] from this one" in outputs[0]
    assert "processes [0]" in outputs[1]


def test_references_by_prompt_and_by_folder(folder):
    (folder / "pairs.jsonl").write_text(
        '{"prompt": "a", "image": "0.png"}\n{"prompt": "b", "images": ["1.png", "2.png"]}\n'
    )
    (folder / "lists.json").write_text(json.dumps({"a": ["3.png"], "b": ["4.png", "5.png"]}))
    pairs = References(str(folder / "pairs.jsonl"), "", ["a", "b"])
    drawn = pairs.draw(["b", "a", "b", "b"], seed=1)
    assert drawn[1].name == "0.png"
    assert {drawn[0].name, drawn[2].name} == {"1.png", "2.png"}  # each once before any comes again
    assert drawn == pairs.draw(["b", "a", "b", "b"], seed=1)
    lists = References(str(folder / "lists.json"), str(folder), ["a"])
    assert lists.draw(["a"], 0) == [folder / "3.png"]
    unpaired = References(str(folder), "", ["anything"])
    assert len({*unpaired.draw(["x"] * 6, 0)}) == 6
    assert unpaired.draw(["x"] * 6, 0) != unpaired.draw(["x"] * 6, 1)


def test_references_that_cannot_be_used_are_named(folder):
    (folder / "pairs.jsonl").write_text(
        '{"prompt": "a", "image": "0.png"}\n{"prompt": "b", "image": "none.png"}\n'
    )
    with pytest.raises(
        ValueError, match=r"1 of 2 reference pictures cannot be used:\s+\S*none\.png does not exist"
    ):
        References(str(folder / "pairs.jsonl"), "", ["a"])
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:-60])
    with pytest.raises(ValueError, match=r"1 of 6 .*\s+\S*3\.png is no whole picture"):
        References(str(folder), "", [])
    (folder / "3.png").unlink()
    (folder / "pairs.jsonl").write_text('{"prompt": "a", "image": "0.png"}\n')
    with pytest.raises(ValueError, match="no picture for 2 prompts of this run, such as 'c'"):
        References(str(folder / "pairs.jsonl"), "", ["a", "c", "c", "d"])
    (folder / "pairs.jsonl").write_text('{"prompt": "a", "image": 3}\n')
    with pytest.raises(ValueError, match=r"line 1: got images 3; expected a file"):
        References(str(folder / "pairs.jsonl"), "", [])
    with pytest.raises(FileNotFoundError, match=r"references\.path is '/nowhere'"):
        References("/nowhere", "", [])
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no pictures"):
        References(str(folder / "empty"), "", [])


def test_a_reference_is_cropped_to_the_aspect(tmp_path):
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert load(tmp_path / "wide.png", 64, 64).shape == (3, 10, 10)
    assert (load(tmp_path / "wide.png", 64, 64) == 255).all()
    assert load(tmp_path / "wide.png", 64, 128).shape == (3, 10, 20)


def test_the_codec_is_jpeg():
    images = generated(0)
    assert recode(images, "none", 90) is images
    once = recode(images, "jpeg", 90)
    assert once.shape == images.shape
    assert once.dtype == torch.uint8
    assert not torch.equal(once, images)
    assert torch.equal(once[2:3], recode(images[2:3], "jpeg", 90))  # each by itself


QUALITY = 12  # of JPEG


def accuracy_of_real_against_real(folder, side, codec):
    """Of a detector that is shown the same photographs from lossless files and from poor JPEGs, as a run would
    show real and generated ones; `side`: of the files.
    """
    for name in ("lossless", "jpeg"):
        (folder / name).mkdir(parents=True)
    for file in sorted(
        (ROOT / "reward_bridge" / "embedded" / "references" / "photographs").glob("*.webp")
    )[::2]:
        image = Image.open(file).resize((side, side), Image.Resampling.BICUBIC)
        image.save(folder / "lossless" / f"{file.stem}.png")
        image.save(folder / "jpeg" / f"{file.stem}.jpg", quality=QUALITY)
    changes = {
        "codec": codec,
        "quality": QUALITY,
        "batch_size": 16,
        "learning_rate": 1e-3,
        "history_size": 256,
    }
    settings = Settings.read("d", {**SETTINGS, **changes})
    learner = make_learner("embedded_detector", "cpu", {})
    one = Adversary("d", learner, settings, References(str(folder / "jpeg"), "", []), "cpu", None)
    other, found = References(str(folder / "lossless"), "", []), []
    for seed in range(15):
        prompts = ["x"] * 64
        generated = torch.stack([load(file, 64, 64) for file in other.draw(prompts, 100 + seed)])
        one.observe(one.draw(prompts, seed, 64, 64), generated, prompts)
        found.append(one.update(seed)["accuracy"])
    return float(np.mean(found[-4:]))


@pytest.mark.slow
def test_real_against_real_stays_at_chance(tmp_path):
    """What the files are must not show: not their compression, which the codec covers, nor that of larger files, which
    is gone once they are small. Without the codec it does show.
    """
    assert accuracy_of_real_against_real(tmp_path / "bare", 64, "none") > 0.65
    assert abs(accuracy_of_real_against_real(tmp_path / "coded", 64, "jpeg") - 0.5) < 0.05
    assert abs(accuracy_of_real_against_real(tmp_path / "large", 256, "jpeg") - 0.5) < 0.05
