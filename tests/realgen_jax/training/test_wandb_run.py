"""Weights & Biases: tested before anything is loaded, and a run goes on when it fails."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from realgen_jax.training.log import RunLog
from realgen_jax.training.wandb_run import open_wandb


class FakeRun:
    """A run of Weights & Biases; `failing` names the method that fails."""

    def __init__(self, failing=""):
        self.failing = failing
        self.calls = []

    def log(self, values, step):
        self.calls.append((values, step))
        if self.failing == "log":
            raise RuntimeError("the service [core] has ended")

    def finish(self):
        self.calls.append("finish")
        if self.failing == "finish":
            raise OSError("no network")


def fake_wandb(monkeypatch, init):
    module = SimpleNamespace(init=init, Image=lambda picture: picture.size)
    monkeypatch.setitem(sys.modules, "wandb", module)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("No API key configured.\nUse `wandb login` to log in."), OSError("no such host")],
)
def test_what_keeps_it_from_working_is_one_line(monkeypatch, error):
    def init(**_):
        raise error

    fake_wandb(monkeypatch, init)
    with pytest.raises(
        ValueError, match=r"config\.wandb_project is 'p', but .* cannot be"
    ) as raised:
        open_wandb("p", "a run", {})
    line = str(raised.value)
    assert "\n" not in line
    assert str(error).split()[0] in line
    assert "`wandb login`" in line
    assert "WANDB_MODE=offline" in line


def test_it_is_only_opened_if_asked_for_and_by_the_first_process(monkeypatch):
    fake_wandb(monkeypatch, lambda **options: options)
    options = open_wandb("p", "a run", {"seed": 1})
    assert (options["project"], options["name"], options["id"]) == ("p", "a run", "a run")
    assert options["resume"] == "allow"
    assert open_wandb("", "a run", {}) is None
    monkeypatch.setattr("realgen_jax.training.wandb_run.process_index", lambda: 1)
    assert open_wandb("p", "a run", {}) is None


@pytest.mark.parametrize("failing", ["", "log", "finish"])
def test_a_run_goes_on_without_it(tmp_path, monkeypatch, capsys, failing):
    fake_wandb(monkeypatch, None)
    run = FakeRun(failing)
    pictures = np.zeros((1, 3, 8, 8), np.uint8)
    with RunLog(tmp_path, {}, 0, 2, run) as log:
        log.metrics("train", 1, {"reward": 0.5})
        log.metrics("train", 2, {"reward": 0.6})
        log.pictures("grid", 2, [pictures], [["a"]])
    output = capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2
    assert output.count("Weights & Biases failed") == bool(failing)

    if failing == "log":
        assert run.calls == [({"train/reward": 0.5}, 1)]
        assert "warning Weights & Biases failed (RuntimeError: the service [core] has" in output
    else:
        assert [call[1] for call in run.calls[:3]] == [1, 2, 2]
        assert run.calls[3] == "finish"
