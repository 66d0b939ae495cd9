"""What a trace of JAX's profiler says: how long each operation ran, in which scope of the program, in which phase.

A trace is an XSpace protobuf (*.xplane.pb, tsl/profiler/protobuf/xplane.proto). ProfileData reads its events. What it
leaves out, the programs with every operation's scope (HloProto, xla/service/hlo.proto), is read here field by field.
"""

import heapq
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from jax.profiler import ProfileData

from realgen_jax.profiling.step_traces import STEP

# jax.named_scope's names, in the order of the walk; `backward` stands for the gradient of `policy`
SCOPES = (
    "prefix", "window", "suffix", "evaluate", "decode", "recompute", "update", "reference", "policy", "backward",
    "optimizer", "modulation", "double", "single", "attention",
)  # fmt: skip
PHASES = ("evaluate", "sample", "reward_wait", "update", "reward_learning", "checkpoint")


class Operation(NamedTuple):
    """The compiler's name for it, the scopes that it is in, from the outermost, and JAX's name for what it does."""

    name: str
    scope: tuple[str, ...]
    does: str


class Event(NamedTuple):
    """One run of an operation; times in ns."""

    operation: Operation
    start: float
    end: float


Programs = dict[
    int | str, dict[str, Operation]
]  # {program's number, or its name: {operation's name: operation}}


@dataclass(frozen=True)
class Trace:
    """A process's part of a step: from `start` to `end`, ns by phase of the host, the events of each device."""

    start: float
    end: float
    phases: dict[str, float]
    devices: dict[str, list[Event]]


def self_times(events: Iterable[Event], start: float, end: float) -> Counter[Operation]:
    """ns by operation between `start` and `end`: where several run at once, the time is that of the last begun one.

    So a loop has what its body's operations leave of it, a collective what no computation hides, and the sum is the
    time in which the device was busy.
    """
    events = [e for e in events if e.start < end and e.end > start]
    moments = sorted({min(max(t, start), end) for e in events for t in (e.start, e.end)})
    waiting = sorted(events, key=lambda e: e.start, reverse=True)
    running, times = [], Counter()
    for now, then in pairwise(moments):
        while waiting and waiting[-1].start <= now:
            event = waiting.pop()
            heapq.heappush(running, (-event.start, event.end, event.operation))
        while running and running[0][1] <= now:
            heapq.heappop(running)
        if running:
            times[running[0][2]] += then - now
    return times


def scope_of(op_name: str) -> tuple[str, ...]:
    """The scopes in the path that XLA keeps of an operation: jit(update)/update/while/body/jvp(policy)/.../dot."""
    parts = _parts(op_name)
    backward = "transpose(" in op_name
    return tuple(
        "backward" if backward and part == "policy" else part for part in parts if part in SCOPES
    )


def read_trace(file: Path) -> Trace:
    """Raises ValueError for a file that is no trace, or one without operations of a device."""
    try:
        planes = list(ProfileData.from_file(str(file)).planes)
        programs = read_programs(file.read_bytes())
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(
            f"{file} is no trace ({error}); expected an .xplane.pb file of JAX's profiler"
        ) from error
    devices = device_events(planes, programs)
    if not devices:
        raise ValueError(
            f"{file} holds no operations of a device; expected the trace of an epoch: --config.profile.steps=3"
        )
    start = min(e.start for events in devices.values() for e in events)
    end = max(e.end for events in devices.values() for e in events)
    phases = Counter()
    for line in (
        line for plane in planes if plane.name.startswith("/host:") for line in plane.lines
    ):
        events = list(line.events)
        if steps := [e for e in events if e.name == STEP]:
            start, end = steps[0].start_ns, steps[0].end_ns
            for event in events:
                if event.name in PHASES and start <= event.start_ns < end:
                    phases[event.name] += event.duration_ns
    return Trace(start, end, dict(phases), devices)


