"""scripts/diagnose.py on a recorded healthy run, on that run made ill in one way at a time, and on real ill runs."""

import copy
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from realgen_jax.diagnosis import diagnose
from realgen_jax.diagnosis.finding import FINE, NOTE, PROBLEM
from realgen_jax.diagnosis.metrics import Metrics
from tests.helpers.goldens import ROOT

HEALTHY = json.loads(
    (ROOT / "tests" / "data" / "healthy_run.json").read_text()
)  # 12 epochs of the embedded model
NAMES = [
    "zero-spread groups", "one reward drowning the others", "reward noise", "ratio deviation", "clip range",
    "vanishing gradient", "learning rate", "KL penalty", "gradient norm", "clip fraction", "sides of clipping",
    "held-out checks", "correlation", "diversity",
]  # fmt: skip


def write(folder, run):
    (folder / "config.json").write_text(json.dumps(run["config"]))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in run["rows"]))
    return folder


def of(run, kind):
    return [row for row in run["rows"] if row["kind"] == kind]


def put(run, kind="train", **values):
    """Set figures in every row of a kind; "__" stands for "/", and a list gives the first and the last row's value."""
    rows = of(run, kind)
    for key, value in values.items():
        for row, one in zip(rows, np.linspace(*np.broadcast_to(value, 2), len(rows)), strict=True):
            row[key.replace("__", "/")] = float(one)


def option(run, path, value):
    *parents, last = path.split(".")
    at = run["config"]
    for parent in parents:
        at = at[parent]
    at[last] = value


def stuck(run):
    """The reward keeps its noise and loses its rise."""
    for kind in ("train", "eval"):
        rows = of(run, kind)
        epochs = np.array([row["epoch"] for row in rows], float)
        for key in ("reward", "embedded_detector", "reward/embedded_detector"):
            if key in rows[0]:
                values = np.array([row[key] for row in rows])
                slope, _ = np.polyfit(epochs, values, 1)
                for row, epoch in zip(rows, epochs, strict=True):
                    row[key] -= slope * epoch


def zero_spread(run, share):
    put(run, zero_spread=share)


def weight(run, value):
    option(run, "reward.fn.embedded_detector", value)


def faint(run, std):
    put(run, reward_std__clip_score=std)


def solved(run, share):
    put(run, zero_spread__clip_score=share)


def noise(run, value):
    put(run, "eval", noise__embedded_detector=value)


def ratio(run, value):
    put(run, first_ratio_deviation=value)


def narrow(run, value):
    stuck(run)
    option(run, "train.clip_range", value)


def steps(run, relative):
    """Every step changes the weights by this much of their norm."""
    stuck(run)
    for row in of(run, "train"):
        row["update_norm"] = relative * row["param_norm"]


def beta(run, value):
    stuck(run)
    option(run, "train.beta", value)


def vanishing(run, norm):
    """Below Adam's epsilon, 1e-8, a step is lr g / eps."""
    stuck(run)
    for row in of(run, "train"):
        row["grad_norm"] = norm
        row["update_norm"] = min(row["update_norm"], 1e-3 * norm / 1e-8)


def gradient(run, norm):
    stuck(run)
    put(run, grad_norm=norm)


def clipped(run, share, ranges=40):
    """Two steps an epoch, so the second one's share is twice the mean."""
    stuck(run)
    deviation = ranges * run["config"]["train"]["clip_range"]
    put(
        run,
        clipfrac=share / 2,
        clipfrac_gt_one=share / 4,
        clipfrac_lt_one=share / 4,
        ratio_deviation=deviation,
    )


def clipped_nearby(run, share):
    clipped(run, share, ranges=10)


def one_sided(run, above):
    put(run, clipfrac_gt_one=above, clipfrac_lt_one=0.04, clipfrac=above + 0.04)


def held_out(run, last):
    put(run, "eval", embedded_held_out=[0.316, last])


def frechet(run, last):
    put(run, "eval", embedded_frechet=[0.07, last])


def correlation(run, last):
    put(run, "eval", correlation__embedded_held_out=[0.57, last])


def alike(run, last):
    stuck(run)
    put(run, "eval", prompt_std=[0.05, last * 0.05])


