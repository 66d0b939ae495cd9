"""What a run is judged by: alarms, best weights, early stop, and what it says of them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from realgen_jax.config import adversary, base
from realgen_jax.training import evaluation
from realgen_jax.training.evaluation import (
    Evaluation,
    drift,
    evaluate_and_report,
    fallen,
    say_what_judges,
)
from realgen_jax.training.log import RunLog
from realgen_jax.training.monitor import monitor_problems, monitored
from realgen_jax.training.stage import Drawn

HELD_OUT = ("h", "h2")
METRICS = ("frechet",)


def reward_config(*, learns=False, held_out=HELD_OUT, metrics=METRICS, **changes):
    """config.reward with a detector that learns or not."""
    reward = base().reward
    reward.fn.detector = 1.0
    reward.held_out = held_out
    reward.metrics = metrics
    if learns:
        reward.adversarial.detector = adversary()
    reward.update(changes)
    return reward


@pytest.mark.parametrize(
    ("config", "figure"),
    [
        ({}, "reward"),
        ({"held_out": (), "metrics": ()}, "reward"),
        ({"monitor": "h2"}, "h2"),
        ({"learns": True}, "h"),
        ({"learns": True, "held_out": ()}, "frechet"),
        ({"learns": True, "held_out": (), "metrics": ()}, "reward"),
        ({"learns": True, "monitor": "frechet"}, "frechet"),
        ({"learns": True, "monitor": "reward"}, "reward"),
    ],
)
def test_a_reward_that_learns_does_not_judge_a_run(config, figure):
    reward = reward_config(**config)
    assert monitored(reward, reward.metrics) == figure
    assert monitor_problems(reward) == []


def test_what_cannot_be_monitored_is_refused():
    assert monitor_problems(reward_config(monitor="fid")) == [
        "config.reward.monitor is 'fid'; choose auto, reward, or a name in config.reward.held_out "
        "or config.reward.metrics: auto, reward, h, h2, frechet"
    ]


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        ({}, False),
        ({"held_out": ()}, True),
        ({"held_out": (), "monitor": "frechet"}, False),
        ({"held_out": (), "learns": True}, False),
        ({"held_out": (), "metrics": (), "learns": True}, True),
    ],
)
def test_an_early_stop_needs_something_to_stop_by(config, refused):
    problems = monitor_problems(reward_config(stop_patience=2, **config))
    start = "config.reward.stop_patience is 2, but there is nothing to stop by: "
    assert [problem.startswith(start) for problem in problems] == [True] * refused


def figures(reward, h, frechet=0.06, spread=0.1):
    return {"reward": reward, "h": h, "h2": 0.5, "frechet": frechet, "prompt_std": spread}


@pytest.mark.parametrize(
    ("learns", "now", "alarms"),
    [
        (True, figures(0.208, 0.1, 9.0), ["h 0.900 -> 0.100", "frechet 0.060 -> 9.000"]),
        (True, figures(0.208, 0.89), []),
        (True, figures(0.3, 0.9, spread=0.02), ["prompt_std 0.100 -> 0.020"]),
        (False, figures(0.208, 0.1, 9.0), []),  # damage, which is no exploit of the reward
        (False, figures(0.3, 0.1, 9.0), ["h 0.900 -> 0.100", "frechet 0.060 -> 9.000"]),
        (False, figures(0.3, 0.9, spread=0.02), ["prompt_std 0.100 -> 0.020"]),
    ],
)
def test_alarms(learns, now, alarms):
    reward = reward_config(learns=learns)
    monitor = monitored(reward, reward.metrics)
    assert drift(figures(0.229, 0.9), now, reward, monitor) == alarms


def test_checks_that_one_of_two_evaluations_lacks_raise_no_alarm():
    reward = reward_config(learns=True)
    start = figures(0.2, 0.9)
    now = {key: 0.0 for key in start if key not in ("frechet", "prompt_std")}
    assert drift(start, now, reward, "h") == ["h 0.900 -> 0.000", "h2 0.500 -> 0.000"]


def evaluations(*rows, drop=0.1, patience=2, **config):
    """Evaluations (check, reward) until the run ends: their number, and the reason."""
    reward = reward_config(held_out=("h",), stop_drop=drop, stop_patience=patience, **config)
    monitor = monitored(reward, reward.metrics)
    peaks = {}
    for count, (check, trained) in enumerate(rows, start=1):
        peaks = json.loads(json.dumps(peaks))  # as a checkpoint keeps it
        now = {"h": check, "frechet": -check, "reward": trained}
        if reasons := fallen(peaks, now, reward, monitor):
            return count, reasons[0]
    return None


FELL = "h fell from 0.5 to 0.35"
ROSE = " while the reward rose from 0.1 to 0.2"


@pytest.mark.parametrize(
    ("rows", "config", "wanted"),
    [
        ([(0.5, 0.1), (0.35, 0.2), (0.35, 0.2)], {}, (3, FELL + ROSE)),
        # twice in a row
        ([(0.5, 0.1), (0.35, 0.2), (0.45, 0.2), (0.35, 0.2), (0.35, 0.2)], {}, (5, FELL + ROSE)),
        # since its best
        ([(0.4, 0.0), (0.5, 0.1), (0.35, 0.2), (0.35, 0.2)], {}, (4, FELL + ROSE)),
        ([(0.5, 0.1), (0.35, 0.1), (0.35, 0.05)], {}, None),  # the reward does not rise
        ([(0.5, 0.1), (0.45, 0.2), (0.41, 0.2)], {}, None),  # by less than the drop
        ([(0.5, 0.1), (0.1, 0.2), (0.1, 0.2)], {"patience": 0}, None),  # never
        # where the reward learns, its own rise does not matter
        ([(0.5, 0.1), (0.35, 0.1), (0.35, 0.05)], {"learns": True}, (3, FELL)),
        ([(0.5, 0.1), (0.45, 0.2), (0.41, 0.2)], {"learns": True}, None),
    ],
)
def test_checks_end_a_run_after_as_many_falls_as_allowed(rows, config, wanted):
    assert evaluations(*rows, **config) == wanted


def test_a_metric_that_is_monitored_ends_a_run_when_it_rises():
    reward = reward_config(monitor="frechet", held_out=(), stop_drop=0.1, stop_patience=1)
    peaks = {}
    assert fallen(peaks, {"frechet": 0.5, "reward": 0}, reward, "frechet") == []
    assert fallen(peaks, {"frechet": 0.3, "reward": 0}, reward, "frechet") == []
    reasons = fallen(peaks, {"frechet": 0.45, "reward": 0}, reward, "frechet")
    assert reasons == ["frechet rose from 0.3 to 0.45"]


# Reward and held-out detector of the preset tiny_adversarial with seed 0; made-up distances.
REWARDS = (0.229, 0.281, 0.220, 0.168)
CHECKS = (0.317, 0.376, 0.410, 0.488)
DISTANCES = (0.064, 0.051, 0.055, 0.068)


def judge(monkeypatch, tmp_path, reward, metrics=METRICS):
    """Evaluate every 15 epochs: the epochs whose weights became `best/`."""
    run = SimpleNamespace(
        config=base(),
        folder=tmp_path,
        model=None,
        metrics=dict.fromkeys(metrics),
        monitor=monitored(reward, metrics),
        test_prompts=["a", "b"],
    )
    run.config.num_epochs = 45
    run.config.reward = reward
    stage = SimpleNamespace(after_evaluation=lambda *_: {})
    best = []
    rows = iter(zip(REWARDS, CHECKS, DISTANCES, strict=True))

    def made_up(*_):
        trained, check, distance = next(rows)
        means = {"reward": trained, "detector": trained, "h": check, "h2": 0.5}
        means |= {"frechet": distance} if metrics else {}
        pictures = np.zeros((2, 3, 8, 8), np.uint8)
        scores = {"detector": np.full(2, trained, np.float32)}
        return Evaluation(
            ["a", "b"], Drawn(["a", "b"], None, None), pictures, scores, means, {}, {}
        )

    monkeypatch.setattr(evaluation, "evaluate", made_up)
    monkeypatch.setattr(evaluation, "export", lambda *_: best.append(epoch))
    history = {}
    with RunLog(tmp_path, {}, 0, 45, "") as log:
        say_what_judges(run, log)
        for epoch in (0, 15, 30, 45):
            history = json.loads(json.dumps(history))  # as a checkpoint keeps it
            evaluate_and_report(run, stage, log, epoch, None, history)
    return best


@pytest.mark.parametrize(
    ("config", "best", "said"),
    [
        ({}, [15], "go by reward (config.reward.monitor)"),
        ({"learns": True}, [15, 30, 45], "go by h, since detector learns (config.reward.monitor)"),
        ({"learns": True, "monitor": "frechet"}, [15], "go by frechet, since detector learns"),
    ],
)
def test_the_best_weights(monkeypatch, tmp_path, capsys, config, best, said):
    assert judge(monkeypatch, tmp_path, reward_config(**config)) == best
    shown = capsys.readouterr().out
    assert said in shown
    # At the end the reward is below its start, and the metric above it.
    alarm = "warning worse than at the start: frechet 0.064 -> 0.068"
    assert (alarm in shown) == ("learns" in config)


def test_a_run_without_anything_that_stays_the_same_says_so(monkeypatch, tmp_path, capsys):
    reward = reward_config(learns=True, held_out=(), metrics=())
    judge(monkeypatch, tmp_path, reward, ())
    shown = capsys.readouterr().out
    assert "warning detector learns, so this reward is not comparable over time" in shown
    assert "config.reward.held_out, such as detector_at_start" in shown


def test_a_metric_that_needs_more_pictures_is_left_out_and_named(monkeypatch, tmp_path, capsys):
    judge(monkeypatch, tmp_path, reward_config(), ())
    shown = capsys.readouterr().out
    assert "warning frechet is left out: it needs more pictures than an evaluation has, 2" in shown


@pytest.mark.parametrize("fault", ["missing", "cut off", "other pictures"])
def test_a_run_ends_without_the_pictures_of_before(monkeypatch, tmp_path, capsys, fault):
    """Those of its first evaluation, from a folder that was moved without them."""
    judge(monkeypatch, tmp_path, reward_config())
    assert (tmp_path / "samples" / "before_after.png").exists()
    (tmp_path / "samples" / "before_after.png").unlink()
    file = tmp_path / "samples" / "start.npz"
    content = file.read_bytes()
    file.unlink()
    if fault == "cut off":
        file.write_bytes(content[:100])
    elif fault == "other pictures":
        np.savez(file, pictures=np.zeros((3, 3, 8, 8), np.uint8), detector=np.zeros(3))

    monkeypatch.setattr(np, "savez", lambda *_, **__: None)
    capsys.readouterr()
    judge(monkeypatch, tmp_path, reward_config())
    assert not (tmp_path / "samples" / "before_after.png").exists()
    assert f"warning no picture of before and after: {file} cannot be read (" in (
        capsys.readouterr().out
    )
