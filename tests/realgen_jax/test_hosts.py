"""Several processes as one program, each with devices of its own; on this machine they stand for hosts."""

import os
import re
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
from realgen_jax.hosts import connect, fetch, own_rows, put, sum_over_processes
from realgen_jax.sharding import batch_sharding, make_mesh
from tests.helpers.running import (
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
    with pytest.raises(ValueError, match="--num_processes, --process_id missing"):
        connect("127.0.0.1:1", 0, -1, detect=False)
    with pytest.raises(ValueError, match="--coordinator missing"):
        connect("", 2, 0, detect=True)
    with pytest.raises(
        ValueError, match=r"the processes did not meet .* elsewhere give --coordinator=HOST:PORT"
    ):
        connect("", 0, -1, detect=True)  # no cluster here
    connect("", 0, -1, detect=False)  # a single process
    assert not jax.distributed.is_initialized()


def test_one_process_has_every_row():
    mesh = make_mesh(2, 2, 2, jax.devices())
    host = np.arange(24.0, dtype=np.float32).reshape(8, 3)
    array = put(host, batch_sharding(mesh))
    assert array.sharding.spec == P(("data", "fsdp"))
    np.testing.assert_array_equal(
        own_rows(array), np.arange(8)
    )  # once, though `tensor` holds everything twice
    np.testing.assert_array_equal(fetch(array), host)
    assert sum_over_processes(host) is host


def slurm(job, process, processes=2):
    """What srun sets, here for processes on one machine."""
    where = {
        "SLURM_JOB_ID": job,
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_STEP_NUM_NODES": processes,
    }
    return {
        k: str(v)
        for k, v in {
            **where,
            "SLURM_NTASKS": processes,
            "SLURM_PROCID": process,
            "SLURM_LOCALID": 0,
        }.items()
    }


def free_job():
    """A job number whose port (jax's Slurm detection derives it) is free."""
    first = 65535 - 2**12 + 1
    for job in range(os.getpid() % 2**12, 2**12):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", first + job)):
                return job
    raise AssertionError("no port is free")


@pytest.mark.parametrize(
    "killed", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["whole", "killed"]
)
def test_two_processes_do_what_one_does(cache, tmp_path, killed):
    """They end where a single process with a single device does. Or, found by Slurm's variables, one is killed in the
    middle of an epoch, the other notices, and the launcher starts them again.
    """
    pytest.importorskip("torch")
    words = [
        f"--config.run_root={tmp_path}",
        "--config.num_epochs=3",
        "--config.save_freq=1",
        "--config.eval_freq=3",
    ]
    done = call("train.py", cache, *words, "--config.run_name=one")
    assert done.returncode == 0, done.stderr
    words += ["--config.run_name=two", "--auto_resume"]
    folder, environment = tmp_path / "two", {"JAX_NUM_CPU_DEVICES": "2"}
    if killed:
        kill_one_of_two(cache, words, folder, environment)
    program = command("train.py", cache, *words)
    launch = [sys.executable, str(ROOT / "scripts" / "launch.py"), "--processes", "2", *program[1:]]
    done = subprocess.run(
        launch,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **QUICK, **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if killed:
        assert re.search("resumed from epoch [12], with another config", done.stdout), done.stdout
    assert_close(tmp_path / "one", folder)


def kill_one_of_two(cache, words, folder, environment):
    """Leaves what a run of two processes has saved after one or two epochs."""
    job, tmp_path = free_job(), folder.parent
    outputs = [tmp_path / f"{i}.txt" for i in range(2)]
    program = command("train.py", cache, *words, "--distributed", "--config.num_epochs=100000")
    processes = [
        begin(program, output, **environment, **slurm(job, i)) for i, output in enumerate(outputs)
    ]
    until(lambda: epochs_done(folder) >= 2, processes[0], outputs[0])
    processes[1].kill()
    start = time.monotonic()
    assert processes[0].wait(60) != 0
    assert time.monotonic() - start < 60
    named = r"stopped sending heartbeats\):\s*1\b|Task 1 heartbeat timeout"  # in jax's own words
    assert re.search(named, outputs[0].read_text()), outputs[0].read_text()
    epoch, _ = newest_good(folder / "checkpoints")
    while (
        newest_good(folder / "checkpoints")[0] > 2
    ):  # the kill came late: go on from where three epochs lie ahead
        epoch = newest_good(folder / "checkpoints")[0]
        subprocess.run(["rm", "-r", folder / "checkpoints" / str(epoch)], check=True)


@pytest.mark.slow
def test_two_processes_of_four_devices_are_one_of_eight(cache, tmp_path):
    pytest.importorskip("torch")
    words = [
        f"--config.run_root={tmp_path}",
        "--config.num_epochs=2",
        "--config.sample.train_batch_size=16",
    ]
    words += ["--config.sample.test_batch_size=8"]
    done = call("train.py", cache, *words, "--config.run_name=one", JAX_NUM_CPU_DEVICES="8")
    assert done.returncode == 0, done.stderr
    program = command("train.py", cache, *words, "--config.run_name=two")
    launch = [sys.executable, str(ROOT / "scripts" / "launch.py"), "--processes", "2", *program[1:]]
    done = subprocess.run(
        launch,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **QUICK, "JAX_NUM_CPU_DEVICES": "4"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert_close(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_sigterm_to_one_process_has_all_of_them_save(cache, tmp_path):
    pytest.importorskip("torch")
    words = [f"--config.run_root={tmp_path}", "--config.run_name=x", "--config.num_epochs=100000"]
    words += ["--config.save_freq=100000", "--config.eval_freq=100000"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = [f"--coordinator=127.0.0.1:{free.getsockname()[1]}", "--num_processes=2"]
    outputs = [tmp_path / f"{i}.txt" for i in range(2)]
    processes = [
        begin(
            command("train.py", cache, *words, *meet, f"--process_id={i}"),
            output,
            JAX_NUM_CPU_DEVICES="2",
        )
        for i, output in enumerate(outputs)
    ]
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
        "me = [word for word in sys.argv if word.startswith('--process_id=')][0][-1]\n"
        "os.write(1, f'hello from {me}\\n'.encode())\n"  # at once: print may write its pieces one by one
        f"if me == '1': {end}\n"
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


@pytest.mark.slow
def test_rewards_that_learn_are_the_same_in_every_process(cache, tmp_path):
    """Two processes that each show their detector half of the pictures; the checkpoint has what either has learnt."""
    pytest.importorskip("torch")
    config = ROOT / "tests" / "adversarial_config.py"
    words = [
        f"--config.run_root={tmp_path}",
        "--config.run_name=two",
        "--config.save_freq=1",
        "--config.eval_freq=9",
    ]
    program = [sys.executable, str(ROOT / "scripts" / "launch.py"), "--processes", "2"]
    environment = {**os.environ, **QUICK, "JAX_NUM_CPU_DEVICES": "2"}
    for epochs in (2, 3):  # the second call goes on
        more = [f"--config.num_epochs={epochs}", "--auto_resume"]
        run = [*program, *command("train.py", cache, *words, *more, config=config)[1:]]
        done = subprocess.run(run, capture_output=True, text=True, timeout=200, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
    first, second = (
        load_file(
            tmp_path
            / "two"
            / "checkpoints"
            / "3"
            / "rewards"
            / f"embedded_detector-{i}.safetensors"
        )
        for i in (0, 1)
    )
    learnt = [key for key in first if key.split("/")[0] in ("model", "average", "optimizer")]
    assert len(learnt) > 20
    for key in learnt:
        np.testing.assert_array_equal(first[key], second[key])
    assert (first["history/generated"] != second["history/generated"]).any()
