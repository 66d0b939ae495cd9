"""Read the compiled programs of a trace: the scope of every operation.

The trace holds each program as an HloProto (xla/service/hlo.proto) in the plane /host:metadata,
which JAX's ProfileData does not show.
"""

import re
from typing import NamedTuple

from realgen_jax.profiling.protobuf import packed_varints, text, values

# Names given to jax.named_scope, in the order of an epoch. `backward` stands for the gradient of
# `policy`.
SCOPES = (
    "preview",
    "prefix",
    "window",
    "log_prob",
    "suffix",
    "evaluate",
    "decode",
    "recompute",
    "update",
    "reference",
    "old_policy",
    "policy",
    "backward",
    "optimizer",
    "modulation",
    "double",
    "joint",
    "last",
    "single",
    "block",
    "head",
    "attention",
)

# Field numbers, by message.
SPACE_PLANES = 1
PLANE_NAME = 2
PLANE_EVENT_METADATA = 4  # a map
MAP_VALUE = 2
METADATA_NAME = 2
METADATA_STATS = 5
STAT_BYTES = 6  # an HloProto
PROTO_MODULE = 1
MODULE_COMPUTATIONS = 3
COMPUTATION_INSTRUCTIONS = 2
COMPUTATION_ID = 5
INSTRUCTION_NAME = 1
INSTRUCTION_METADATA = 7
INSTRUCTION_CALLED_IDS = 38
OP_METADATA_NAME = 2


class Operation(NamedTuple):
    """An operation of a compiled program."""

    name: str  # the compiler's name
    scope: tuple[str, ...]  # the scopes it is in, outermost first
    does: str  # JAX's name for the operation, such as dot_general


# {program's number or name: {operation's name: operation}}
Programs = dict[int | str, dict[str, Operation]]


def read_programs(space: bytes) -> Programs:
    """Read all programs of a serialized XSpace (tsl/profiler/protobuf/xplane.proto)."""
    programs: Programs = {}
    for plane in values(space, SPACE_PLANES):
        if text(plane, PLANE_NAME) != "/host:metadata":
            continue
        for entry in values(plane, PLANE_EVENT_METADATA):
            for metadata in values(entry, MAP_VALUE):
                _add_program(programs, metadata)
    return programs


def _add_program(programs: Programs, metadata: bytes) -> None:
    """Add the program of an XEventMetadata under its name and its number."""
    # "jit_f(7)" is program 7, compiled from the function f.
    name, _, number = text(metadata, METADATA_NAME).rstrip(")").partition("(")
    for stat in values(metadata, METADATA_STATS):
        for proto in values(stat, STAT_BYTES):
            program = {}
            for module in values(proto, PROTO_MODULE):
                for operation in operations(module):
                    program[operation.name] = operation
            programs[name] = program
            if number.isdigit():
                programs[int(number)] = program


def operations(module: bytes) -> list[Operation]:
    """Return the operations of a serialized HloModuleProto.

    An operation without a path was added by the compiler, such as a copy in a loop. It gets the
    scope of the operation that calls its computation.
    """
    # By computation: the path of each instruction, and the instruction that calls the computation.
    paths: dict[int, list[tuple[str, str]]] = {}
    callers: dict[int, tuple[int, str]] = {}
    for computation in values(module, MODULE_COMPUTATIONS):
        number = values(computation, COMPUTATION_ID)[0]
        paths[number] = []
        for instruction in values(computation, COMPUTATION_INSTRUCTIONS):
            metadata = values(instruction, INSTRUCTION_METADATA)
            path = "".join(text(message, OP_METADATA_NAME) for message in metadata)
            paths[number].append((text(instruction, INSTRUCTION_NAME), path))
            for called in called_computations(instruction):
                callers[called] = (number, path)

    def scope(path: str, computation: int) -> tuple[str, ...]:
        # A path that starts with "jit(" is complete. Others continue the caller's path.
        if path.startswith("jit(") or computation not in callers:
            return scope_of(path)
        caller, caller_path = callers[computation]
        return scope(caller_path, caller) + scope_of(path)

    result = []
    for computation, instructions in paths.items():
        for name, path in instructions:
            result.append(Operation(name, scope(path, computation), last_name(path)))
    return result


def called_computations(instruction: bytes) -> list[int]:
    """Return the ids of the computations that an HloInstructionProto calls."""
    ids = []
    for called in values(instruction, INSTRUCTION_CALLED_IDS):
        if isinstance(called, int):
            ids.append(called)
        else:
            ids.extend(packed_varints(called))
    return ids


def scope_of(path: str) -> tuple[str, ...]:
    """Return the scopes in an operation's path, such as jit(update)/while/jvp(policy)/.../dot."""
    backward = "transpose(" in path
    scopes = []
    for name in path_names(path):
        if name == "policy" and backward:
            scopes.append("backward")
        elif name in SCOPES:
            scopes.append(name)
    return tuple(scopes)


def last_name(path: str) -> str:
    """Return the last name of a path: JAX's name of the operation."""
    return path_names(path)[-1]


def path_names(path: str) -> list[str]:
    """Split a path into its names, without the transformations around them.

    If the compiler merged several operations, a/(b/c:d/e), only the first is kept.
    """
    first = re.split("[;:]", path)[0]
    plain = re.sub(r"\b(transpose|jvp|vmap)\(|(?<=/)\(|\)", "", first)
    return plain.split("/")
