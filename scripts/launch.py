"""Several processes of one program on this machine, as a cluster would start them on several.

    python scripts/launch.py --processes 2 scripts/train.py --config configs/flux_grpo.py --config.run_name=two

On a cluster its own launcher does this (docs/clusters.md). What process 0 prints is shown as it is, the others' lines
carry their number. When one process ends badly, its number is told and the others are stopped.
"""

import argparse
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence


def start(words: Sequence[str], processes: int) -> list[subprocess.Popen]:
    """The program's processes, which meet on a free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for i in range(processes):
        flags = [
            f"--coordinator=127.0.0.1:{port}",
            f"--num_processes={processes}",
            f"--process_id={i}",
        ]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} if i else {}
        running.append(subprocess.Popen([sys.executable, *words, *flags], **pipes))
        if i:
            threading.Thread(target=_show, args=(i, running[i]), daemon=True).start()
    return running


def _show(number: int, process: subprocess.Popen) -> None:
    for line in process.stdout:
        print(f"[{number}] {line}", end="", flush=True)


def wait(running: Sequence[subprocess.Popen]) -> int:
    """Wait for all; returns the exit status. The first that ends badly is named, and ends the others."""
    while True:
        codes = [process.poll() for process in running]
        if bad := [(i, code) for i, code in enumerate(codes) if code]:
            number, code = bad[0]
            how = (
                f"was killed by {signal.Signals(-code).name}"
                if code < 0
                else f"ended with status {code}"
            )
            print(
                f"error: process {number} of {len(running)} {how}; the others are stopped",
                file=sys.stderr,
            )
            for process in running:
                process.kill()
            return code if code > 0 else 128 - code
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument(
        "program", nargs=argparse.REMAINDER, help="a Python program and its arguments"
    )
    args = parser.parse_args()
    if args.processes < 1 or not args.program:
        parser.error("name the number of processes, 1 or more, and a program")
    running = start(args.program, args.processes)
    signal.signal(signal.SIGTERM, lambda *_: [process.terminate() for process in running])
    try:
        sys.exit(wait(running))
    except KeyboardInterrupt:  # the terminal has sent it to all of them
        sys.exit(max(process.wait() for process in running))


if __name__ == "__main__":
    main()