def falling(run, slope):
    stuck(run)
    for row in run["rows"]:
        row["reward"] += slope * row["epoch"]


# how, an ill value, a sound one next to it, what is found, its severity, words of the answer
ILLS = [
    (zero_spread, 0.6, 0.19, "zero-spread groups", PROBLEM, "--config.sample.num_image_per_prompt=32"),
    (zero_spread, 0.3, 0.19, "zero-spread groups", NOTE, "In 30% of the groups"),
    (weight, 500.0, 4.0, "one reward drowning the others", PROBLEM, "the weights that do this"),
    (weight, 10.0, 4.0, "one reward drowning the others", NOTE, "--config.reward.fn.clip_score=10"),
    (faint, 1e-7, 1e-3, "one reward drowning the others", PROBLEM, "vanishes beside the 0.0001"),
    (solved, 1.0, 0.1, "one reward drowning the others", PROBLEM, "none at all in 100% of the groups"),
    (noise, 0.12, 0.03, "reward noise", PROBLEM, "--config.reward.fn.embedded_detector=0.25"),
    (noise, 0.075, 0.03, "reward noise", NOTE, "different scores"),
    (ratio, 2e-4, 9e-5, "ratio deviation", PROBLEM, "--config.train.recompute_old=True"),
    (narrow, 1e-6, 3e-5, "clip range", PROBLEM, "8 float32 steps wide"),
    (steps, 1e-7, 0.005, "learning rate", PROBLEM, "hardly move"),
    (steps, 0.3, 0.05, "learning rate", PROBLEM, "--config.train.learning_rate=2e-05, or lower"),
    (beta, 3.0, 0.1, "KL penalty", PROBLEM, "--config.train.beta=0 shows"),
    (vanishing, 1e-6, 5e-5, "vanishing gradient", PROBLEM, "next to no gradient"),
    (gradient, 50.0, 0.9, "gradient norm", PROBLEM, "--config.train.max_grad_norm=1e+02"),
    (gradient, 5.0, 0.9, "gradient norm", NOTE, "Every step is clipped"),
    (clipped, 0.98, 0.8, "clip fraction", PROBLEM, "--config.train.clip_range=0.01"),
    (clipped_nearby, 0.98, 0.8, "clip fraction", NOTE, "up to 10 ranges far"),
    (one_sided, 0.3, 0.1, "sides of clipping", NOTE, "Clipping acts above 1 almost alone"),
    (held_out, 0.25, 0.3, "held-out checks", PROBLEM, "The reward rises meanwhile"),
    (frechet, 0.1, 0.08, "held-out checks", PROBLEM, "--config.train.beta=0.1"),
    (correlation, 0.05, 0.2, "correlation", NOTE, "other pictures"),
    (alike, 0.1, 0.5, "diversity", PROBLEM, "RUN/samples"),
    (falling, -0.01, 0.01, "no cause found", PROBLEM, "None of the checks says why"),
    (falling, 0.0, 0.01, "no cause found", NOTE, "could hide in the noise"),
]  # fmt: skip


def answer_of(folder, ill=None, value=None):
    run = copy.deepcopy(HEALTHY)
    if ill:
        ill(run, value)
    return diagnose.diagnose(write(folder, run))


def names(findings):
    return [finding.name for finding in findings]


def test_a_healthy_run_is_called_healthy(tmp_path, capsys, monkeypatch):
    answer = answer_of(tmp_path)
    assert answer.trend == "rises"
    assert names(answer.findings) == NAMES
    assert {finding.severity for finding in answer.findings} == {FINE}
    assert not answer.not_recorded
    monkeypatch.setattr(sys, "argv", ["diagnose.py", str(tmp_path)])
    assert diagnose.main() == 0
    shown = capsys.readouterr().out
    assert shown.startswith(
        "The reward rises. In training, epochs 1-12: +0.0059 an epoch (standard error"
    )
    assert "Healthy: nothing was found." in shown
    assert "ratio deviation: largest |ratio - 1| before any step 0 (<= 1.0e-04)" in shown


