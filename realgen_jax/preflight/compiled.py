"""What XLA's compiler for a GPU or TPU makes of a run's large programs."""

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from rich.table import Table

from realgen_jax.preflight.figures import GIB
from realgen_jax.preflight.hlo import COLLECTIVES, Instruction, Module, read_module
from realgen_jax.preflight.report import Report
from realgen_jax.preflight.rewriter import RewriterReport
from realgen_jax.preflight.tables import COLUMNS, new_table
from realgen_jax.profiling.programs import scope_of
from realgen_jax.training.progress import plain_console

# {what a compiled program calls it: attention kernel}
KERNELS = {
    "__cudnn$fmhaSoftmax": "cuDNN forward",
    "__cudnn$fmhaSoftmaxBackward": "cuDNN backward",
    "splash_mha_fwd": "splash forward",
    "splash_mha_dq": "splash backward (dq)",
    "splash_mha_dkv": "splash backward (dk, dv)",
}
LARGEST = 8  # temporaries that are listed

# Parts of a report's phases that are arguments or results of the program, not its temporaries.
PASSED = ("trajectories", "embeddings", "pictures")


@dataclass(frozen=True)
class Place:
    """Operations of one kind in one scope. runs: of an execution of the program; bytes: of one."""

    scope: str
    kind: str
    runs: int
    bytes: int


@dataclass(frozen=True)
class Compiled:
    """A compiled program; bytes are per device.

    memory: {"arguments", "outputs", "aliased", "temporaries", "peak"}, and "host", arguments and
    temporaries in host memory, which are in none of the others. formula: temporaries by formula.
    attention: {kernel: number of calls in the program's text}. collectives: by place. largest: the
    largest temporary arrays. seconds: of compiling.
    """

    memory: dict[str, int]
    formula: float
    attention: dict[str, int]
    collectives: list[Place]
    largest: list[Place]
    seconds: float
    text: str  # in XLA's HLO syntax

    @property
    def in_use(self) -> int:
        """Bytes of temporaries that are in use when most memory is.

        The compiler for TPUs allocates more than that: arrays of other sizes leave holes.
        """
        memory = self.memory
        fresh = memory["outputs"] - memory["aliased"]
        return min(memory["temporaries"], memory["peak"] - memory["arguments"] - fresh)


def compile_programs(
    report: Report | RewriterReport, programs: Mapping[str, jax.stages.Lowered]
) -> dict[str, Compiled]:
    """Compile a report's lowered programs for the devices of its mesh: {name: what came of it}."""
    result = {}
    for name, program in programs.items():
        begin = time.perf_counter()
        compiled = program.compile()
        seconds = time.perf_counter() - begin
        result[name] = _describe(compiled, temporary_bytes(report.phases[name]), seconds)
    return result


def temporary_bytes(phase: Mapping[str, float]) -> float:
    """Bytes of a program's temporary arrays by formula; phase: of a report, {part: bytes}."""
    return sum(size for part, size in phase.items() if part not in PASSED)


def _describe(compiled: Any, formula: float, seconds: float) -> Compiled:
    memory = compiled.memory_analysis()
    host = memory.host_argument_size_in_bytes
    text = compiled.as_text()
    module = read_module(text)
    return Compiled(
        memory={
            "arguments": memory.argument_size_in_bytes,
            "outputs": memory.output_size_in_bytes,
            "aliased": memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            # XLA's peak also counts the arguments in host memory.
            "peak": memory.peak_memory_in_bytes - host,
            "host": host + memory.host_temp_size_in_bytes,
        },
        formula=formula,
        attention=attention_kernels(module),
        collectives=collectives(module),
        largest=largest(module),
        seconds=seconds,
        text=text,
    )


def attention_kernels(module: Module) -> dict[str, int]:
    """{attention kernel: number of calls in the text}; "XLA" if there are none."""
    calls: Counter[str] = Counter()
    for _, instruction in module.kernels():
        for key, kernel in KERNELS.items():
            if instruction.target == key or instruction.name.startswith(key):
                calls[kernel] += 1
    return dict(calls) or {"XLA": 0}


def collectives(module: Module) -> list[Place]:
    """Operations that move data between devices, by scope and kind, most bytes first."""
    places: Counter[tuple[str, str, int]] = Counter()
    for computation, instruction in module.kernels():
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            scope = _scope(module, instruction)
            places[scope, kind, _received(instruction)] += module.runs[computation]
    rows = [Place(scope, kind, runs, size) for (scope, kind, size), runs in places.items()]
    return sorted(rows, key=lambda row: -row.runs * row.bytes)


