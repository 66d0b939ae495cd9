"""How programs hear signals, print and end. Each test runs a small program in a process."""

import ast
import os
import signal
import subprocess
import sys
import time

import pytest

import realgen_jax.process
from tests.helpers.faults import closed_pipe, send_signal
from tests.helpers.goldens import ROOT
from tests.helpers.running import begin, until

HEAD = """
from realgen_jax import process
process.begin(__name__)
import os, subprocess, sys, threading, time
"""


@pytest.fixture
def start(tmp_path):
    """Start a program, whose output goes to a file."""
    output = tmp_path / "output.txt"
    processes = []

    def start(program, *shell):
        processes.append(begin([*shell, sys.executable, "-c", HEAD + program], output))
        return processes[-1], output

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    "busy",
    [
        "time.sleep(60)",
        "while True: pass",
        "lock = threading.Lock(); lock.acquire(); lock.acquire()",
        "threading.Thread(target=time.sleep, args=(60,)).start()",
        "while True:\n    try: time.sleep(60)\n    except BaseException: pass",
    ],
    ids=["asleep", "computing", "waiting", "in a thread", "swallowing every exception"],
)
def test_ctrl_c_ends_a_program_whatever_it_does(start, busy):
    process, output = start(f"print('ready')\n{busy}")
    send_signal(signal.SIGINT, process, output, "ready")
    begun = time.monotonic()
    assert process.wait(20) == 130
    assert time.monotonic() - begun < 2
    assert output.read_text() == "ready\nstopped\n"


def test_what_is_kept_is_told_and_children_and_leftovers_go(start, tmp_path):
    program = (
        "process.when_stopped(lambda: 'stopped; to go on: again')\n"
        f"with process.cleaned_up(lambda: open({str(tmp_path / 'cleaned')!r}, 'w')):\n"
        "    child = 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'\n"
        "    process.run_child([sys.executable, '-c', child])\n"
    )
    process, output = start(program)
    send_signal(signal.SIGINT, process, output, "\n")
    assert process.wait(20) == 130
    child, message = output.read_text().splitlines()
    assert message == "stopped; to go on: again"
    assert (tmp_path / "cleaned").exists()
    for _ in range(200):  # nobody waits for the child, so that it may remain as a zombie
        if not os.path.exists(f"/proc/{child}") or "Z" in status_of(child):
            return
        time.sleep(0.02)
    raise AssertionError(f"the child {child} still runs")


def status_of(process):
    """The fields of a process in /proc, after its name."""
    with open(f"/proc/{process}/stat") as file:
        return file.read().rpartition(")")[2].split()


@pytest.mark.parametrize("ignored", [False, True], ids=["", "nohup"])
def test_a_hang_up_ends_a_program_unless_it_is_ignored(start, ignored):
    nohup = ["sh", "-c", "trap '' HUP; exec \"$@\"", "sh"]
    process, output = start("print('ready'); time.sleep(1); print('done')", *nohup[: 9 * ignored])
    send_signal(signal.SIGHUP, process, output, "ready")
    assert process.wait(20) == (0 if ignored else 129)
    assert output.read_text().splitlines() == ["ready", "done" if ignored else "stopped"]


def test_a_line_is_in_the_file_when_it_is_printed(start):
    process, output = start("print('one'); sys.stdout.write('tw'); time.sleep(60)")
    until(lambda: output.read_text() == "one\n", process, output, seconds=20)


@pytest.mark.parametrize(
    ("ignored", "status"), [(False, 141), (True, 0)], ids=["a pipe", "a pipe, under nohup"]
)
def test_an_output_that_nobody_reads_ends_a_program_in_silence(ignored, status):
    program = (
        "import signal\n"
        f"signal.signal(signal.SIGHUP, signal.SIG_IGN if {ignored} else signal.SIG_DFL)\n"
        f"{HEAD}"
        "print('one')\n"
        "print('two', 'without an end', end='')\n"
    )
    with closed_pipe() as pipe:
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=pipe, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (status, "")


def test_an_output_on_a_full_disk_is_told():
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", f"{HEAD}print('one')"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode != 0
    assert done.stderr == "error: standard output cannot be written: No space left on device\n"


@pytest.mark.parametrize(
    ("module", "extra"), [("torch.nn", "[torch]"), ("wandb", "[wandb]"), ("scipy", "")]
)
def test_a_missing_package_is_one_line_that_says_how_to_install_it(module, extra):
    package = module.partition(".")[0]
    program = f"{HEAD}sys.modules[{package!r}] = None\nimport {module}\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert line.startswith("error: ")
    assert line.endswith(f'; pip install "realgen_jax{extra}" installs it')
    assert package in line


def test_other_errors_keep_their_traceback():
    program = f"{HEAD}import no_such_module\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr.startswith("Traceback")


@pytest.mark.parametrize("script", sorted(file.name for file in ROOT.glob("scripts/*.py")))
def test_every_program_begins_like_that(script):
    """Before its other imports, which take seconds."""
    _, imported, call, *_ = ast.parse((ROOT / "scripts" / script).read_text()).body
    assert ast.unparse(imported) == "from realgen_jax import process"
    assert ast.unparse(call) == "process.begin(__name__)"


@pytest.mark.parametrize(
    ("packages", "library", "only"),
    [
        ({"jax_cuda13_plugin"}, None, True),
        ({"jax_cuda13_plugin", "nvidia", "nvidia.cudnn"}, None, False),
        ({"jax_cuda13_plugin", "nvidia"}, "libcudnn.so.9", False),
        (set(), None, False),
    ],
)
def test_the_plugin_without_cudnn_only_compiles(monkeypatch, packages, library, only):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name in packages or None)
    monkeypatch.setattr("ctypes.util.find_library", lambda name: library)
    assert realgen_jax.process._only_compiles_for_cuda() == only