def test_a_reward_that_learns_is_told(tmp_path):
    def learns(run, value):
        run["config"]["reward"]["adversarial"] = {"embedded_detector": {}}
        for row in of(run, "train")[::3]:  # epochs in which the generator rested
            row.pop("ratio_deviation"), row.pop("first_ratio_deviation")

    answer = answer_of(tmp_path, learns)
    assert (
        "embedded_detector learnt meanwhile, so that the level of this reward says little"
        in answer.verdict
    )
    assert "learnt meanwhile" not in answer_of(tmp_path).verdict
    assert names(answer.findings) == NAMES


@pytest.mark.parametrize(("ill", "value", "sound", "name", "severity", "words"), ILLS)
def test_an_ill_is_found_and_nothing_else(tmp_path, ill, value, sound, name, severity, words):
    answer = answer_of(tmp_path, ill, value)
    first = answer.findings[0]
    assert (first.name, first.severity) == (name, severity)
    assert words in f"{first.says} {first.remedy}"
    assert first.figures
    others = answer.of(PROBLEM) if severity == PROBLEM else answer.of(PROBLEM, NOTE)
    assert names(others) == [name]
    assert name not in names(answer_of(tmp_path, ill, sound).of(PROBLEM, NOTE))


def test_every_finding_has_a_test_and_every_remedy_names_real_keys(tmp_path):
    assert {name for *_, name, _, _ in ILLS} == {*NAMES, "no cause found"}
    from realgen_configs.flux_grpo import get_config

    config, seen = get_config("tiny").to_dict(), set()
    for ill, value, *_ in ILLS:
        for finding in answer_of(tmp_path, ill, value).of(PROBLEM, NOTE):
            seen |= {
                word
                for word in re.findall(r"--config\.([\w.]+)=", finding.remedy)
                if "NAME" not in word
            }
    assert len(seen) > 10
    for key in seen:
        at = config
        for part in key.split("."):
            assert part in at, key
            at = at[part]


def test_what_is_usual_in_a_run_that_rises_is_not_called_ill(tmp_path):
    """RealGen's clip range of 2e-6 clips nearly everything after an epoch's first step."""

    def realgen(run, _):
        option(run, "train.clip_range", 2e-6)
        option(run, "train.beta", 4e-4)
        put(run, clipfrac=0.48, clipfrac_gt_one=0.25, clipfrac_lt_one=0.23)

    def hardly_clipped(run, _):
        put(run, clipfrac=0.02, clipfrac_gt_one=0.02)

    for usual in (realgen, hardly_clipped):
        assert not answer_of(tmp_path, usual).of(PROBLEM, NOTE)


def test_a_run_at_its_start_is_told_to_wait(tmp_path):
    def young(run, _):
        steps(run, 5e-4)
        option(run, "num_epochs", 1000)

    answer = answer_of(tmp_path, young)
    assert names(answer.of(PROBLEM, NOTE)) == ["learning rate"]
    assert answer.findings[0].severity == NOTE
    assert "too early to tell" in answer.findings[0].says
    assert answer.findings[0].remedy == "Wait for epoch 50 or later."


def test_where_there_is_no_gradient_a_larger_learning_rate_is_not_proposed(tmp_path):
    def constant(run, _):
        stuck(run)
        put(
            run,
            zero_spread=1.0,
            zero_spread__clip_score=1.0,
            zero_spread__embedded_detector=1.0,
            reward_std=0.0,
        )
        put(
            run,
            reward_std__clip_score=0.0,
            reward_std__embedded_detector=0.0,
            grad_norm=0.0,
            update_norm=2e-6,
        )

    found = answer_of(tmp_path, constant).of(PROBLEM)
    assert names(found) == ["zero-spread groups", "vanishing gradient", "learning rate"]
    assert found[2].remedy == "Nothing here: there is no gradient to follow."