def _received(instruction: Instruction) -> int:
    """Bytes of a collective's result. A start's result also holds its operand."""
    if instruction.opcode.endswith("-start") and instruction.shape.startswith("("):
        return instruction.bytes // 2
    return instruction.bytes


def largest(module: Module) -> list[Place]:
    """The largest arrays that the program writes, by scope."""
    rows: Counter[tuple[str, str, int]] = Counter()
    for _, instruction in module.kernels():
        if instruction.shape.startswith("("):
            continue
        shape = instruction.shape.partition("{")[0]
        rows[_scope(module, instruction), shape, instruction.bytes] += 1
    places = [Place(scope, shape, count, size) for (scope, shape, size), count in rows.items()]
    return sorted(places, key=lambda place: -place.bytes)[:LARGEST]


def _scope(module: Module, instruction: Instruction) -> str:
    """The scopes that an instruction is in, such as "update/policy/double"."""
    return "/".join(scope_of(module.path(instruction))) or "no scope"


def with_compiler(
    report: Report | RewriterReport, compiled: Mapping[str, Compiled]
) -> dict[str, float]:
    """Bytes of one device in each compiled phase, with the compiler's temporaries."""
    held = sum(report.held.values())
    totals = {}
    for name, program in compiled.items():
        rest = sum(report.phases[name].values()) - program.formula
        totals[name] = held + rest + program.memory["temporaries"]
    return totals


def compiler_figures(
    report: Report | RewriterReport, compiled: Mapping[str, Compiled]
) -> dict[str, Any]:
    """All figures for JSON."""
    totals = with_compiler(report, compiled)
    result = {}
    for name, program in compiled.items():
        result[name] = {
            "bytes": program.memory,
            "temporaries_in_use": program.in_use,
            "temporaries_by_formula": program.formula,
            "total": totals[name],
            "attention": program.attention,
            "collectives": [vars(place) for place in program.collectives],
            "largest": [vars(place) for place in program.largest],
            "compile_seconds": program.seconds,
        }
    return result


def show_compiled(
    target: str, report: Report | RewriterReport, compiled: Mapping[str, Compiled]
) -> None:
    """Print what the compiler made of the programs."""
    console = plain_console()
    console.print(_memory_table(target, report, compiled))
    for name, program in compiled.items():
        calls = ", ".join(f"{kernel} {number}" for kernel, number in program.attention.items())
        console.print(f"Attention in {COLUMNS[name]}, calls in the program's text: {calls}")
    console.print()
    if any(program.collectives for program in compiled.values()):
        places = {name: program.collectives[:LARGEST] for name, program in compiled.items()}
        console.print(_places_table("Transfers between devices, by scope", places, "runs"))
    places = {name: program.largest for name, program in compiled.items()}
    console.print(_places_table("Largest arrays that are written, by scope", places, "in the text"))


def _memory_table(
    target: str, report: Report | RewriterReport, compiled: Mapping[str, Compiled]
) -> Table:
    """The compiler's bytes beside the formula's."""
    table = new_table(
        f"Compiled for {target}, GiB of one device",
        ("",),
        tuple(COLUMNS[name] for name in compiled),
    )

    def gib(sizes: Iterable[float]) -> list[str]:
        return [f"{size / GIB:.2f}" for size in sizes]

    programs = list(compiled.values())
    for part in programs[0].memory:
        table.add_row(part, *gib(program.memory[part] for program in programs))
    table.add_row("temporaries in use", *gib(program.in_use for program in programs))
    table.add_row("temporaries by formula", *gib(program.formula for program in programs))
    shares = [program.formula / program.in_use - 1 for program in programs]
    table.add_row("formula over compiler", *[f"{share:+.1%}" for share in shares])
    table.add_section()
    totals = with_compiler(report, compiled).values()
    table.add_row("total of the run", *gib(totals), style="bold")
    table.add_section()
    table.add_row("seconds to compile", *[f"{program.seconds:.0f}" for program in programs])
    return table


def _places_table(title: str, places: Mapping[str, list[Place]], runs: str) -> Table:
    table = new_table(title, ("program", "scope", "what"), (runs, "MiB each"))
    for name, rows in places.items():
        for row in rows:
            size = f"{row.bytes / 2**20:,.1f}"
            table.add_row(COLUMNS[name], row.scope, row.kind, str(row.runs), size)
        table.add_section()
    return table
