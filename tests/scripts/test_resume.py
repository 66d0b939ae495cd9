"""Ends before time, and what a resumed run makes of them: kills, signals, full disks, other meshes.

All tests run the real programs.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from realgen_jax.checkpoint import SUMS, newest_good
from tests.helpers.faults import send_signal
from tests.helpers.goldens import TESTS
from tests.helpers.running import (
    ADVERSARIAL,
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


def state(folder):
    """All arrays of a run's newest checkpoint, and the files of its rewards that learn."""
    epoch, _ = newest_good(folder / "checkpoints")
    newest = folder / "checkpoints" / str(epoch)
    rewards = {}
    for file in newest.glob("rewards/*"):
        rewards[file.name] = np.frombuffer(file.read_bytes(), np.uint8)
    return ocp.StandardCheckpointer().restore(newest / "state"), rewards


def assert_same_run(one, other):
    """Arrays, rewards that learn, metrics and pictures are equal to the last bit."""
    assert rows(one) == rows(other)
    jax.tree.map(np.testing.assert_array_equal, state(one), state(other))

    names = []
    for part in ("lora", "rewriter", "best", "samples"):
        names += [file.relative_to(other) for file in sorted((other / part).glob("*.*"))]
    assert len(names) > 4
    for name in names:
        if name.suffix != ".npz":
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


def is_saving(checkpoints):
    """Whether a save is in progress, or a kill has cut one off."""
    if any(checkpoints.glob("*.orbax-checkpoint-tmp*")):
        return True
    epochs = [entry for entry in checkpoints.glob("*") if entry.name.isdigit()]
    return any(not (entry / SUMS).exists() for entry in epochs)


def let_run(process, seconds):
    """Wait this long; the process must still run then."""
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(seconds)


def wait_for_epoch(folder, process, output):
    """Wait until a run has finished one more epoch."""
    before = epochs_done(folder)
    until(lambda: epochs_done(folder) > before, process, output)


@pytest.mark.parametrize(
    ("kills", "epochs", "config"),
    [
        pytest.param(1, 5, ADVERSARIAL, marks=pytest.mark.slow),
        pytest.param(20, 60, GOLDEN, marks=pytest.mark.slow),
        pytest.param(
            5, 12, f"{ROOT}/configs/flux_grpo.py:tiny_adversarial", marks=pytest.mark.slow
        ),
        pytest.param(5, 12, f"{ROOT}/configs/rewriter_grpo.py", marks=pytest.mark.slow),
    ],
    ids=[
        "a kill, a reward that learns",
        "20 kills",
        "5 kills, tiny_adversarial",
        "5 kills, tiny_rewriter",
    ],
)
def test_kills_at_any_moment_change_nothing(cache, tmp_path, kills, epochs, config):
    """Kills when a save begins, shortly after an epoch, and soon after the start; then Ctrl-C."""
    words = [f"--config.run_root={tmp_path}", f"--config.num_epochs={epochs}"]
    words += ["--config.save_freq=1", "--config.eval_freq=4"]
    words += ["--config.evaluate.after_training=False"]
    done = call("train.py", cache, *words, "--config.run_name=whole", config=config)
    assert done.returncode == 0, done.stderr
    rewards = tmp_path / "whole" / "checkpoints" / str(epochs) / "rewards"
    assert rewards.exists() == (config == ADVERSARIAL or "adversarial" in str(config))

    folder = tmp_path / "killed"
    output = tmp_path / "killed.txt"
    words += ["--config.run_name=killed", "--auto_resume"]
    program = command("train.py", cache, *words, config=config)
    rng = np.random.default_rng(kills)
    cut_off = 0
    for kill in range(kills):
        process = begin(program, output)
        if kill % 3 == 2:
            let_run(process, rng.uniform(1, 7))
        else:
            wait_for_epoch(folder, process, output)
            if kill % 3 == 0:
                until(lambda: is_saving(folder / "checkpoints"), process, output, pause=0)
            else:
                let_run(process, rng.uniform(0, 0.3))
        process.kill()
        process.wait()
        cut_off += is_saving(folder / "checkpoints")
    assert cut_off  # a kill met a save in progress

    if kills > 1:
        process = begin(program, output)
        wait_for_epoch(folder, process, output)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, output.read_text()
        assert re.search(r"stopped by SIGTERM, saved after \d+ epochs", output.read_text())

    last = subprocess.run(
        program, capture_output=True, text=True, timeout=300, env={**os.environ, **QUICK}
    )
    assert last.returncode == 0, last.stderr
    assert_same_run(folder, tmp_path / "whole")


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_the_name_is_taken_while_a_run_goes_on(cache, tmp_path, number):
    folder = tmp_path / "x"
    output = tmp_path / "x.txt"
    words = [f"--config.run_root={tmp_path}", "--config.run_name=x", "--config.save_freq=100000"]
    words += ["--config.eval_freq=100000"]
    process = begin(command("train.py", cache, *words, "--config.num_epochs=100000"), output)
    until(lambda: epochs_done(folder) >= 2, process, output)

    second = call("train.py", cache, *words, "--resume")
    assert second.returncode == 1
    assert "x is in use: a run with this name is active" in second.stderr

    process.send_signal(number)
    assert process.wait(30) == 0, output.read_text()
    saved = re.findall(rf"stopped by {number.name}, saved after (\d+) epochs", output.read_text())
    assert [(int(epoch), []) for epoch in saved] == [newest_good(folder / "checkpoints")]