def test_checks_that_fall_with_the_reward_are_damage(tmp_path):
    def damage(run, _):
        falling(run, -0.01)
        held_out(run, 0.2)

    answer = answer_of(tmp_path, damage)
    assert answer.trend == "falls"
    assert names(answer.of(PROBLEM)) == ["held-out checks"]
    assert "training damages the pictures" in answer.findings[0].says


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("embedded_held_out", (0.32, 0.40, 0.42, 0.38, 0.35)),
        ("embedded_frechet", (0.07, 0.05, 0.04, 0.055, 0.065)),
    ],
)
def test_a_check_that_got_better_and_then_worse_has_got_worse(tmp_path, name, values):
    def hacked(run, _):
        for row, value in zip(of(run, "eval"), values, strict=True):
            row[name] = value

    answer = answer_of(tmp_path, hacked)
    assert names(answer.of(PROBLEM)) == ["held-out checks"]
    assert answer.findings[0].says.startswith(f"{name} got worse")


def test_an_old_run_says_once_what_it_did_not_record(tmp_path, capsys, monkeypatch):
    run = copy.deepcopy(HEALTHY)
    for row in run["rows"]:
        for key in [
            k
            for k in row
            if re.match(r"update_norm|steps|zero_spread$|noise/|std/|correlation/", k)
        ]:
            del row[key]
    monkeypatch.setattr(sys, "argv", ["diagnose.py", str(write(tmp_path, run))])
    assert diagnose.main() == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("not recorded") == 1
    assert "train steps (for clip_fraction)" in shown
    assert "train update_norm (for no_gradient, step_size)" in shown
    assert "held-out checks: embedded_held_out 0.35" in shown
    for last, status in (
        (0.30, 0),
        (0.29, 1),
    ):  # with no spread to compare to, a fall of 0.02 counts
        held_out(run, last)
        write(tmp_path, run)
        assert diagnose.main() == status


def test_json_says_the_same(tmp_path, capsys, monkeypatch):
    run = copy.deepcopy(HEALTHY)
    zero_spread(run, 0.6)
    monkeypatch.setattr(sys, "argv", ["diagnose.py", str(write(tmp_path, run)), "--json"])
    assert diagnose.main() == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["trend"], len(found["trends"]), len(found["findings"])) == (
        "rises",
        2,
        len(NAMES),
    )
    first = found["findings"][0]
    assert (first["name"], first["severity"]) == ("zero-spread groups", "problem")
    assert first["figures"] == [
        {"what": "groups without any spread", "value": 0.6, "healthy": "<= 0.2", "epochs": "9-12"}
    ]


def test_what_cannot_be_judged_is_told_in_one_line(tmp_path):
    def call(folder):
        command = [sys.executable, ROOT / "scripts" / "diagnose.py", folder]
        return subprocess.run(command, capture_output=True, text=True)

    cases = {"is no run folder: it has no config.json": tmp_path / "nowhere"}
    for name, change in {
        "holds 3 finished epochs; expected 4 or more": lambda run: run.update(rows=run["rows"][:5]),
        "has no key 'learning_rate' in config.json": lambda run: run["config"]["train"].pop(
            "learning_rate"
        ),
        "does not hold train reward": lambda run: [row.pop("reward") for row in of(run, "train")],
    }.items():
        run = copy.deepcopy(HEALTHY)
        change(run)
        cases[name] = tmp_path / str(len(cases))
        cases[name].mkdir()
        write(cases[name], run)
    for message, folder in cases.items():
        done = call(folder)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {folder}")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    write(tmp_path, HEALTHY)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "epo')
    assert not diagnose.diagnose(tmp_path).of(PROBLEM, NOTE)


def test_it_needs_neither_jax_nor_torch():
    code = "import sys, realgen_jax.diagnosis.diagnose; print(*{'jax', 'torch', 'ml_collections'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


def test_trends_are_those_of_the_textbook():
    from scipy import stats

    for free in (1, 2, 3, 4, 7, 30, 1000):
        rows = [{"kind": "train", "epoch": e, "reward": float(e % 2)} for e in range(free + 2)]
        trend = Metrics(rows).trend("reward", 1.0)
        assert trend.margin / trend.error == pytest.approx(stats.t.ppf(0.975, free), rel=1e-6)
    assert trend.margin / trend.error == pytest.approx(stats.norm.ppf(0.975), rel=0.005)
    epochs, values = np.arange(1, 21), np.random.default_rng(0).normal(size=20)
    rows = [
        {"kind": "train", "epoch": int(e), "reward": float(v)}
        for e, v in zip(epochs, values, strict=True)
    ]
    trend, line = Metrics(rows).trend("reward", 2.0), stats.linregress(epochs, values)
    assert trend.slope == pytest.approx(line.slope)
    assert trend.error == pytest.approx(line.stderr)
    assert trend.effect == pytest.approx(19 * line.slope / 2)
    assert trend.word == "flat"


