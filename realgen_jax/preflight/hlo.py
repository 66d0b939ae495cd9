"""Read a compiled program's text: its computations, kernels, loops, and what a kernel computes.

The text is that of `jax.stages.Compiled.as_text()`, in XLA's HLO syntax.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

# Bytes of an element.
ELEMENTS = {
    "pred": 1, "s2": 1, "u2": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4,
    "u32": 4, "s64": 8, "u64": 8, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8,
    "f8e4m3fn": 1, "f8e5m2": 1, "f4e2m1fn": 1,
}  # fmt: skip

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

# Operations that run no kernel.
FREE = (
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "after-all",
    "while",
    "conditional",
    "call",
    "opt-barrier",
    "partition-id",
    "replica-id",
)

COMPUTATION = re.compile(r"(ENTRY )?%([\w.\-]+) \(")
INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (.*)")
OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
NAME = re.compile(r"%([\w.\-]+)")
CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%([\w.\-]+)"
)
CONDITION = re.compile(r"\bcondition=%([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
OP_NAME = re.compile(r'op_name="([^"]*)"')
TARGET = re.compile(r'custom_call_target="([^"]*)"')


@dataclass(frozen=True)
class Instruction:
    """An instruction of a computation.

    shape: its result, as written. operands: names. attributes: the rest of the line. called:
    computations that it calls. path: JAX's name for it, with its scopes.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    called: tuple[str, ...]
    root: bool

    @cached_property
    def path(self) -> str:
        match = OP_NAME.search(self.attributes)
        return match[1] if match else ""

    @cached_property
    def target(self) -> str:
        """The library's function that a custom call runs, or the empty string."""
        match = TARGET.search(self.attributes)
        return match[1] if match else ""

    @cached_property
    def bytes(self) -> int:
        """Bytes of the result."""
        return shape_bytes(self.shape)


@dataclass(frozen=True)
class Module:
    """A compiled program: {computation: {name: instruction}}, and the one that runs first."""

    computations: Mapping[str, Mapping[str, Instruction]]
    entry: str

    @cached_property
    def runs(self) -> dict[str, int]:
        """How often each computation runs that holds kernels, by the trip counts of its loops.

        The computations that a fusion or a reduction consists of are not in it. Each branch of a
        condition counts once.
        """
        runs: dict[str, int] = {}
        pending = [(self.entry, 1)]
        while pending:
            name, times = pending.pop()
            runs[name] = runs.get(name, 0) + times
            for instruction in self.computations[name].values():
                if instruction.opcode in ("while", "conditional", "call", "async-start"):
                    for called in instruction.called:
                        pending.append((called, times * self._trips(instruction)))
        return runs

    def _trips(self, loop: Instruction) -> int:
        """How often a loop runs: 1 if that is not known.

        The compiler for TPUs does not write the number, but JAX's loops count from 0 up to the
        constant that their condition compares with.
        """
        if match := TRIPS.search(loop.attributes):
            return int(match[1])
        condition = CONDITION.search(loop.attributes)
        if condition is None:
            return 1
        instructions = self.computations[condition[1]]
        root = next(each for each in instructions.values() if each.root)
        if root.opcode != "compare" or "direction=LT" not in root.attributes:
            return 1
        limit = instructions[root.operands[1]]
        return int(limit.attributes.partition(",")[0]) if limit.opcode == "constant" else 1

    def kernels(self) -> Iterator[tuple[str, Instruction]]:
        """Return all (computation, instruction) that run a kernel."""
        for name in self.runs:
            for instruction in self.computations[name].values():
                if instruction.opcode not in FREE:
                    yield name, instruction

    def path(self, instruction: Instruction) -> str:
        """JAX's name of an instruction; of a fusion without a name, that of its root."""
        if instruction.path or instruction.opcode != "fusion":
            return instruction.path
        (fused,) = instruction.called
        return _root(self, fused).path


def read_module(text: str) -> Module:
    """Read a program's text. Raises ValueError if it has no entry computation."""
    computations: dict[str, dict[str, Instruction]] = {}
    current: dict[str, Instruction] = {}
    entry = ""
    for line in text.splitlines():
        if header := COMPUTATION.match(line):
            current = computations.setdefault(header[2], {})
            if header[1]:
                entry = header[2]
        elif match := INSTRUCTION.match(line):
            instruction = _instruction(match[2], match[3], bool(match[1]))
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("the text is no HLO module: it has no ENTRY computation")
    return Module(computations, entry)


