"""The records of a run: rows, pictures and what the terminal shows."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Group
from rich.progress import Progress
from rich.table import Table

from realgen_jax.training.log import NoLog, RunLog, memory, step_columns
from realgen_jax.training.progress import plain_console, progress_columns

STEP = {"loss": 1.0, "ratio_deviation": 2e-7, "grad_norm": 3.0}


def log_of(folder, start=0):
    return RunLog(folder, {"seed": 1}, start, 4)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_files(tmp_path, capsys):
    scores = {
        "embedded_detector": np.float32([[0.1, 0.3], [0.5, 0.5]]),
        "clip": np.float32([[1, 1], [1, 1]]),
    }
    reward = (scores["clip"] + scores["embedded_detector"]) / 2
    steps = [STEP, {**STEP, "loss": 3.0, "ratio_deviation": 3e-7}]
    seconds = {"sample": 0.75, "reward_wait": 0.5, "update": 0.75}
    details = {"seconds/scoring/clip": 0.25, "learning/clip/accuracy": 0.875}
    tiles = np.full((3, 3, 64, 64), 200, np.uint8)
    with log_of(tmp_path) as log:
        start = {"clip": 0.5, "a": 0.5}
        now = {"clip": 0.75, "a": 0.25}
        log.evaluation(2, start, {**now, "new": 1.0}, ["clip"], {"a": 0.125})
        columns = step_columns(steps, ["ratio_deviation"])
        log.train(1, scores, reward, columns, seconds, reward.size, details)
        captions = (["one\n0.5"] * 3, ["two"] * 3)
        file = log.pictures("grid", 1, (tiles, tiles // 2), captions, columns=2)

    (row,) = rows(tmp_path)
    assert (row["kind"], row["epoch"], row["steps"], row["loss"]) == ("train", 1, 2, 2.0)
    assert (row["ratio_deviation"], row["first_ratio_deviation"]) == (3e-7, 2e-7)
    assert row["reward/embedded_detector"] == pytest.approx(0.35)
    assert row["reward_std/embedded_detector"] == pytest.approx(0.05)
    assert (row["zero_spread/embedded_detector"], row["zero_spread/clip"]) == (0.5, 1.0)
    assert row["zero_spread"] == 0.5
    assert "std_ratio" not in row  # clip has no spread at all
    assert (row["images_per_second"], row["seconds/scoring/clip"]) == (2.0, 0.25)
    assert (row["seconds/sample"], row["learning/clip/accuracy"]) == (0.75, 0.875)
    assert row["reward_wait_share"] == 0.25
    assert file == tmp_path / "samples" / "grid.png"
    assert list((tmp_path / "tensorboard").glob("events*"))

    shown = capsys.readouterr().out
    assert "trained on  clip 0.500 -> 0.750" in shown
    assert "checks      a 0.500 -> 0.250 (r +0.12)   new 1.000" in shown
    assert "last evaluation: a 0.250" in shown
    assert "reward 0.675" in shown
    assert "clip/accuracy 0.88" in shown
    assert "|ratio-1| 2e-07" in shown


def test_a_resumed_run_repeats_no_row_and_loses_none(tmp_path):
    with log_of(tmp_path) as log:
        for epoch in range(4):
            if epoch % 2 == 0:
                log.metrics("eval", epoch, {"r": epoch})
            log.metrics("train", epoch + 1, {"r": epoch})
    whole = rows(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "epo')  # a kill in the middle of a line
    with log_of(tmp_path, start=2) as log:  # the newest checkpoint is that of epoch 2
        for epoch in (2, 3):
            if epoch % 2 == 0:
                log.metrics("eval", epoch, {"r": epoch})
            log.metrics("train", epoch + 1, {"r": epoch})
    assert rows(tmp_path) == whole


def epoch(log, number, **scores):
    """Log an epoch with these rewards, [groups, size] each."""
    scores = {name: np.float32(values) for name, values in scores.items()}
    reward = sum(scores.values())
    log.train(number, scores, reward, {}, {"sample": 1.0, "reward_wait": 0.0}, reward.size, {})


FLAT = [[0.5, 0.5], [0.25, 0.25]]
VARIED = [[0.5, 0.5], [0.25, 0.5]]


def test_a_reward_that_stays_constant_is_told_once(tmp_path, capsys):
    with log_of(tmp_path) as log:
        for number, jpeg in enumerate([FLAT, FLAT, VARIED, FLAT, FLAT, FLAT, FLAT], 1):
            epoch(log, number, jpeg=jpeg, clip=VARIED)
            warned = "the reward jpeg cannot tell" in capsys.readouterr().out
            assert warned == (number == 6)


def test_a_resumed_run_remembers_how_long_a_reward_was_constant(tmp_path, capsys):
    with log_of(tmp_path) as log:
        epoch(log, 1, jpeg=FLAT)
        epoch(log, 2, jpeg=FLAT)
        epoch(log, 3, jpeg=VARIED)  # after the checkpoint
    with log_of(tmp_path, start=2) as log:
        epoch(log, 3, jpeg=FLAT)
    assert (
        "warning the reward jpeg cannot tell the pictures of a prompt apart: for 3 epochs each of "
        "them got the same score (now 0.25 to 0.5), so nothing is learned from it"
    ) in capsys.readouterr().out


def test_other_processes_log_nothing(tmp_path, capsys):
    with NoLog() as log:
        log.say("a")
        log.metrics("train", 1, {"a": 1})
    assert capsys.readouterr().out == ""


def test_memory_sees_an_array_come_and_go():
    before = memory()
    array = jax.block_until_ready(jnp.ones((1024, 1024)) + 1)
    assert memory()["device"] - before["device"] >= array.nbytes
    del array
    assert memory()["device"] <= before["device"]
    assert 5e7 < before["host"] < 1e11


def test_names_with_brackets_are_printed_as_they_are(tmp_path, capsys):
    """ "[lora]" and "[/x]" are markup for rich, and ":cat:" is an emoji."""
    odd = "exp[lora] [/x] :cat:"
    with log_of(tmp_path) as log:
        log.say(f"trained weights: runs/{odd}/lora")
        log.warn(odd)
        log.progress(1, {odd: "0.5"})
        log.evaluation(1, {odd: 0.5}, {odd: 0.5}, [odd], {})
    shown = capsys.readouterr().out
    assert f"trained weights: runs/{odd}/lora" in shown
    assert f"warning {odd}" in shown
    assert f"epoch 1/4  {odd} 0.5" in shown
    assert shown.count(odd) == 4


def test_a_terminal_shows_brackets_as_they_are():
    odd = "exp[lora] [/x] :cat:"
    console = plain_console()
    progress = Progress(*progress_columns(), console=console)
    progress.add_task(odd, total=2)
    table = Table(odd)
    table.add_row(odd)
    console.width = 120
    with console.capture() as shown:
        console.print(Group(progress, odd), table)
    assert shown.get().count(odd) == 4
