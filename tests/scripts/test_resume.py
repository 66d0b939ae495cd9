"""What ends a run before its time, and what goes on from there: kills, SIGTERM, full disks, other meshes. Real runs."""

import os
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from realgen_jax.checkpoint import SUMS, newest_good
from tests.helpers.running import (
    GOLDEN,
    QUICK,
    ROOT,
    assert_close,
    begin,
    call,
    command,
    epochs_done,
    rows,
    until,
)

pytest.importorskip("torch")

ADVERSARIAL = ROOT / "tests" / "helpers" / "adversarial_config.py"


def state(folder):
    """All arrays of a run's newest checkpoint, and the files of its rewards that learn."""
    epoch, _ = newest_good(folder / "checkpoints")
    newest = folder / "checkpoints" / str(epoch)
    rewards = {
        file.name: np.frombuffer(file.read_bytes(), np.uint8) for file in newest.glob("rewards/*")
    }
    return ocp.StandardCheckpointer().restore(newest / "state"), rewards


def assert_same_run(one, other):
    """Parameters, optimizers, detectors and their history, metrics and pictures, to the last bit."""
    assert rows(one) == rows(other)
    jax.tree.map(np.testing.assert_array_equal, state(one), state(other))
    names = [
        f.relative_to(other)
        for part in ("lora", "best", "samples")
        for f in sorted((other / part).glob("*.*"))
    ]
    assert len(names) > 4
    for name in names:
        assert name.suffix == ".npz" or (one / name).read_bytes() == (other / name).read_bytes(), (
            name
        )


def unfinished(checkpoints):
    """Whether a save is at work, or a kill has cut one off."""
    if any(checkpoints.glob("*.orbax-checkpoint-tmp*")):
        return True
    return any(f.name.isdigit() and not (f / SUMS).exists() for f in checkpoints.glob("*"))


@pytest.mark.parametrize(
    ("kills", "epochs", "config"),
    [
        (2, 8, ADVERSARIAL),
        pytest.param(20, 60, GOLDEN, marks=pytest.mark.slow),
        pytest.param(
            5, 12, f"{ROOT}/configs/flux_grpo.py:tiny_adversarial", marks=pytest.mark.slow
        ),
    ],
    ids=["2 kills, a reward that learns", "20 kills", "5 kills, tiny_adversarial"],
)
def test_kills_at_any_moment_change_nothing(cache, tmp_path, kills, epochs, config):
    """By turns: right when a save begins, some time after an epoch, and some time after the start; and one SIGTERM."""
    words = [
        f"--config.run_root={tmp_path}",
        f"--config.num_epochs={epochs}",
        "--config.save_freq=1",
    ]
    words += ["--config.eval_freq=4", "--config.evaluate.after_training=False"]
    done = call("train.py", cache, *words, "--config.run_name=whole", config=config)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "whole" / "checkpoints" / str(epochs) / "rewards").exists() == (
        config != GOLDEN
    )
    folder, output, rng = tmp_path / "killed", tmp_path / "killed.txt", np.random.default_rng(kills)
    program = command(
        "train.py", cache, *words, "--config.run_name=killed", "--auto_resume", config=config
    )
    cut_off = 0
    for kill in range(kills):
        before, process = epochs_done(folder), begin(program, output)
        if kill % 3 == 2:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(rng.uniform(1, 7))
        else:
            until(lambda before=before: epochs_done(folder) > before, process, output)
            if kill % 3 == 0:
                until(lambda: unfinished(folder / "checkpoints"), process, output, pause=0)
            else:
                with pytest.raises(subprocess.TimeoutExpired):
                    process.wait(rng.uniform(0, 0.3))
        process.kill()
        process.wait()
        cut_off += unfinished(folder / "checkpoints")
    before, process = epochs_done(folder), begin(program, output)
    until(lambda: epochs_done(folder) > before, process, output)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0, output.read_text()
    assert re.search(r"stopped by SIGTERM, saved after \d+ epochs", output.read_text())
    assert cut_off  # a kill met a save at work
    last = subprocess.run(
        program, capture_output=True, text=True, timeout=300, env={**os.environ, **QUICK}
    )
    assert last.returncode == 0, last.stderr
    assert_same_run(folder, tmp_path / "whole")


def test_sigterm_saves_and_the_name_is_taken_while_a_run_goes_on(cache, tmp_path):
    words = [f"--config.run_root={tmp_path}", "--config.run_name=x", "--config.save_freq=100000"]
    words += ["--config.eval_freq=100000"]
    folder, output = tmp_path / "x", tmp_path / "x.txt"
    process = begin(command("train.py", cache, *words, "--config.num_epochs=100000"), output)
    until(lambda: epochs_done(folder) >= 2, process, output)
    second = call("train.py", cache, *words, "--resume")
    assert second.returncode == 1
    assert "x is in use: a run of this name is going on" in second.stderr
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0, output.read_text()
    (saved,) = map(
        int, re.findall(r"stopped by SIGTERM, saved after (\d+) epochs", output.read_text())
    )
    assert newest_good(folder / "checkpoints") == (saved, [])


