"""The folder of a run: its name, its lock, and which config keys a resumed run may change."""

import shutil
import subprocess
import sys

import pytest

from realgen_jax.config import base
from realgen_jax.training.run_folder import (
    can_resume,
    changed_keys,
    has_run,
    missing_records,
    resume_from,
    run_folder,
    run_lock,
)


def test_folders(tmp_path):
    root = str(tmp_path)
    fresh = run_folder(root, "", "tiny", resume=False)
    assert fresh.name.startswith("tiny-2")
    with pytest.raises(FileNotFoundError, match="holds no run of preset 'tiny' to resume"):
        run_folder(root, "", "tiny", resume=True)
    with pytest.raises(FileNotFoundError, match=r"x cannot be resumed: it has no config\.json"):
        run_folder(root, "x", "tiny", resume=True)

    # A folder without config.json holds nothing that could be lost.
    (tmp_path / "x").mkdir()
    assert run_folder(root, "x", "tiny", resume=False) == tmp_path / "x"
    (tmp_path / "x" / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="x already holds a run; continue it with --resume"):
        run_folder(root, "x", "tiny", resume=False)
    (tmp_path / "x" / "config.json").unlink()

    for name in ("tiny-1", "tiny-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    assert run_folder(root, "", "tiny", resume=True).name == "tiny-2"


def test_a_preset_may_have_brackets(tmp_path):
    (tmp_path / "my[0]-1").mkdir()
    (tmp_path / "my[0]-1" / "config.json").write_text("{}")
    assert run_folder(str(tmp_path), "", "my[0]", resume=True).name == "my[0]-1"


def test_auto_resume_needs_a_name(tmp_path):
    with pytest.raises(ValueError, match="--auto_resume needs the name of the run"):
        can_resume(str(tmp_path), "")
    assert not can_resume(str(tmp_path), "x")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.json").write_text("{}")
    assert can_resume(str(tmp_path), "x")


def test_records_that_a_moved_folder_lacks_are_named(tmp_path):
    """With its checkpoints a run can go on; without them and its config it cannot."""
    for name in ("samples", "checkpoints", "tensorboard"):
        (tmp_path / name).mkdir()
    for name in ("config.json", "metrics.jsonl", "trainable.txt", "samples/start.npz"):
        (tmp_path / name).touch()
    assert missing_records(tmp_path, has_best=False) == []
    end = "; the run goes on without what was in there"
    assert missing_records(tmp_path, has_best=True) == [f"{tmp_path} lacks best{end}"]

    (tmp_path / "config.json").unlink()
    shutil.rmtree(tmp_path / "samples")
    (line,) = missing_records(tmp_path, has_best=False)
    assert line == f"{tmp_path} lacks config.json, samples/start.npz{end}"
    assert has_run(tmp_path)
    assert run_folder(str(tmp_path.parent), tmp_path.name, "tiny", resume=True) == tmp_path
    with pytest.raises(FileNotFoundError, match=r"neither a good checkpoint nor config\.json"):
        resume_from(tmp_path, base(), allow_change=False)


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
    changes = {"num_epochs": 9, "mesh": {"fsdp": 2}, "reward": reward}
    free, others = changed_keys(before, {**now, **changes})
    assert "  config.mesh.fsdp: was 1, is now 2" in free
    assert (len(free), others) == (5, [])

    # A key that is younger than the checkpoint
    free, others = changed_keys(before, {**before, "profile": {"steps": (3,)}})
    assert (free, others) == (["  config.profile.steps: was None, is now [3]"], [])

    reward = {"options": {"omniaid": {"path": "x"}}}
    free, others = changed_keys(before, {**before, "reward": reward})
    assert (free, others) == ([], ["  config.reward.options.omniaid.path: was None, is now 'x'"])

    free, others = changed_keys(before, {**before, "train": {"lr": 0.2}, "new": 1})
    assert free == []
    assert others == [
        "  config.new: was None, is now 1",
        "  config.train.lr: was 0.1, is now 0.2",
        "  config.train.range: was [0, 7], is now None",
    ]


def test_a_folder_has_one_run_at_a_time_and_a_kill_frees_it(tmp_path):
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from realgen_jax.training.run_folder import run_lock\n"
        "with run_lock(Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    folder = tmp_path / "runs" / "x"
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n"
    message = "x is in use: a run with this name is active; wait until it ends"
    with pytest.raises(FileExistsError, match=message), run_lock(folder):
        pass
    other.kill()
    other.wait()

    with run_lock(folder):
        (folder / "config.json").write_text("{}")
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "lock"]


def test_a_folder_that_stays_empty_is_removed(tmp_path):
    with pytest.raises(ValueError, match="wrong"), run_lock(tmp_path / "y"):
        raise ValueError("wrong")
    assert not (tmp_path / "y").exists()
