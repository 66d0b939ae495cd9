"""Several processes that run as one program. Each has devices of its own, like a host."""

import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from realgen_jax.checkpoint import newest_good
from realgen_jax.hosts import (
    connect,
    fetch,
    local_rows,
    put,
    start_devices,
    sum_over_processes,
)
from realgen_jax.sharding import batch_sharding, make_mesh
from tests.helpers.faults import dead_proxy
from tests.helpers.running import (
    ADVERSARIAL,
    QUICK,
    ROOT,
    assert_close,
    begin,
    call,
    command,
    epochs_done,
    until,
)


def test_half_an_address_is_an_error():
    message = "--num_processes, --process_id missing: set all of --coordinator, --num_processes,"
    with pytest.raises(ValueError, match=message):
        connect("127.0.0.1:1", 0, -1, detect=False)
    with pytest.raises(ValueError, match="--coordinator missing"):
        connect("", 2, 0, detect=True)

    # There is no cluster here.
    message = r"the processes could not connect .* elsewhere set --coordinator=HOST:PORT"
    with pytest.raises(ValueError, match=message):
        connect("", 0, -1, detect=True)
    connect("", 0, -1, detect=False)  # a single process
    assert not jax.distributed.is_initialized()


def test_one_process_has_every_row():
    mesh = make_mesh(2, 2, 2, jax.devices())
    host = np.arange(24.0, dtype=np.float32).reshape(8, 3)
    array = put(host, batch_sharding(mesh))
    assert array.sharding.spec == P(("data", "fsdp"))
    # Each row once, though the two halves of `tensor` both hold it
    np.testing.assert_array_equal(local_rows(array), np.arange(8))
    np.testing.assert_array_equal(fetch(array), host)
    assert sum_over_processes(host) is host


def slurm(job, process, processes=2):
    """The variables that srun sets, here for processes on one machine."""
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_STEP_NUM_NODES": str(processes),
        "SLURM_NTASKS": str(processes),
        "SLURM_PROCID": str(process),
        "SLURM_LOCALID": "0",
    }


def free_job():
    """A job number whose port (jax's Slurm detection derives it) is free."""
    first = 65535 - 2**12 + 1
    for job in range(os.getpid() % 2**12, 2**12):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", first + job)):
                return job
    raise AssertionError("no port is free")


def launch_two(program, devices):
    """Run a command of train.py as two processes with so many devices each, to its end."""
    launcher = [sys.executable, str(ROOT / "scripts" / "launch.py"), "--processes", "2"]
    return subprocess.run(
        [*launcher, *program[1:]],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **QUICK, "JAX_NUM_CPU_DEVICES": str(devices)},
    )


