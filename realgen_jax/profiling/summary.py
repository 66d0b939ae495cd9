"""Where an epoch's time goes, from a trace that `--config.profile.steps=3` has train.py write; no viewer is needed.

    python scripts/profile_summary.py runs/NAME                  the last of the run's traces
    python scripts/profile_summary.py runs/NAME/profile/step_3   this one; or a single .xplane.pb file

Three tables, each of which adds up to the wall-clock time of the epoch: what the program waited for, which scope of the
compiled programs the devices were in, which operations they ran. An operation has the time in which nothing that it
contains, or that began after it, runs on the same device.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

from realgen_jax.profiling.trace_reading import (
    PHASES,
    SCOPES,
    Operation,
    Trace,
    read_trace,
    self_times,
)

HOW = "--config.profile.steps=3 has train.py write one"
NO_SCOPES = """Few operations have a scope. Programs that older code has left in the compilation cache have none: trace
once more with --config.compilation_cache= (empty). Nor may kernels of a CUDA graph: trace with
XLA_FLAGS=--xla_gpu_enable_command_buffer= to have them one by one."""


def trace_files(path: Path) -> list[Path]:
    """The traces, one a process, of a run's last traced step, of a step's folder, or of a single file."""
    if path.is_file():
        return [path]
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; expected a run's folder, a step's, or an .xplane.pb file"
        )
    steps = [(int(f.name.removeprefix("step_")), f) for f in path.glob("profile/step_*")]
    folder = max(steps)[1] if steps else path
    if not (files := sorted(folder.rglob("*.xplane.pb"))):
        raise FileNotFoundError(f"{folder} holds no trace, an .xplane.pb file; {HOW}")
    return files


def row(name: str, ns: float, whole: float, text: str = "") -> str:
    return f"  {name:<30}{ns / 1e6:>10.1f}{100 * ns / whole:>7.1f}{text}".rstrip()


def phase_rows(traces: list[Trace], wall: float) -> list[str]:
    ns = {name: sum(trace.phases.get(name, 0) for trace in traces) / len(traces) for name in PHASES}
    rows = [row(name, value, wall) for name, value in ns.items()]
    return [*rows, row("other", wall - sum(ns.values()), wall), row("wall-clock", wall, wall)]


def scope_rows(times: Counter[Operation], wall: float, depth: int) -> list[str]:
    """A row for every scope down to `depth`, those inside it below; then what has none, and what is left."""
    ns = Counter()
    for (_, scope, _), value in times.items():
        for level in range(1, min(len(scope), depth) + 1):
            ns[scope[:level]] += value
    rows = [
        row("  " * (len(scope) - 1) + scope[-1], ns[scope], wall)
        for scope in sorted(ns, key=lambda scope: [SCOPES.index(name) for name in scope])
    ]
    busy, bare = (
        sum(times.values()),
        sum(value for operation, value in times.items() if not operation.scope),
    )
    return [
        *rows,
        row("no scope", bare, wall),
        row("idle", wall - busy, wall),
        row("wall-clock", wall, wall),
    ]


def operation_rows(
    times: Counter[Operation], counts: Counter[Operation], wall: float, top: int
) -> list[str]:
    rows, shown = [], times.most_common(top)
    for operation, ns in shown:
        name, path = operation.name, "/".join((*operation.scope, operation.does))
        name, path = (
            name if len(name) < 31 else name[:27] + "...",
            path if len(path) < 42 else "..." + path[-38:],
        )
        rows.append(row(name, ns, wall, f"{counts[operation]:>7.0f}  {path}"))
    rest = sum(times.values()) - sum(ns for _, ns in shown)
    count = sum(counts.values()) - sum(counts[operation] for operation, _ in shown)
    rows.append(row(f"{len(times) - len(shown)} others", rest, wall, f"{count:>7.0f}"))
    return [*rows, row("idle", wall - sum(times.values()), wall), row("wall-clock", wall, wall)]


def summary(files: list[Path], top: int, depth: int) -> list[str]:
    """The lines to print: means over processes and devices."""
    traces = [read_trace(file) for file in files]
    devices = [(trace, events) for trace in traces for events in trace.devices.values()]
    wall = sum(trace.end - trace.start for trace in traces) / len(traces)
    times, counts = Counter(), Counter()
    for trace, events in devices:
        for operation, ns in self_times(events, trace.start, trace.end).items():
            times[operation] += ns / len(devices)
        for event in events:
            counts[event.operation] += 1 / len(devices)
    names = ", ".join(sorted({name for trace in traces for name in trace.devices}))
    mean = f": means of {len(devices)} devices" if len(devices) > 1 else ""
    lines = [f"{files[0]}{f' and {len(files) - 1} more' if files[1:] else ''}", f"{names}{mean}"]
    head = f"{'ms':>10}{'%':>7}"
    if any(trace.phases for trace in traces):
        lines += ["", f"  {'phase of the program':<30}{head}", *phase_rows(traces, wall)]
    lines += ["", f"  {'scope on the device':<30}{head}", *scope_rows(times, wall, depth)]
    lines += ["", f"  {'operation':<30}{head}{'count':>7}  scope and what it does"]
    lines += operation_rows(times, counts, wall, top)
    if sum(ns for operation, ns in times.items() if operation.scope) < 0.5 * sum(times.values()):
        lines += ["", *NO_SCOPES.splitlines()]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "trace", type=Path, help="a run's folder, a step's (profile/step_3), or an .xplane.pb file"
    )
    parser.add_argument("--top", type=int, default=20, help="how many operations to show")
    parser.add_argument("--depth", type=int, default=2, help="how many levels of scopes to show")
    words = parser.parse_args()
    try:
        print("\n".join(summary(trace_files(words.trace), words.top, words.depth)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