def device_events(planes: Iterable[Any], programs: Programs) -> dict[str, list[Event]]:
    """{device: events}. Planes of GPUs and TPUs are called /device:...; on a CPU operations run in the host's threads.

    There an operation may end in another thread than it began in: "end: NAME", with the number that it was given.
    """
    found: dict[str, list[Event]] = {}
    for plane in (plane for plane in planes if plane.name.startswith("/device:")):
        streams = [
            line for line in plane.lines if line.name.startswith("Stream")
        ]  # a GPU's; others sum them up
        events = (
            e
            for line in streams or plane.lines
            if streams or line.name == "XLA Ops"
            for e in line.events
        )
        if events := [_event(e, dict(e.stats), programs, e.end_ns) for e in events]:
            found[plane.name.removeprefix("/device:")] = events
    if found:
        return found
    for plane in (plane for plane in planes if plane.name.startswith("/host:")):
        begun, ends = [], {}
        for event in (event for line in plane.lines for event in line.events):
            if event.name.startswith("end: "):
                ends[dict(event.stats).get("_c")] = event.end_ns
            elif "hlo_op" in (stats := dict(event.stats)):
                begun.append((event, stats))
        for event, stats in begun:
            end = max(event.end_ns, ends.get(stats.get("_p"), 0))
            device = f"CPU {stats.get('device_ordinal', 0)}"
            found.setdefault(device, []).append(_event(event, stats, programs, end))
    return found


def _event(event: Any, stats: Mapping[str, Any], programs: Programs, end: float) -> Event:
    """The operation is the program's; where the program is not known, a path among the event's own stats tells."""
    name = str(stats.get("hlo_op", event.name)).split("::")[-1]
    program = programs.get(stats.get("program_id"), programs.get(stats.get("hlo_module"), {}))
    path = next((path for key in ("tf_op", "name") if "/" in (path := str(stats.get(key, "")))), "")
    return Event(
        program.get(name, Operation(name, scope_of(path), _does(path))), event.start_ns, end
    )


def read_programs(space: bytes) -> Programs:
    """The programs in the plane /host:metadata."""
    programs = {}
    for plane in _all(space, 1):
        if _text(plane, 2) == "/host:metadata":
            for entry in (
                value for pair in _all(plane, 4) for value in _all(pair, 2)
            ):  # XEventMetadata "jit_f(7)"
                name, _, number = _text(entry, 2).rstrip(")").partition("(")
                for proto in (proto for stat in _all(entry, 5) for proto in _all(stat, 6)):
                    found = {op.name: op for module in _all(proto, 1) for op in operations(module)}
                    programs |= {name: found} | ({int(number): found} if number.isdigit() else {})
    return programs


def operations(module: bytes) -> list[Operation]:
    """The operations of an HloModuleProto. One that the compiler added, a copy in a loop, has its loop's scope."""
    callers, parts = {}, {}  # both by the computation's id
    for computation in _all(module, 3):
        ops = parts[_all(computation, 5)[0]] = []
        for op in _all(computation, 2):
            path = "".join(_text(metadata, 2) for metadata in _all(op, 7))
            ops.append((_text(op, 1), path))
            for called in _all(op, 38):
                ids = [called] if isinstance(called, int) else _numbers(called)
                callers |= dict.fromkeys(ids, (_all(computation, 5)[0], path))

    def scope(path: str, computation: int | None) -> tuple[str, ...]:
        """That of its path, behind that of the operation that calls its computation where the path is not whole."""
        if path.startswith("jit(") or computation not in callers:
            return scope_of(path)
        caller, above = callers[computation]
        return scope(above, caller) + scope_of(path)

    return [
        Operation(name, scope(path, c), _does(path))
        for c, found in parts.items()
        for name, path in found
    ]


def _does(op_name: str) -> str:
    return _parts(op_name)[-1]


def _parts(op_name: str) -> list[str]:
    """A path's names, without the transformations around them. Of joined operations, a/(b/c:d/e), the first."""
    return re.sub(r"\b(transpose|jvp|vmap)\(|(?<=/)\(|\)", "", re.split("[;:]", op_name)[0]).split(
        "/"
    )


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protobuf message's fields: an int, or the bytes of a string, a message, packed numbers."""
    at = 0
    while at < len(message):
        key, at = _number(message, at)
        kind = key & 7
        if kind == 0:
            value, at = _number(message, at)
        else:
            size, at = ({1: 8, 5: 4}[kind], at) if kind in (1, 5) else _number(message, at)
            value, at = message[at : at + size], at + size
        yield key >> 3, value


def _number(message: bytes, at: int) -> tuple[int, int]:
    """The varint at `at`, seven bits a byte, the lowest first, and where it ends."""
    value = shift = 0
    while message[at] > 127:
        value, shift, at = value | (message[at] & 127) << shift, shift + 7, at + 1
    return value | message[at] << shift, at + 1


def _numbers(packed: bytes) -> list[int]:
    found, at = [], 0
    while at < len(packed):
        number, at = _number(packed, at)
        found.append(number)
    return found


def _all(message: bytes, number: int) -> list[Any]:
    return [value for found, value in _fields(message) if found == number]


def _text(message: bytes, number: int) -> str:
    return next((value.decode() for value in _all(message, number)), "")