# Real runs. The reward is the pictures' brightness, which the golden model (random weights) raises within eight epochs.
REWARD = """
import torch


class Brightness:
    def __init__(self, device, constant, noise, scale):
        self.constant, self.noise, self.scale = constant, noise, scale

    def __call__(self, images, prompts):
        x = images.float().mean((1, 2, 3)) / 255
        x = torch.full_like(x, 0.5) if self.constant else x
        return self.scale * (x + self.noise * torch.randn(len(x)))
"""
CONFIG = """
from tests.helpers import golden_config
from ml_collections import ConfigDict
from reward_bridge.rewards import REWARDS

for name in ("brightness", "darkness"):
    REWARDS[name] = "ill_rewards:Brightness"


def get_config():
    c = golden_config.get_config().unlock()
    c.num_epochs, c.eval_freq, c.save_freq, c.train.learning_rate = 8, 2, 8, 2e-3
    options = {{"constant": False, "noise": 0.0, "scale": 1.0}}
    c.reward.options = ConfigDict({{"brightness": {{**options}}, "darkness": {{**options, "scale": -1.0}}}})
    c.reward.fn, c.reward.held_out = ConfigDict({{"brightness": 1.0}}), ()
    {more}
    return c.lock()
"""


@pytest.fixture(scope="module")
def real_run(tmp_path_factory):
    """Trains with these lines added to the config, and gives the answer."""
    cache = tmp_path_factory.mktemp("cache")

    def train(*more):
        folder = tmp_path_factory.mktemp("run")
        (folder / "ill_rewards.py").write_text(REWARD)
        (folder / "config.py").write_text(
            CONFIG.format(folder=str(folder), more="; ".join(more) or "pass")
        )
        words = [
            f"--config.compilation_cache={cache / 'xla'}",
            f"--config.prompts.cache={cache / 'text'}",
        ]
        words += [f"--config.run_root={folder}", "--config.run_name=run"]
        env = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{os.environ['PYTHONPATH']}"}
        command = [
            sys.executable,
            ROOT / "scripts" / "train.py",
            "--config",
            folder / "config.py",
            *words,
        ]
        done = subprocess.run(
            [str(word) for word in command], capture_output=True, text=True, env=env
        )
        assert done.returncode == 0, done.stderr
        return diagnose.diagnose(folder / "run")

    return train


@pytest.mark.slow
def test_a_real_healthy_run(real_run):
    answer = real_run()
    assert answer.trend == "rises"
    assert not answer.of(PROBLEM, NOTE)
    assert len(answer.not_recorded) == 1  # it has no checks, and is told so


REAL_ILLS = [
    ("learning rate", "hardly move", "c.train.learning_rate = 1e-9"),
    ("learning rate", "too high", "c.train.learning_rate = 10.0"),
    ("KL penalty", "pulls the weights back", "c.train.beta = 1e4"),
    ("clip range", "float32 steps wide", "c.train.clip_range = 1e-9"),
    ("vanishing gradient", "next to no gradient", "c.train.adam_epsilon = 1.0"),
    ("zero-spread groups", "In 100% of the groups", "c.reward.options.brightness.constant = True"),
    ("reward noise", "different scores", "c.reward.options.brightness.noise = 0.05"),
    ("held-out checks", "darkness got worse", "c.reward.held_out = ('darkness',)"),
    (
        "one reward drowning the others",
        "the weights that do this",
        "c.reward.fn.embedded_detector = 1e-3",
    ),
    (
        "one reward drowning the others",
        "vanishes beside",
        "c.reward.fn.darkness, c.reward.options.darkness.scale = 1.0, -1e-6",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "words", "more"), REAL_ILLS)
def test_a_real_ill_run(real_run, name, words, more):
    first = real_run(more).findings[0]
    assert (first.name, first.severity) == (name, PROBLEM)
    assert words in first.says