@pytest.mark.slow
def test_two_processes_do_what_one_does(whole, cache, tmp_path):
    """Two processes with two devices each end where one process with one device does.

    They reach each other without the environment's proxy.
    """
    program = command("train.py", cache, f"--config.run_root={tmp_path}", "--config.run_name=two")
    with dead_proxy():
        done = launch_two(program, devices=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "proxy" not in done.stdout + done.stderr
    assert_close(whole[0], tmp_path / "two")


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_both_resume(whole, cache, tmp_path):
    """Slurm's variables connect them. One is killed in the middle of an epoch, the other notices,
    and the launcher starts them again.
    """
    folder = tmp_path / "two"
    words = [f"--config.run_root={tmp_path}", "--config.run_name=two", "--auto_resume"]
    words += ["--config.save_freq=1"]
    kill_one_of_two(cache, words, folder)
    done = launch_two(command("train.py", cache, *words), devices=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search("resumed from epoch [12], with another config", done.stdout), done.stdout
    assert_close(whole[0], folder)


def kill_one_of_two(cache, words, folder):
    """Leave what a run of two processes has saved after one or two epochs."""
    job = free_job()
    outputs = [folder.parent / f"{i}.txt" for i in range(2)]
    program = command("train.py", cache, *words, "--distributed", "--config.num_epochs=100000")
    processes = []
    for i, output in enumerate(outputs):
        processes.append(begin(program, output, JAX_NUM_CPU_DEVICES="2", **slurm(job, i)))
    until(lambda: epochs_done(folder) >= 2, processes[0], outputs[0])
    processes[1].kill()

    start = time.monotonic()
    assert processes[0].wait(60) != 0
    assert time.monotonic() - start < 60
    named = r"stopped sending heartbeats\):\s*1\b|Task 1 heartbeat timeout"  # JAX's own messages
    assert re.search(named, outputs[0].read_text()), outputs[0].read_text()

    # If the kill came late, go back to where epochs still lie ahead.
    while newest_good(folder / "checkpoints")[0] > 2:
        epoch, _ = newest_good(folder / "checkpoints")
        shutil.rmtree(folder / "checkpoints" / str(epoch))


@pytest.mark.slow
def test_two_processes_of_four_devices_are_one_of_eight(cache, tmp_path):
    pytest.importorskip("torch")
    words = [f"--config.run_root={tmp_path}", "--config.num_epochs=2"]
    words += ["--config.sample.train_batch_size=16", "--config.sample.test_batch_size=8"]
    done = call("train.py", cache, *words, "--config.run_name=one", JAX_NUM_CPU_DEVICES="8")
    assert done.returncode == 0, done.stderr
    program = command("train.py", cache, *words, "--config.run_name=two")
    done = launch_two(program, devices=4)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_close(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_sigterm_to_one_process_has_all_of_them_save(cache, tmp_path):
    pytest.importorskip("torch")
    words = [f"--config.run_root={tmp_path}", "--config.run_name=x", "--config.num_epochs=100000"]
    words += ["--config.save_freq=100000", "--config.eval_freq=100000"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        words += [f"--coordinator=127.0.0.1:{free.getsockname()[1]}", "--num_processes=2"]

    outputs = [tmp_path / f"{i}.txt" for i in range(2)]
    processes = []
    for i, output in enumerate(outputs):
        program = command("train.py", cache, *words, f"--process_id={i}")
        processes.append(begin(program, output, JAX_NUM_CPU_DEVICES="2"))
    until(lambda: epochs_done(tmp_path / "x") >= 2, processes[0], outputs[0])
    processes[1].send_signal(signal.SIGTERM)
    assert [process.wait(30) for process in processes] == [0, 0], outputs[0].read_text()
    saved = re.search(r"stopped by SIGTERM, saved after (\d+) epochs", outputs[0].read_text())
    assert newest_good(tmp_path / "x" / "checkpoints") == (int(saved[1]), [])


@pytest.mark.parametrize(
    ("end", "message", "status"),
    [
        ("sys.exit(3)", "process 1 of 2 ended with status 3", 3),
        ("os.kill(os.getpid(), 9)", "process 1 of 2 was killed by SIGKILL", 137),
    ],
)
def test_the_launcher_names_the_process_that_ended(tmp_path, end, message, status):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "greeted = Path(__file__).with_name('greeted')\n"
        "me = [word for word in sys.argv if word.startswith('--process_id=')][0][-1]\n"
        "os.write(1, f'hello from {me}\\n'.encode())\n"  # in one piece, unlike print
        "if me == '1':\n"
        "    while not greeted.exists(): time.sleep(0.01)\n"
        f"    {end}\n"
        "greeted.touch()\n"
        "time.sleep(100)"
    )
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "launch.py", "--processes", "2", program],
        capture_output=True,
        text=True,
    )
    assert time.monotonic() - start < 60  # the other is not waited for
    assert (done.returncode, done.stderr) == (status, f"error: {message}; the others are stopped\n")
    assert "hello from 0\n" in done.stdout
    assert "[1] hello from 1\n" in done.stdout


def test_ctrl_c_reaches_every_process_of_the_launcher_once(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "from realgen_jax import process\n"
        "process.begin(__name__)\n"
        "import os, time\n"
        "def hear(number):\n"
        "    os.write(1, b'heard\\n')\n"
        "    time.sleep(0.5)\n"  # long enough to hear a second one
        "    os._exit(3)\n"
        "process.on_signal(2, hear)\n"
        "print('ready')\n"
        "time.sleep(100)"
    )
    output = tmp_path / "output.txt"
    launcher = [sys.executable, ROOT / "scripts" / "launch.py", "--processes", "2", program]
    process = begin(launcher, output)
    until(lambda: output.read_text().count("ready") == 2, process, output)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 3  # the processes' own status, and no error of the launcher's
    assert sorted(output.read_text().splitlines()) == ["[1] heard", "[1] ready", "heard", "ready"]


@pytest.mark.parametrize(
    ("error", "plugin", "reason"),
    [
        (AssertionError(), "", "no such device"),
        (RuntimeError("Unable to initialize backend 'tpu'\nat ..."), "", "Unable to .* 'tpu'"),
        (AssertionError(), "Unable to load cuDNN", "Unable to load cuDNN"),
        (None, "Unable to load cuDNN", ""),
    ],
)
def test_devices_that_this_machine_lacks_are_one_line(monkeypatch, caplog, error, plugin, reason):
    """JAX logs why it cannot use a plugin with a traceback; it is told without one."""

    def devices():
        if plugin:
            try:
                raise RuntimeError(plugin)
            except RuntimeError:
                logging.getLogger("jax._src.xla_bridge").exception("plugin")
        if error:
            raise error
        return ["device"]

    monkeypatch.setattr(jax, "devices", devices)
    if error:
        message = rf"^JAX cannot start, JAX_PLATFORMS=cpu: {reason} \(unset the variable .*\)$"
        with pytest.raises(ValueError, match=message):
            start_devices()
        assert not caplog.records
    else:
        assert start_devices() == ["device"]
        (record,) = caplog.records
        assert record.getMessage() == f"JAX goes on without a kind of device: {plugin}"


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_a_platform_that_is_absent_is_told_before_rewards_are_loaded(cache, tmp_path, script):
    pytest.importorskip("torch")
    done = call(script, cache, f"--config.run_root={tmp_path}", JAX_PLATFORMS="cuda")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: JAX cannot start, JAX_PLATFORMS=cuda: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_rewards_that_learn_are_the_same_in_every_process(cache, tmp_path):
    """Two processes show their detector half of the pictures each; the checkpoint has both."""
    pytest.importorskip("torch")
    words = [f"--config.run_root={tmp_path}", "--config.run_name=two", "--auto_resume"]
    words += ["--config.save_freq=1", "--config.eval_freq=9"]
    for epochs in (2, 3):  # the second call resumes
        more = [*words, f"--config.num_epochs={epochs}"]
        done = launch_two(command("train.py", cache, *more, config=ADVERSARIAL), devices=2)
        assert done.returncode == 0, done.stdout + done.stderr

    rewards = tmp_path / "two" / "checkpoints" / "3" / "rewards"
    first = load_file(rewards / "embedded_detector-0.safetensors")
    second = load_file(rewards / "embedded_detector-1.safetensors")
    learnt = [key for key in first if key.split("/")[0] in ("model", "average", "optimizer")]
    assert len(learnt) > 20
    for key in learnt:
        np.testing.assert_array_equal(first[key], second[key])
    assert (first["history/generated"] != second["history/generated"]).any()