def _instruction(name: str, text: str, root: bool) -> Instruction:
    """Read "shape opcode(operands), attributes"."""
    opcode = OPCODE.search(text)
    start = opcode.end()

    # The operands end at the parenthesis that closes theirs.
    depth = 1
    end = start
    while depth:
        depth += {"(": 1, ")": -1}.get(text[end], 0)
        end += 1
    attributes = text[end:]
    called = CALLED.findall(attributes)
    for branches in BRANCHES.findall(attributes):
        called += NAME.findall(branches)

    # The value of a constant and the number of a parameter stand where operands do.
    inside = text[start : end - 1]
    if opcode[1] in ("constant", "parameter"):
        attributes = f"{inside}{attributes}"
    return Instruction(
        name=name,
        shape=text[: opcode.start()],
        opcode=opcode[1],
        operands=tuple(NAME.findall(inside)),
        attributes=attributes,
        called=tuple(called),
        root=root,
    )


def shape_bytes(shape: str) -> int:
    """Bytes of a shape or a tuple of shapes, such as "(bf16[3,24]{1,0}, u8[0]{0})"."""
    return sum(math.prod(sizes) * ELEMENTS.get(kind, 0) for kind, sizes in arrays(shape))


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """The (element type, sizes) of a shape or of each shape of a tuple."""
    result = []
    for kind, sizes, _ in SHAPE.findall(shape):
        result.append((kind, tuple(int(size) for size in sizes.split(",") if size)))
    return result


def signatures(module: Module, instruction: Instruction) -> list[tuple[str, str]]:
    """What a kernel computes, whatever its instructions are called and in which order they stand.

    Returns (path, signature). Two kernels with the same signatures compute the same expressions of
    their operands, on the same shapes and layouts. The tiles of a kernel, which a GPU's autotuner
    may choose anew, are not part of it. A loop over elements has a signature for each of its
    outputs, which do not depend on one another; any other kernel has one.
    """
    path = module.path(instruction)
    if instruction.opcode != "fusion":
        return [(path, f"{_plain(instruction)} of {instruction.shape}")]

    (fused,) = instruction.called
    kind = re.search(r"kind=(\w+)", instruction.attributes)[1]
    root = _root(module, fused)
    if kind != "kLoop" or root.opcode != "tuple":
        return [(path, f"fusion {kind} {_expression(module, fused, root.name)}")]
    result = []
    for name in root.operands:
        output = module.computations[fused][name]
        result.append((output.path, f"fusion {kind} {_expression(module, fused, name)}"))
    return result


def _root(module: Module, name: str) -> Instruction:
    """The instruction whose value a computation returns."""
    return next(each for each in module.computations[name].values() if each.root)


def _expression(module: Module, name: str, output: str) -> str:
    """A digest of the expression of an instruction; parameters are numbered by their first use."""
    instructions = module.computations[name]
    parameters: dict[str, int] = {}
    digests: dict[str, str] = {}

    def digest(key: str) -> str:
        if key in digests:
            return digests[key]
        instruction = instructions[key]

        # A parameter that is only seen in another shape is one of that shape.
        source = key
        while instructions[source].opcode == "bitcast":
            (source,) = instructions[source].operands
        if instructions[source].opcode == "parameter":
            parts = ["parameter", str(parameters.setdefault(source, len(parameters)))]
        else:
            parts = [_plain(instruction), *map(digest, instruction.operands)]
            for called in instruction.called:
                parts.append(_expression(module, called, _root(module, called).name))
        text = " ".join([instruction.shape, *parts])
        digests[key] = hashlib.sha256(text.encode()).hexdigest()[:16]
        return digests[key]

    return digest(output)


def _plain(instruction: Instruction) -> str:
    """The opcode and the attributes that change the result."""
    text = _without_braces(instruction.attributes, "metadata=")
    if instruction.opcode != "custom-call":
        text = _without_braces(text, "backend_config=")
    text = re.sub(r"\b(calls|to_apply|channel_id|origin)=[^,]*,?", "", text)
    return f"{instruction.opcode} {text.strip(' ,')}"


def _without_braces(text: str, name: str) -> str:
    """Remove name={...}, with nested braces."""
    start = text.find(name)
    if start < 0:
        return text
    end = text.index("{", start)
    depth = 0
    while True:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
        if not depth:
            return text[:start] + text[end:]
