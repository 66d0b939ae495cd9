import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realgen_jax.training.log import (
    NoLog,
    RunLog,
    changed_keys,
    memory,
    picture_grid,
    run_folder,
    run_lock,
)

STEP = {"loss": 1.0, "ratio_deviation": 2e-7, "grad_norm": 3.0}


def log_of(folder, start=0):
    return RunLog(folder, {"seed": 1}, start, 4, "")


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_files(tmp_path, capsys):
    with log_of(tmp_path) as log:
        scores = {
            "embedded_detector": np.float32([[0.1, 0.3], [0.5, 0.5]]),
            "clip": np.float32([[1, 1], [1, 1]]),
        }
        start, now = {"clip": 0.5, "a": 0.5}, {"clip": 0.75, "a": 0.25}
        log.evaluation(2, start, now, ["clip"], {"a": 0.125}, ["a 0.500 -> 0.250"])
        steps, seconds = (
            [STEP, {**STEP, "loss": 3.0}],
            {"sample": 0.75, "reward_wait": 0.5, "update": 0.75},
        )
        reward = (scores["clip"] + scores["embedded_detector"]) / 2
        log.train(1, scores, reward, steps, seconds, {"scoring/clip": 0.25}, {})
        tiles = np.full((3, 3, 64, 64), 200, np.uint8)
        file = log.pictures(
            "grid", 1, (tiles, tiles // 2), (["one\n0.5"] * 3, ["two"] * 3), columns=2
        )
    (row,) = rows(tmp_path)
    assert (row["kind"], row["epoch"], row["loss"], row["first_ratio_deviation"]) == (
        "train",
        1,
        2.0,
        2e-7,
    )
    assert row["reward/embedded_detector"] == pytest.approx(0.35)
    assert row["reward_std/embedded_detector"] == pytest.approx(0.05)
    assert (row["zero_spread/embedded_detector"], row["zero_spread/clip"]) == (0.5, 1.0)
    assert (row["zero_spread"], row["steps"]) == (0.5, 2)
    assert "std_ratio" not in row  # clip has no spread at all
    assert (row["images_per_second"], row["seconds/scoring/clip"]) == (2.0, 0.25)
    assert row["reward_wait_share"] == 0.25
    assert file == tmp_path / "samples" / "grid.png"
    assert list((tmp_path / "tensorboard").glob("events*"))
    shown = capsys.readouterr().out
    assert "trained on  clip 0.500 -> 0.750" in shown
    assert "checks      a 0.500 -> 0.250 (r +0.12)" in shown
    assert "warning the reward rises while this gets worse: a 0.500 -> 0.250" in shown
    assert "last evaluation: a 0.250" in shown
    assert "reward 0.675" in shown
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


def test_grids_hold_the_pictures_and_their_captions():
    red = np.zeros((2, 3, 64, 64), np.uint8)
    red[:, 0] = 255
    image = np.asarray(
        picture_grid([red], [["a", "a caption so long that it has to wrap several times over"]])
    )
    assert (image[20:180, 20:180] == [255, 0, 0]).all()
    below = image[8 + 192 :, :]
    assert (below < 50).all(-1).any()
    plain = np.asarray(picture_grid([red], [["", ""]]))
    assert plain.shape[0] < image.shape[0]


def test_folders(tmp_path):
    fresh = run_folder(str(tmp_path), "", "tiny", resume=False)
    assert fresh.name.startswith("tiny-2")
    with pytest.raises(FileNotFoundError, match="holds no run of preset 'tiny' to resume"):
        run_folder(str(tmp_path), "", "tiny", resume=True)
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        run_folder(str(tmp_path), "x", "tiny", resume=True)
    (tmp_path / "x").mkdir()
    assert (
        run_folder(str(tmp_path), "x", "tiny", resume=False) == tmp_path / "x"
    )  # nothing in it could be lost
    (tmp_path / "x" / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="x exists; go on with that run with --resume"):
        run_folder(str(tmp_path), "x", "tiny", resume=False)
    (tmp_path / "x" / "config.json").unlink()
    for name in ("tiny-1", "tiny-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    assert run_folder(str(tmp_path), "", "tiny", resume=True).name == "tiny-2"


def test_a_changed_config_is_named_key_by_key():
    before = {
        "seed": 1,
        "num_epochs": 3,
        "train": {"lr": 0.1, "range": [0, 7]},
        "mesh": {"fsdp": 1},
    }
    now = {**before, "train": {"lr": 0.1, "range": (0, 7)}}
    assert changed_keys(before, now) == ([], [])
    reward = {
        "devices": {"omniaid": "cuda:6"},
        "batch_size": 8,
        "options": {"omniaid": {"servers": ["http://a:1"]}},
    }
    free, others = changed_keys(
        before, {**now, "num_epochs": 9, "mesh": {"fsdp": 2}, "reward": reward}
    )
    assert "  config.mesh.fsdp: 1 then, 2 now" in free
    assert (len(free), others) == (5, [])
    traced = changed_keys(
        before, {**before, "profile": {"steps": (3,)}}
    )  # the key is younger than the checkpoint
    assert traced == (["  config.profile.steps: None then, [3] now"], [])
    others = changed_keys(before, {**before, "reward": {"options": {"omniaid": {"path": "x"}}}})[1]
    assert others == ["  config.reward.options.omniaid.path: None then, 'x' now"]
    others = changed_keys(before, {**before, "train": {"lr": 0.2}, "new": 1})[1]
    assert others == [
        "  config.new: None then, 1 now",
        "  config.train.lr: 0.1 then, 0.2 now",
        "  config.train.range: [0, 7] then, None now",
    ]


def test_a_folder_has_one_run_at_a_time_and_a_kill_frees_it(tmp_path):
    folder = tmp_path / "runs" / "x"
    hold = (
        "import sys, time; from pathlib import Path; from realgen_jax.training.log import run_lock\n"
        "with run_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n"
    with (
        pytest.raises(FileExistsError, match="is in use: a run of this name is going on"),
        run_lock(folder),
    ):
        pass
    other.kill()
    other.wait()
    with run_lock(folder):
        (folder / "config.json").write_text("{}")
    assert sorted(f.name for f in folder.iterdir()) == ["config.json", "lock"]
    with pytest.raises(ValueError, match="wrong"), run_lock(tmp_path / "y"):
        raise ValueError("wrong")
    assert not (tmp_path / "y").exists()  # nothing came about


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
