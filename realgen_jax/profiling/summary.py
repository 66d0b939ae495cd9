"""Summarise the trace of an epoch in three tables.

Each table adds up to the wall-clock time of the epoch. The tables show what the program waited for,
which scopes of the compiled programs the devices were in, and which operations they ran. The time
of an operation excludes operations that it contains, and operations that start later on the same
device.
"""

from collections import Counter
from pathlib import Path

from realgen_jax.profiling.programs import SCOPES, Operation
from realgen_jax.profiling.trace_reading import PHASES, Trace, read_trace, self_times

NO_SCOPES = (
    "Few operations have a scope. If the compilation cache holds programs of older code, trace",
    "again with --config.compilation_cache= (empty). Kernels of a CUDA graph may have no scope",
    "either: trace with XLA_FLAGS=--xla_gpu_enable_command_buffer= to list them one by one.",
)

NAME_WIDTH = 30
PATH_WIDTH = 41


def trace_files(path: Path) -> list[Path]:
    """Return the trace files, one for each process.

    `path` is a run's folder (its last traced epoch is used), an epoch's folder or a single file.
    Raises FileNotFoundError if there is no trace.
    """
    if path.is_file():
        return [path]
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; expected a run's folder, an epoch's folder or an .xplane.pb "
            "file"
        )

    folder = path
    steps = {int(step.name.removeprefix("step_")): step for step in path.glob("profile/step_*")}
    if steps:
        folder = steps[max(steps)]

    files = sorted(folder.rglob("*.xplane.pb"))
    if not files:
        raise FileNotFoundError(
            f"{folder} has no trace, an .xplane.pb file; train.py writes one with "
            "--config.profile.steps=3"
        )
    return files


def summary(files: list[Path], top: int, depth: int) -> list[str]:
    """Return the lines to print: the `top` operations and `depth` levels of scopes.

    Times are means over processes and devices.
    """
    traces = [read_trace(file) for file in files]
    wall = sum(trace.end - trace.start for trace in traces) / len(traces)
    times, counts = mean_times(traces)

    # The head: which files, which devices.
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    names = sorted({name for trace in traces for name in trace.devices})
    number = sum(len(trace.devices) for trace in traces)
    mean = f": means of {number} devices" if number > 1 else ""
    lines = [f"{files[0]}{more}", f"{', '.join(names)}{mean}"]

    # The tables.
    columns = f"{'ms':>10}{'%':>7}"
    if any(trace.phases for trace in traces):
        lines += ["", f"  {'phase of the program':<{NAME_WIDTH}}{columns}"]
        lines += phase_rows(traces, wall)
    lines += ["", f"  {'scope on the device':<{NAME_WIDTH}}{columns}"]
    lines += scope_rows(times, wall, depth)
    lines += ["", f"  {'operation':<{NAME_WIDTH}}{columns}{'count':>7}  scope and what it does"]
    lines += operation_rows(times, counts, wall, top)

    in_scopes = sum(ns for operation, ns in times.items() if operation.scope)
    if in_scopes < 0.5 * sum(times.values()):
        lines += ["", *NO_SCOPES]
    return lines


def mean_times(traces: list[Trace]) -> tuple[Counter[Operation], Counter[Operation]]:
    """Return the ns and the number of runs of each operation, as means over all devices."""
    number = sum(len(trace.devices) for trace in traces)
    times: Counter[Operation] = Counter()
    counts: Counter[Operation] = Counter()
    for trace in traces:
        for events in trace.devices.values():
            for operation, ns in self_times(events, trace.start, trace.end).items():
                times[operation] += ns / number
            for event in events:
                counts[event.operation] += 1 / number
    return times, counts


def row(name: str, ns: float, wall: float, text: str = "") -> str:
    """Format a row: milliseconds, and the share of the wall-clock time."""
    milliseconds = ns / 1e6
    share = 100 * ns / wall
    return f"  {name:<{NAME_WIDTH}}{milliseconds:>10.1f}{share:>7.1f}{text}".rstrip()


def phase_rows(traces: list[Trace], wall: float) -> list[str]:
    """A row for each phase of the epoch, and one for what is left."""
    phases = {}
    for name in PHASES:
        if name == "scout" and not any(name in trace.phases for trace in traces):
            continue  # most runs have no previews
        phases[name] = sum(trace.phases.get(name, 0) for trace in traces) / len(traces)

    rows = [row(name, ns, wall) for name, ns in phases.items()]
    rows.append(row("other", wall - sum(phases.values()), wall))
    rows.append(row("wall-clock", wall, wall))
    return rows


def scope_rows(times: Counter[Operation], wall: float, depth: int) -> list[str]:
    """A row for each scope down to `depth`, inner scopes indented below outer ones."""
    # An operation counts for every scope that it is in.
    scopes: Counter[tuple[str, ...]] = Counter()
    for operation, ns in times.items():
        for level in range(1, min(len(operation.scope), depth) + 1):
            scopes[operation.scope[:level]] += ns

    rows = []
    for scope in sorted(scopes, key=lambda scope: [SCOPES.index(name) for name in scope]):
        indent = "  " * (len(scope) - 1)
        rows.append(row(f"{indent}{scope[-1]}", scopes[scope], wall))

    no_scope = sum(ns for operation, ns in times.items() if not operation.scope)
    rows.append(row("no scope", no_scope, wall))
    rows.append(row("idle", wall - sum(times.values()), wall))
    rows.append(row("wall-clock", wall, wall))
    return rows


def operation_rows(
    times: Counter[Operation], counts: Counter[Operation], wall: float, top: int
) -> list[str]:
    """A row for each of the `top` operations, and one for all others."""
    largest = times.most_common(top)
    rows = []
    for operation, ns in largest:
        name = operation.name
        if len(name) > NAME_WIDTH:
            name = f"{name[: NAME_WIDTH - 3]}..."
        path = "/".join((*operation.scope, operation.does))
        if len(path) > PATH_WIDTH:
            path = f"...{path[3 - PATH_WIDTH :]}"
        rows.append(row(name, ns, wall, f"{counts[operation]:>7.0f}  {path}"))

    others = f"{len(times) - len(largest)} others"
    rest = sum(times.values()) - sum(ns for _, ns in largest)
    count = sum(counts.values()) - sum(counts[operation] for operation, _ in largest)
    rows.append(row(others, rest, wall, f"{count:>7.0f}"))
    rows.append(row("idle", wall - sum(times.values()), wall))
    rows.append(row("wall-clock", wall, wall))
    return rows
