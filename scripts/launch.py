"""Start several processes of a program on this machine, as a cluster would on several machines.

    python scripts/launch.py --processes 2 scripts/train.py --config configs/flux_grpo.py \\
        --config.run_name=two

On a cluster, use the cluster's own launcher (docs/clusters.md). The output of process 0 is passed
on as it is, and that of the others with their number in front. If a process fails, its number is
printed and the others are stopped.
"""

from realgen_jax import process

process.begin(__name__)  # before the imports that take seconds

import argparse
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence


def start(program: Sequence[str], processes: int, running: list[subprocess.Popen]) -> None:
    """Start the processes and add them to `running`. They meet at a free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    for number in range(processes):
        flags = [
            f"--coordinator=127.0.0.1:{port}",
            f"--num_processes={processes}",
            f"--process_id={number}",
        ]
        command = [sys.executable, *program, *flags]
        # In process groups of their own, they receive the terminal's Ctrl-C once, from us.
        if number == 0:
            child = subprocess.Popen(command, process_group=0)
        else:
            child = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                process_group=0,
            )
            threading.Thread(target=pass_on, args=(number, child), daemon=True).start()
        running.append(child)


def pass_on(number: int, child: subprocess.Popen) -> None:
    """Print a process's output with its number in front of each line."""
    for line in child.stdout:
        print(f"[{number}] {line}", end="")


def wait(running: Sequence[subprocess.Popen], asked: threading.Event) -> int:
    """Wait for all processes and return the exit status. If one fails, stop the others.

    asked: set once a signal has asked the processes to end; then each ends by itself.
    """
    while True:
        codes = [child.poll() for child in running]
        failed = [number for number, code in enumerate(codes) if code]
        if failed and not asked.is_set():
            return stop(running, failed[0], codes[failed[0]])
        if None not in codes:
            return max(map(exit_status, codes))
        time.sleep(0.1)


def exit_status(code: int) -> int:
    """Return what a shell would: 128 plus the number of the signal that ended the process."""
    return code if code >= 0 else 128 - code


def stop(running: Sequence[subprocess.Popen], number: int, code: int) -> int:
    """Report the failed process, kill the others and return the exit status."""
    how = f"ended with status {code}"
    if code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
    print(
        f"error: process {number} of {len(running)} {how}; the others are stopped",
        file=sys.stderr,
    )
    for child in running:
        child.kill()
    return exit_status(code)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--processes", type=int, required=True, help="number of processes, 1 or more"
    )
    parser.add_argument(
        "program", nargs=argparse.REMAINDER, help="a Python program and its arguments"
    )
    args = parser.parse_args()
    if args.processes < 1:
        parser.error(f"--processes is {args.processes}; expected 1 or more")
    if not args.program:
        parser.error("no program given; expected a Python program and its arguments")

    # The processes handle signals themselves: the terminal's, and a cluster's SIGTERM.
    running: list[subprocess.Popen] = []
    asked = threading.Event()

    def pass_on_signal(number: int) -> None:
        asked.set()
        for child in running:
            # Without an output, they end as after a hang-up.
            child.send_signal(signal.SIGHUP if number == signal.SIGPIPE else number)

    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGTERM):
        process.on_signal(number, pass_on_signal)
    start(args.program, args.processes, running)
    sys.exit(wait(running, asked))


if __name__ == "__main__":
    main()