def test_a_loop_that_does_not_ask_is_ended_when_its_grace_is_over():
    program = (
        "import time\n"
        "from realgen_jax.training.preemption import Preemption\n"
        "preemption = Preemption(0.5)\n"
        "print(preemption.wanted(), flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "False\n"
    process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    assert process.wait(20) == 0
    assert time.monotonic() - start >= 0.4
    assert process.stdout.read() == (
        "stopped 0.5 s after SIGTERM, before the current phase finished; --resume will repeat it\n"
    )


def test_a_second_ctrl_c_stops_at_once_and_says_what_is_lost(tmp_path):
    program = (
        "import time\n"
        "from realgen_jax.training.preemption import Preemption\n"
        "preemption = Preemption(60)\n"
        "preemption.hold(lambda: 'stopped; epoch 3 is lost')\n"
        "print(flush=True)\n"
        "while not preemption.wanted(): time.sleep(0.01)\n"
        "print(preemption.name, preemption.status, flush=True)\n"
        "time.sleep(60)\n"
    )
    output = tmp_path / "output.txt"
    process = begin([sys.executable, "-c", program], output)
    send_signal(signal.SIGINT, process, output, "\n")
    send_signal(signal.SIGINT, process, output, "SIGINT 130\n")
    assert process.wait(20) == 130
    assert output.read_text().splitlines()[1:] == [
        "SIGINT: the run saves and stops after the current phase; Ctrl-C again stops it at once",
        "SIGINT 130",
        "stopped; epoch 3 is lost",
    ]


def test_ctrl_c_while_a_run_loads_leaves_nothing_behind(cache, tmp_path):
    output = tmp_path / "output.txt"
    words = [f"--config.run_root={tmp_path / 'runs'}", "--config.run_name=x"]
    process = begin(command("train.py", cache, *words), output)
    send_signal(signal.SIGINT, process, output, "preset ")
    start = time.monotonic()
    assert process.wait(20) == 130
    assert time.monotonic() - start < 2
    assert output.read_text().splitlines()[1:] == ["stopped"]
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.slow
def test_an_output_that_nobody_reads_ends_the_run_with_a_save(cache, tmp_path):
    words = [f"--config.run_root={tmp_path}", "--config.run_name=x", "--config.num_epochs=100000"]
    words += ["--config.save_freq=100000", "--config.eval_freq=100000"]
    process = subprocess.Popen(
        command("train.py", cache, *words),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **QUICK},
    )
    while not process.stdout.readline().startswith("epoch 2/"):
        assert process.poll() is None, process.stderr.read()
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr.read() == "SIGPIPE: the run saves and stops after the current phase\n"
    assert newest_good(tmp_path / "x" / "checkpoints")[0] >= 2


@pytest.mark.slow
@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_sizes_in_turn(cache, tmp_path, family):
    """Every epoch replays its rollout at its own size, and a resumed run has the same sizes.

    Each size is compiled once.
    """
    config = f"{GOLDEN}:{family}"
    words = [f"--config.run_root={tmp_path}", "--config.save_freq=1", "--config.eval_freq=2"]
    words += ["--config.sample.buckets=((64,64),(96,64),(64,96))"]
    words += ["--config.evaluate.sample.width=80", "--config.evaluate.sample.solver=dpm2"]
    for name, *more in (
        ("whole", "--config.num_epochs=4"),
        ("parts", "--config.num_epochs=2"),
        ("parts", "--config.num_epochs=4", "--resume"),
    ):
        run = (f"--config.run_name={name}", *more)
        done = call("train.py", cache, *words, *run, config=config, JAX_LOG_COMPILES="1")
        assert done.returncode == 0, done.stderr
        if name == "whole":
            for program in ("sample_call", "update_call"):
                assert done.stderr.count(f"Compiling jit({program})") == 3
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    trained = [row for row in rows(tmp_path / "whole") if row["kind"] == "train"]
    assert [row["first_ratio_deviation"] for row in trained] == [0, 0, 0, 0]


@pytest.fixture
def small_disk():
    """A function that mounts a small disk on a folder."""
    mounted = []

    def mount(folder, size):
        folder.mkdir(parents=True, exist_ok=True)
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
        if subprocess.run(words, capture_output=True).returncode:
            pytest.skip("this user may not mount a disk to fill")
        mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("save_failure", ["continue", "stop"])
