"""A run is compared with a recorded one: bits on the same machine, figures elsewhere."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from realgen_jax.config_files import load_config
from realgen_jax.nn.tensors import read_json
from realgen_jax.reproduction import changed_recipe, compare, read_rows, this_machine
from realgen_scripts import reproduce
from tests.helpers.goldens import ROOT

EXAMPLES = sorted(file.parent for file in (ROOT / "examples").rglob("recipe.json"))
MACHINE = {"cpu": "a", "cores": 2, "devices": ["cpu"], "versions": {"jax": "1"}}
OTHER = {**MACHINE, "cpu": "b", "versions": {"jax": "2"}}
ROWS = [
    {"kind": "eval", "epoch": 0, "detector": 0.2},
    {"kind": "train", "epoch": 1, "loss": 0.5, "seconds/sample": 1.0, "memory/host": 3},
    {"kind": "train", "epoch": 2, "loss": 0.4, "seconds/sample": 1.0, "memory/host": 3},
    {"kind": "eval", "epoch": 2, "detector": 0.40},
]


def write(folder: Path, rows: list[dict], **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "digests.json").write_text("{}")
    return folder


@pytest.fixture
def recorded(tmp_path) -> Path:
    folder = write(tmp_path / "recorded", ROWS, seed=0)
    (folder / "machine.json").write_text(json.dumps(MACHINE))
    recipe = {"config": "c", "options": [], "figures": {"detector": [0.40, 0.45]}}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    return folder


def changed(row: int, column: str, value: float) -> list[dict]:
    rows = [dict(row) for row in ROWS]
    rows[row][column] = value
    return rows


def without(row: int, column: str) -> list[dict]:
    rows = [dict(row) for row in ROWS]
    del rows[row][column]
    return rows


def run_with(recorded: Path, rows: list[dict]) -> Path:
    """A run whose config.json has all keys, as train.py writes it."""
    run = write(recorded.with_name("run"), rows)
    config = load_config("flux_grpo:tiny").to_dict()
    for folder in (recorded, run):
        (folder / "config.json").write_text(json.dumps(config))
    return run


def test_equal_rows_on_the_same_machine(recorded):
    rows = changed(1, "seconds/sample", 9.0)
    rows[2]["memory/host"] = 9
    outcome = compare(recorded, run_with(recorded, rows), MACHINE)
    assert outcome.equal
    assert outcome.lines == [
        "the recorded kind of machine and versions: all 4 rows are equal bit for bit"
    ]


def test_a_new_column_is_no_difference(recorded):
    outcome = compare(recorded, run_with(recorded, changed(1, "new", 0.1)), MACHINE)
    assert outcome.equal
    assert outcome.lines[1] == "columns that the recorded run does not have: new"


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        (changed(2, "loss", 0.4 + 1e-16 * 2**20), "epoch 2, train, loss: 0.4"),
        (changed(3, "detector", 0.41), "epoch 2, eval, detector: 0.41, recorded 0.4"),
        (without(1, "loss"), "epoch 1, train, loss: None, recorded 0.5"),
        (ROWS[:3], "3 rows; the recorded run has 4"),
    ],
)
def test_a_changed_row_is_told_on_the_same_machine(recorded, rows, line):
    outcome = compare(recorded, run_with(recorded, rows), MACHINE)
    assert not outcome.equal
    assert outcome.lines[0].startswith(line)


def test_another_machine_may_round_differently(recorded):
    rows = changed(1, "loss", 0.50004)
    rows[2]["loss"] = 0.9
    rows[3]["detector"] = 0.44
    outcome = compare(recorded, run_with(recorded, rows), OTHER)
    assert outcome.equal
    text = "\n".join(outcome.lines)
    assert "  cpu: b, recorded a\n  jax: 2, recorded 1\n" in text
    assert "largest difference 4.0e-05 (loss), limit 0.0001" in text
    assert "detector: 0.440, recorded 0.400, within the seeds' spread of 0.050" in text


@pytest.mark.parametrize(
    ("rows", "word"),
    [
        (changed(0, "detector", 0.2002), "largest difference 2.0e-04"),
        (changed(1, "loss", float("nan")), "largest difference inf"),
        (changed(3, "detector", 0.46), "NOT within"),
        (changed(3, "detector", 0.34), "NOT within"),
        (ROWS[:3], "the last evaluation is of epoch 0, recorded 2"),
    ],
)
def test_a_run_that_learns_something_else_is_told_anywhere(recorded, rows, word):
    outcome = compare(recorded, run_with(recorded, rows), OTHER)
    assert not outcome.equal
    assert word in "\n".join(outcome.lines)


def test_another_recipe_is_told(recorded):
    run = run_with(recorded, ROWS)
    config = read_json(run / "config.json")
    config["train"]["beta"] = 0.5
    (run / "config.json").write_text(json.dumps(config))
    outcome = compare(recorded, run, MACHINE)
    assert not outcome.equal
    assert "config.train.beta: was 0.01, is now 0.5" in outcome.lines[1]


def test_missing_and_damaged_files(recorded):
    run = run_with(recorded, ROWS)
    (run / "metrics.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"run/metrics.jsonl is damaged"):
        compare(recorded, run, MACHINE)
    (recorded / "machine.json").unlink()
    (run / "metrics.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"metrics.jsonl: no such file"):
        compare(recorded, run, MACHINE)


def test_logs_without_what_is_compared(recorded):
    with pytest.raises(ValueError, match="the log has no epoch"):
        compare(recorded, run_with(recorded, ROWS[:1]), OTHER)
    with pytest.raises(ValueError, match="the log has no evaluation"):
        compare(recorded, run_with(recorded, ROWS[1:3]), OTHER)
    recipe = {"figures": {"beauty": [0.4]}}
    (recorded / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match="evaluations have no column 'beauty'"):
        compare(recorded, run_with(recorded, ROWS), OTHER)


def called(monkeypatch, *arguments: object) -> object:
    """Call reproduce.py; return its exit status, or its message."""
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        reproduce.main()
    return end.value.code


def test_the_command_tells_a_changed_log(recorded, monkeypatch, capsys):
    run = run_with(recorded, changed(2, "loss", 0.41))
    (recorded / "machine.json").write_text(json.dumps(this_machine(reproduce.kinds())))
    assert called(monkeypatch, recorded, "--run", run) == 1
    out = capsys.readouterr().out
    assert out.startswith("epoch 2, train, loss: 0.41, recorded 0.4\n")
    assert "does NOT reproduce" in out
    run_with(recorded, ROWS)
    assert called(monkeypatch, recorded, "--run", run) == 0


def test_a_run_that_has_not_ended_is_not_recorded(recorded, monkeypatch):
    """The demo has 45 epochs, of which there are 2."""
    run = run_with(recorded, ROWS)
    message = called(monkeypatch, recorded, "--record", run)
    assert message == f"error: {run} has not ended: evaluated at epoch 2 of 45"


# -- The recorded runs


def test_there_are_recorded_runs():
    assert [folder.name for folder in EXAMPLES] == ["awm", "demo"]


@pytest.mark.parametrize("folder", EXAMPLES, ids=lambda folder: folder.name)
def test_a_recipe_is_still_the_one_that_was_recorded(folder, tmp_path):
    recipe = read_json(folder / "recipe.json")
    config = load_config(recipe["config"]).unlock()
    for option in recipe["options"]:
        key, value = option.removeprefix("--config.").split("=")
        config[key] = int(value)
    write(tmp_path, [], **config.to_dict())
    (tmp_path / "digests.json").write_text((folder / "digests.json").read_text())
    assert changed_recipe(folder, tmp_path) == []

    text = "".join(file.read_text() for file in folder.glob("*.json"))
    assert str(ROOT) not in text
    assert "/tmp" not in text


def test_the_demo_has_the_figures_of_the_readme():
    """Each cell is the value before and after; a column is a seed."""
    folder = ROOT / "examples" / "embedded" / "demo"
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "eval"]
    figures = read_json(folder / "recipe.json")["figures"]
    cells = re.findall(r"([\d.]+) → ([\d.]+)", (ROOT / "README.md").read_text())
    for number, (column, seeds) in enumerate(figures.items()):
        line = cells[3 * number : 3 * number + 3]
        assert line[0][0] == f"{rows[0][column]:.3f}"
        assert [after for _, after in line] == [f"{value:.3f}" for value in seeds]


@pytest.mark.slow
def test_a_recorded_run_is_reproduced(tmp_path):
    folder = ROOT / "examples" / "embedded" / "awm"
    command = [sys.executable, ROOT / "scripts" / "reproduce.py", folder]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
