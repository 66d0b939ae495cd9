"""Read a trace of JAX's profiler: how long each operation ran, in which scope and in which phase.

A trace is an XSpace protobuf (*.xplane.pb, tsl/profiler/protobuf/xplane.proto). JAX's ProfileData
reads its events. The programs, with the scope of each operation, are read by
realgen_jax.profiling.programs.
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from jax.profiler import ProfileData

from realgen_jax.profiling.programs import (
    Operation,
    Programs,
    last_name,
    read_programs,
    scope_of,
)
from realgen_jax.profiling.step_traces import STEP

# Phases of an epoch, as train.py names them.
PHASES = ("evaluate", "scout", "sample", "reward_wait", "update", "reward_learning", "checkpoint")


class Event(NamedTuple):
    """One run of an operation."""

    operation: Operation
    start: float  # ns
    end: float  # ns


@dataclass(frozen=True)
class Trace:
    """One process's trace of an epoch. Times are in ns."""

    start: float
    end: float
    phases: dict[str, float]  # duration of each phase on the host
    devices: dict[str, list[Event]]


def read_trace(file: Path) -> Trace:
    """Read a trace file.

    Raises ValueError if the file is not a trace, or contains no device operations.
    """
    try:
        planes = list(ProfileData.from_file(str(file)).planes)
        programs = read_programs(file.read_bytes())
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(
            f"{file} is not a trace ({error}); expected an .xplane.pb file of JAX's profiler"
        ) from error

    devices = device_events(planes, programs)
    if not devices:
        raise ValueError(
            f"{file} has no operations of a device; expected the trace of an epoch, written with "
            "--config.profile.steps=3"
        )

    # The epoch, if the trace has one; otherwise the time from the first to the last operation.
    start = min(event.start for events in devices.values() for event in events)
    end = max(event.end for events in devices.values() for event in events)
    phases: Counter[str] = Counter()
    for line in host_lines(planes):
        events = list(line.events)
        steps = [event for event in events if event.name == STEP]
        if not steps:
            continue
        start = steps[0].start_ns
        end = steps[0].end_ns
        for event in events:
            if event.name in PHASES and start <= event.start_ns < end:
                phases[event.name] += event.duration_ns
    return Trace(start, end, dict(phases), devices)


def host_lines(planes: Iterable[Any]) -> list[Any]:
    """Return the threads of the host."""
    lines = []
    for plane in planes:
        if plane.name.startswith("/host:"):
            lines.extend(plane.lines)
    return lines


def device_events(planes: Iterable[Any], programs: Programs) -> dict[str, list[Event]]:
    """Return the events of each device.

    Each GPU or TPU has its own plane, called /device:... On a CPU, operations run in host threads.
    """
    planes = list(planes)
    events = accelerator_events(planes, programs)
    if not events:
        events = cpu_events(planes, programs)
    return events


def accelerator_events(planes: Iterable[Any], programs: Programs) -> dict[str, list[Event]]:
    """Return the events of each GPU or TPU."""
    devices = {}
    for plane in planes:
        if not plane.name.startswith("/device:"):
            continue

        # A GPU's operations are in its "Stream" lines; its other lines summarise them. A TPU has no
        # streams.
        lines = [line for line in plane.lines if line.name.startswith("Stream")]
        if not lines:
            lines = [line for line in plane.lines if line.name == "XLA Ops"]

        events = []
        for line in lines:
            for event in line.events:
                events.append(_event(event, dict(event.stats), programs, event.end_ns))
        if events:
            devices[plane.name.removeprefix("/device:")] = events
    return devices


def cpu_events(planes: Iterable[Any], programs: Programs) -> dict[str, list[Event]]:
    """Return the events of each CPU device.

    An operation may end in a different thread from the one it began in. The end is then an event
    called "end: NAME", and both events carry the same number: `_p` at the start, `_c` at the end.
    """
    devices: dict[str, list[Event]] = {}
    for plane in planes:
        if not plane.name.startswith("/host:"):
            continue

        begun = []
        ends = {}
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if event.name.startswith("end: "):
                    ends[stats.get("_c")] = event.end_ns
                elif "hlo_op" in stats:
                    begun.append((event, stats))

        for event, stats in begun:
            end = max(event.end_ns, ends.get(stats.get("_p"), 0))
            device = f"CPU {stats.get('device_ordinal', 0)}"
            devices.setdefault(device, []).append(_event(event, stats, programs, end))
    return devices


def _event(event: Any, stats: Mapping[str, Any], programs: Programs, end: float) -> Event:
    """Look up the operation in its program; if the program is unknown, use the event's own path."""
    name = str(stats.get("hlo_op", event.name)).split("::")[-1]
    by_name = programs.get(stats.get("hlo_module"), {})
    program = programs.get(stats.get("program_id"), by_name)
    if name in program:
        return Event(program[name], event.start_ns, end)

    path = ""
    for key in ("tf_op", "name"):
        value = str(stats.get(key, ""))
        if "/" in value:
            path = value
            break
    return Event(Operation(name, scope_of(path), last_name(path)), event.start_ns, end)


def self_times(events: Iterable[Event], start: float, end: float) -> Counter[Operation]:
    """Return the ns of each operation between `start` and `end`.

    While several operations run at once, the time counts for the one that began last. A loop
    therefore counts only the time that its body does not cover, and a collective only the time that
    no computation hides. The sum is the time in which the device was busy.
    """
    events = [event for event in events if event.start < end and event.end > start]

    # Between two neighbouring moments, the set of running operations does not change.
    moments = set()
    for event in events:
        moments.add(min(max(event.start, start), end))
        moments.add(min(max(event.end, start), end))

    waiting = sorted(events, key=lambda event: event.start, reverse=True)
    running: list[tuple[float, float, Operation]] = []  # a heap, latest start first
    times: Counter[Operation] = Counter()
    for moment, next_moment in pairwise(sorted(moments)):
        while waiting and waiting[-1].start <= moment:
            event = waiting.pop()
            heapq.heappush(running, (-event.start, event.end, event.operation))
        while running and running[0][1] <= moment:
            heapq.heappop(running)
        if running:
            _, _, operation = running[0]
            times[operation] += next_moment - moment
    return times