def test_a_loop_that_does_not_ask_is_ended_when_its_grace_is_over():
    program = (
        "from realgen_jax.training.preemption import Preemption\nimport time\n"
        "stop = Preemption(0.5); print(stop.wanted(), flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "False\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert process.stdout.read().startswith(
        "stopped 0.5 s after SIGTERM, before what it was at was over; --resume"
    )


@pytest.fixture
def small_disk(tmp_path):
    """Mount a disk of so many bytes; returns the function that does it."""
    mounted = []

    def mount(folder, size, *options):
        folder.mkdir(parents=True, exist_ok=True)
        words = [
            "mount",
            "-t",
            "tmpfs",
            "-o",
            ",".join([f"size={size}", *options]),
            "tmpfs",
            folder,
        ]
        if subprocess.run(words, capture_output=True).returncode:
            pytest.skip("this user may not mount a disk to fill")
        mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["continue", "stop"])
def test_a_full_disk(cache, tmp_path, small_disk, what):
    """Room for one checkpoint, not for two."""
    folder = tmp_path / "full"
    small_disk(folder / "checkpoints", "600k")
    words = [
        f"--config.run_root={tmp_path}",
        "--config.run_name=full",
        "--config.save_freq=1",
        "--config.eval_freq=4",
    ]
    done = call("train.py", cache, *words, "--config.num_epochs=3", f"--config.save_failure={what}")
    text = r"checkpoint 2 could not be saved in .*; the newest is still that of epoch 1\. .*No space left on device"
    assert re.search(text, done.stderr if what == "stop" else done.stdout), done
    assert done.returncode == (1 if what == "stop" else 0)
    assert "train.py" not in done.stderr  # no traceback of ours
    assert newest_good(folder / "checkpoints") == (1, [])
    subprocess.run(["mount", "-o", "remount,size=64m", folder / "checkpoints"], check=True)
    done = call("train.py", cache, *words, "--config.num_epochs=3", "--resume")
    assert done.returncode == 0, done.stderr
    assert newest_good(folder / "checkpoints") == (3, [])


@pytest.mark.slow
def test_a_changed_config_goes_on_only_if_allowed(cache, tmp_path):
    words = [
        f"--config.run_root={tmp_path}",
        "--config.run_name=x",
        "--config.save_freq=1",
        "--config.eval_freq=100",
    ]
    first = call("train.py", cache, *words, "--config.num_epochs=1")
    assert first.returncode == 0, first.stderr
    change = [
        "--config.num_epochs=2",
        "--config.train.clip_range=1e-2",
        "--config.seed=7",
        "--resume",
    ]
    done = call("train.py", cache, *words, *change)
    assert done.returncode == 1
    assert done.stderr.splitlines()[1:] == [
        "  config.seed: 0 then, 7 now",
        "  config.train.clip_range: 0.001 then, 0.01 now",
    ]
    done = call("train.py", cache, *words, *change, "--allow_config_change")
    assert done.returncode == 0, done.stderr
    assert "config.train.clip_range: 0.001 then, 0.01 now" in done.stdout
    done = call(
        "train.py", cache, *words, *change[:-1], "--config.num_epochs=3", "--resume"
    )  # the change has been saved
    assert done.returncode == 0, done.stderr
    done = call(
        "train.py", cache, *words, *change, "--allow_config_change", "--config.train.lora_rank=2"
    )
    assert done.returncode == 1
    assert "checkpoint 3 in " in done.stderr
    assert "does not fit this config's weights and optimizer" in done.stderr


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(cache, tmp_path):
    """From 8 devices with the weights split to 4 that only split images, and to one."""
    words = [
        f"--config.run_root={tmp_path}",
        "--config.sample.branches=1",
        "--config.sample.test_batch_size=8",
    ]
    words += ["--config.eval_freq=100", "--config.save_freq=1"]
    whole = call("train.py", cache, *words, "--config.run_name=whole", "--config.num_epochs=4")
    assert whole.returncode == 0, whole.stderr
    for epochs, devices, fsdp in ((2, 8, 4), (3, 4, 1), (4, 1, 1)):
        more = [
            "--config.run_name=moved",
            "--auto_resume",
            f"--config.num_epochs={epochs}",
            f"--config.mesh.fsdp={fsdp}",
        ]
        done = call("train.py", cache, *words, *more, JAX_NUM_CPU_DEVICES=str(devices))
        assert done.returncode == 0, done.stderr
        assert ("config.mesh.fsdp: 4 then, 1 now" in done.stdout) == (devices == 4)
    assert_close(tmp_path / "whole", tmp_path / "moved")