def test_a_full_disk(cache, tmp_path, small_disk, save_failure):
    """Room for one checkpoint, not for two."""
    checkpoints = tmp_path / "full" / "checkpoints"
    words = [f"--config.run_root={tmp_path}", "--config.run_name=full", "--config.num_epochs=3"]
    words += ["--config.save_freq=1", "--config.eval_freq=4"]
    first = call("train.py", cache, *words, "--config.num_epochs=1")
    assert first.returncode == 0, first.stderr

    # Its checkpoints move to a disk that the next one fills.
    checkpoints.rename(tmp_path / "moved")
    small_disk(checkpoints, "600k")
    shutil.copytree(tmp_path / "moved", checkpoints, dirs_exist_ok=True)
    words += ["--resume"]
    done = call("train.py", cache, *words, f"--config.save_failure={save_failure}")
    message = (
        r"checkpoint 2 could not be saved in .*; the newest one is still that of epoch 1\. "
        ".*No space left on device"
    )
    stops = save_failure == "stop"
    assert re.search(message, done.stderr if stops else done.stdout), done
    assert done.returncode == (1 if stops else 0)
    assert "train.py" not in done.stderr  # no traceback
    assert newest_good(checkpoints) == (1, [])

    subprocess.run(["mount", "-o", "remount,size=64m", checkpoints], check=True)
    done = call("train.py", cache, *words)
    assert done.returncode == 0, done.stderr
    assert newest_good(checkpoints) == (3, [])


@pytest.mark.slow
def test_a_changed_config_resumes_only_if_allowed(cache, tmp_path):
    prompts = Path(shutil.copy(TESTS / "data" / "train.txt", tmp_path))
    words = [f"--config.run_root={tmp_path}", "--config.run_name=x"]
    words += [f"--config.prompts.train={prompts}"]
    words += ["--config.save_freq=1", "--config.eval_freq=100"]
    first = call("train.py", cache, *words, "--config.num_epochs=1")
    assert first.returncode == 0, first.stderr

    changed = [*words, "--config.train.clip_range=1e-2", "--config.seed=7", "--resume"]
    prompts.write_text(prompts.read_text() + "a new one\n")
    done = call("train.py", cache, *changed, "--config.num_epochs=2")
    assert done.returncode == 1
    seed, clip_range, train = done.stderr.splitlines()[1:]
    assert seed == "  config.seed: was 0, is now 7"
    assert clip_range == "  config.train.clip_range: was 0.001, is now 0.01"
    assert train.startswith(f"  config.prompts.train: {str(prompts)!r} has other content; its dig")
    done = call("train.py", cache, *changed, "--config.num_epochs=2", "--allow_config_change")
    assert done.returncode == 0, done.stderr
    assert "config.train.clip_range: was 0.001, is now 0.01" in done.stdout

    # The change has been saved, and files may be elsewhere.
    changed += [f"--config.prompts.train={shutil.copy(prompts, tmp_path / 'copy.txt')}"]
    done = call("train.py", cache, *changed, "--config.num_epochs=3")
    assert done.returncode == 0, done.stderr

    more = ["--allow_config_change", "--config.train.lora_rank=2", "--config.num_epochs=4"]
    done = call("train.py", cache, *changed, *more)
    assert done.returncode == 1
    assert "checkpoint 3 in " in done.stderr
    assert "does not fit the weights and the optimizer of this config" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("config", [GOLDEN, f"{ROOT}/configs/rewriter_grpo.py"])
def test_a_run_in_host_memory_goes_on_without_it(cache, tmp_path, config):
    """And leaves what a run leaves that never had anything there, to the last bit."""
    words = [f"--config.run_root={tmp_path}", "--config.eval_freq=1"]
    words += ["--config.evaluate.after_training=False", "--auto_resume"]
    offload = ["--config.pretrained.offload", "--config.train.offload"]
    for name, *more in (
        ("whole", "--config.num_epochs=4"),
        ("parts", "--config.num_epochs=2", *offload),
        ("parts", "--config.num_epochs=4"),
    ):
        run = (*words, f"--config.run_name={name}", *more)
        done = call("train.py", cache, *run, config=config, JAX_LOG_COMPILES="1")
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("Compiling jit(update_call)") == 1
    assert "config.train.offload: was True, is now False" in done.stdout
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.slow
def test_a_run_resumes_on_another_mesh(cache, tmp_path):
    """From 8 devices with split weights to 4 that only split images, and to one."""
    words = [f"--config.run_root={tmp_path}", "--config.sample.branches=1"]
    words += ["--config.sample.test_batch_size=8"]
    words += ["--config.eval_freq=100", "--config.save_freq=1"]
    whole = call("train.py", cache, *words, "--config.run_name=whole", "--config.num_epochs=4")
    assert whole.returncode == 0, whole.stderr

    words += ["--config.run_name=moved", "--auto_resume"]
    for epochs, devices, fsdp in ((2, 8, 4), (3, 4, 1), (4, 1, 1)):
        more = [f"--config.num_epochs={epochs}", f"--config.mesh.fsdp={fsdp}"]
        done = call("train.py", cache, *words, *more, JAX_NUM_CPU_DEVICES=str(devices))
        assert done.returncode == 0, done.stderr
        assert ("config.mesh.fsdp: was 4, is now 1" in done.stdout) == (devices == 4)
    assert_close(tmp_path / "whole", tmp_path / "moved")
