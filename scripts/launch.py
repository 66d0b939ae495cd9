"""Start several processes of a program on this machine, as a cluster would on several machines.

    python scripts/launch.py --processes 2 scripts/train.py --config configs/flux_grpo.py \\
        --config.run_name=two

On a cluster, use the cluster's own launcher (docs/clusters.md). The output of process 0 is passed
on as it is, and that of the others with their number in front. If a process fails, its number is
printed and the others are stopped.
"""

import argparse
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence


def start(program: Sequence[str], processes: int) -> list[subprocess.Popen]:
    """Start the processes. They meet at a free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    running = []
    for number in range(processes):
        flags = [
            f"--coordinator=127.0.0.1:{port}",
            f"--num_processes={processes}",
            f"--process_id={number}",
        ]
        command = [sys.executable, *program, *flags]
        if number == 0:
            process = subprocess.Popen(command)
        else:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            threading.Thread(target=pass_on, args=(number, process), daemon=True).start()
        running.append(process)
    return running


def pass_on(number: int, process: subprocess.Popen) -> None:
    """Print a process's output with its number in front of each line."""
    for line in process.stdout:
        print(f"[{number}] {line}", end="", flush=True)


def wait(running: Sequence[subprocess.Popen]) -> int:
    """Wait for all processes and return the exit status. If one fails, stop the others."""
    while True:
        codes = [process.poll() for process in running]
        for number, code in enumerate(codes):
            if code:
                return stop(running, number, code)
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.1)


def stop(running: Sequence[subprocess.Popen], number: int, code: int) -> int:
    """Report the failed process, kill the others and return the exit status."""
    how = f"ended with status {code}"
    status = code
    if code < 0:  # killed by a signal; shells return 128 plus its number
        how = f"was killed by {signal.Signals(-code).name}"
        status = 128 - code
    print(
        f"error: process {number} of {len(running)} {how}; the others are stopped",
        file=sys.stderr,
    )
    for process in running:
        process.kill()
    return status


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

    running = start(args.program, args.processes)

    def terminate(*_) -> None:
        for process in running:
            process.terminate()

    # A cluster sends SIGTERM before it takes a machine away; the processes handle it.
    signal.signal(signal.SIGTERM, terminate)
    try:
        sys.exit(wait(running))
    except KeyboardInterrupt:  # the terminal sends it to every process
        sys.exit(max(process.wait() for process in running))


if __name__ == "__main__":
    main()
