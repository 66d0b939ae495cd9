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

from trace_reading import PHASES, SCOPES, Scope, Trace, read_trace, self_times

HOW = "--config.profile.steps=3 has train.py write one"


def trace_files(path: Path) -> list[Path]:
    """The traces, one a process, of a run's last traced step, of a step's folder, or of a single file."""
    if path.is_file():
        return [path]
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a run's folder, a step's, or an .xplane.pb file")
    steps = [(int(f.name.removeprefix("step_")), f) for f in path.glob("profile/step_*")]
    folder = max(steps)[1] if steps else path
    if not (files := sorted(folder.rglob("*.xplane.pb"))):
        raise FileNotFoundError(f"{folder} holds no trace, an .xplane.pb file; {HOW}")
    return files


def row(name: str, ns: float, whole: float, text: str = "") -> str:
    return f"  {name:<36}{ns / 1e6:>12.1f}{100 * ns / whole:>8.1f}{text}".rstrip()


def phase_rows(traces: list[Trace], wall: float) -> list[str]:
    ns = {name: sum(trace.phases.get(name, 0) for trace in traces) / len(traces) for name in PHASES}
    rows = [row(name, value, wall) for name, value in ns.items()]
    return [*rows, row("other", wall - sum(ns.values()), wall), row("wall-clock", wall, wall)]


def scope_rows(times: Counter[tuple[str, Scope]], wall: float, depth: int) -> list[str]:
    """A row for every scope down to `depth`, those inside it below; then what has none, and what is left."""
    ns = Counter()
    for (_, scope), value in times.items():
        for level in range(1, min(len(scope), depth) + 1):
            ns[scope[:level]] += value
    rows = [
        row("  " * (len(scope) - 1) + scope[-1], ns[scope], wall)
        for scope in sorted(ns, key=lambda scope: [SCOPES.index(name) for name in scope])
    ]
    busy, bare = sum(times.values()), sum(value for (_, scope), value in times.items() if not scope)
    return [*rows, row("no scope", bare, wall), row("idle", wall - busy, wall), row("wall-clock", wall, wall)]


def operation_rows(
    times: Counter[tuple[str, Scope]], counts: Counter, devices: int, wall: float, top: int
) -> list[str]:
    rows = []
    for key, ns in times.most_common(top):
        name = key[0] if len(key[0]) <= 35 else key[0][:32] + "..."
        rows.append(row(name, ns, wall, f"{counts[key] / devices:>9.0f}  {'/'.join(key[1])}"))
    rest = sum(times.values()) - sum(ns for _, ns in times.most_common(top))
    others = sum(counts.values()) - sum(counts[key] for key, _ in times.most_common(top))
    rows.append(row(f"{max(0, len(times) - top)} others", rest, wall, f"{others / devices:>9.0f}"))
    return [*rows, row("idle", wall - sum(times.values()), wall), row("wall-clock", wall, wall)]


def summary(files: list[Path], top: int, depth: int) -> list[str]:
    """The lines to print: means over processes and devices."""
    traces = [read_trace(file) for file in files]
    devices = [(trace, events) for trace in traces for events in trace.devices.values()]
    wall = sum(trace.end - trace.start for trace in traces) / len(traces)
    times, counts = Counter(), Counter()
    for trace, events in devices:
        for key, ns in self_times(events, trace.start, trace.end).items():
            times[key] += ns / len(devices)
        counts.update((e.name, e.scope) for e in events)
    names = sorted({name.removeprefix("/device:") for trace in traces for name in trace.devices})
    mean = f", means of {len(devices)} devices" if len(devices) > 1 else ""
    lines = [f"{files[0]}{f' and {len(files) - 1} more' if files[1:] else ''}", f"on {', '.join(names)}{mean}"]
    head = f"{'ms':>12}{'%':>8}"
    if any(trace.phases for trace in traces):
        lines += ["", f"  {'the program was at':<36}{head}", *phase_rows(traces, wall)]
    lines += ["", f"  {'the device was in':<36}{head}", *scope_rows(times, wall, depth)]
    lines += ["", f"  {'operations':<36}{head}{'count':>9}  scope"]
    lines += operation_rows(times, counts, len(devices), wall, top)
    if sum(ns for (_, scope), ns in times.items() if scope) < 0.5 * sum(times.values()):
        lines += ["", "Few operations have a scope. A program from a compilation cache that older code has filled has"]
        lines += ["none: trace once more with --config.compilation_cache= (empty)."]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path, help="a run's folder, a step's (profile/step_3), or an .xplane.pb file")
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
