"""A bound of the time of the compiled programs on a GPU, by class of kernel. No GPU is needed.

    python benchmarks/roofline.py [--config flux_grpo:flux_dev_1xh200] [--target h200] \\
        [--products 790] [--link 450] [KEY=VALUE ...]

Compiles the rollout and the update for the target as preflight.py --compile_for does. A kernel
takes at least as long as its operations at the rate of products (TFLOP/s that a large product
reaches; NVIDIA's data sheet has 989 of an H200), or its reads and writes at the card's bandwidth. A
transfer between GPUs takes its bytes at the rate of the links (GB/s). Kernels run one after the
other, so the sum is a bound: launches, and what autotuning does not reach, come on top.

Prints milliseconds by class, of a rollout's image, of its steps without the decoder, and of an
update; and the update's operations without rematerialisation over the bound, as a share of the
data sheet's rate. KEY=VALUE sets keys of the config, such as sample.train_batch_size=4.
"""

import argparse
import importlib
import json
import math
import os
from collections import Counter
from functools import cache
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import measure

from realgen_jax.models import cost
from realgen_jax.preflight.compiled import compile_programs
from realgen_jax.preflight.hlo import COLLECTIVES, Instruction, Module, arrays, read_module
from realgen_jax.preflight.report import lowered, make_report
from realgen_jax.preflight.targets import CARDS, target_devices
from realgen_jax.profiling.programs import scope_of

CLASSES = ("products", "attention", "decoder", "norms, rotary, elementwise", "copies", "transfers")
ATTENTION = {"__cudnn$fmhaSoftmax": 4.0, "__cudnn$fmhaSoftmaxBackward": 10.0}
COPIES = {"copy", "bitcast", "transpose", "slice", "dynamic-slice", "dynamic-update-slice",
          "parameter", "constant", "tuple", "reshape", "broadcast", "concatenate", "pad",
          "get-tuple-element", "convert", "copy-start", "copy-done"}  # fmt: skip


def operations(module: Module, instruction: Instruction, where: str) -> float:
    """Operations of a kernel's products, convolutions and attention."""
    if instruction.target in ATTENTION:
        # q [n, t, h, d]: 4 n h t^2 d forward, 2.5 times as much backward.
        (_, q), *_ = _operand_arrays(module, instruction, where)
        n, tokens, heads, channels = q
        return ATTENTION[instruction.target] * n * heads * tokens**2 * channels
    if instruction.target.startswith("__cudnn$conv"):
        _, (_, kernel) = _operand_arrays(module, instruction, where)[:2]
        (_, out), *_ = arrays(instruction.shape)
        largest = max(kernel[0], kernel[-1]) if kernel else 1
        outputs = next((size for size in (out[-1], out[1]) if size in kernel), largest)
        return 2.0 * math.prod(out) * math.prod(kernel) / outputs
    if instruction.opcode == "fusion":
        inner = instruction.called[0]
        return sum(operations(module, each, inner) for each in module.computations[inner].values())
    if instruction.opcode == "dot":
        (_, left), *_ = _operand_arrays(module, instruction, where)
        dims = instruction.attributes.split("lhs_contracting_dims={")[1].split("}")[0]
        contracted = math.prod(left[int(dim)] for dim in dims.split(","))
        return 2.0 * sum(math.prod(sizes) for _, sizes in arrays(instruction.shape)) * contracted
    return 0.0


def _operand_arrays(module: Module, instruction: Instruction, where: str) -> list[Any]:
    """The (type, sizes) of an instruction's operands."""
    instructions = module.computations[where]
    return [arrays(instructions[name].shape)[0] for name in instruction.operands]


def elements(instruction: Instruction) -> float:
    """Elements of an instruction's result."""
    return float(sum(math.prod(sizes) for _, sizes in arrays(instruction.shape)))


def traffic(module: Module, instruction: Instruction, where: str) -> float:
    """Bytes that a kernel reads and writes. Of an array of which it takes a slice, the slice."""
    instructions = module.computations[where]
    if instruction.opcode in ("slice", "dynamic-slice"):
        return 2.0 * instruction.bytes
    if instruction.opcode != "fusion":
        return instruction.bytes + sum(instructions[name].bytes for name in instruction.operands)

    inner = module.computations[instruction.called[0]]
    users: dict[str, list[Instruction]] = {}
    for each in inner.values():
        for name in each.operands:
            users.setdefault(name, []).append(each)

    @cache
    def needed(name: str) -> float:
        """Elements of a value of the fusion that are computed or read."""
        value = inner[name]
        total = elements(value) if value.root else 0.0
        for user in users.get(name, []):
            if user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                continue  # updated in place
            sliced = user.opcode in ("slice", "dynamic-slice") and user.operands[0] == name
            share = 1.0 if sliced else elements(value) / elements(user)
            total += share * needed(user.name)
        return min(total, elements(value))

    def written(each: Instruction) -> float:
        if each.opcode == "tuple":
            return sum(written(inner[name]) for name in each.operands)
        if each.opcode == "bitcast":
            return written(inner[each.operands[0]])
        if each.opcode == "dynamic-update-slice":
            return float(inner[each.operands[1]].bytes)
        return float(each.bytes)

    reads = 0.0
    for each in inner.values():
        if each.opcode == "parameter" and each.bytes:
            reads += each.bytes * needed(each.name) / elements(each)
    return reads + sum(written(each) for each in inner.values() if each.root)


def class_of(module: Module, instruction: Instruction, flops: float) -> str:
    """The class of a kernel, one of CLASSES."""
    path = module.path(instruction)
    if "/decode/" in path:
        return "decoder"
    if instruction.opcode.removesuffix("-start") in COLLECTIVES:
        return "transfers"
    if instruction.target in ATTENTION:
        return "attention"
    if flops:
        return "products"
    opcodes = {instruction.opcode}
    if instruction.opcode == "fusion":
        opcodes = {each.opcode for each in module.computations[instruction.called[0]].values()}
    return "copies" if opcodes <= COPIES else "norms, rotary, elementwise"


def bound(
    module: Module, steps: dict[str, float], rate: float, bandwidth: float, link: float
) -> Counter[str]:
    """Seconds of an execution by class of kernel.

    steps: {scope: how often the loop runs}, where the program does not say it.
    """
    # The first scope of a computation, by any of its kernels that has one.
    scopes: dict[str, str] = {}
    for computation, instruction in module.kernels():
        scope = scope_of(module.path(instruction))
        if scope:
            scopes.setdefault(computation, scope[0])

    seconds: Counter[str] = Counter()
    for computation, instruction in module.kernels():
        if instruction.opcode.endswith("-done"):
            continue
        flops = operations(module, instruction, computation)
        kind = class_of(module, instruction, flops)
        if kind == "transfers":
            time = instruction.bytes / link
        else:
            time = max(flops / rate, traffic(module, instruction, computation) / bandwidth)
        runs = module.runs[computation] * steps.get(scopes.get(computation, ""), 1)
        seconds[kind] += runs * time
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="flux_grpo:flux_dev_1xh200")
    parser.add_argument("--target", default="h200")
    parser.add_argument("--devices", type=int, default=0)
    parser.add_argument("--products", type=float, default=790, help="TFLOP/s")
    parser.add_argument("--link", type=float, default=450, help="GB/s")
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_args()

    name, preset = args.config.split(":")
    config = importlib.import_module(f"realgen_configs.{name}").get_config(preset)
    for item in args.keys:
        key, value = item.split("=", 1)
        config.update_from_flattened_dict({key: json.loads(value)})
    card = CARDS[args.target]
    devices = args.devices or config.preflight.devices
    report = make_report(config, devices, target_devices(args.target, devices))
    work, parts = report.work, report.parts

    rows = []
    results: dict[str, Any] = {}
    for program, compiled in compile_programs(report, lowered(report)).items():
        module = read_module(compiled.text)
        seconds = bound(
            module,
            {"prefix": work.prefix, "suffix": work.steps - work.prefix - work.window},
            args.products * 1e12,
            card.bandwidth,
            args.link * 1e9,
        )
        results[program] = dict(seconds)
        total = sum(seconds.values())
        cells = [f"{1e3 * seconds[kind]:,.1f} ({seconds[kind] / total:.0%})" for kind in CLASSES]
        rows.append([program, *cells, f"{1e3 * total:,.1f}"])
    measure.print_table(("ms of a call", *CLASSES, "total"), rows)

    # An image's steps, on one device; an update's operations without rematerialisation.
    images = work.images / parts
    sampling = sum(results["sample"].values()) / images
    steps = sampling - results["sample"].get("decoder", 0.0) / images
    flops = cost.update_flops(work)
    useful = sum(flops.values()) - flops["remat"]
    useful -= work.backward_passes * work.formulas.forward_flops(work)["attention"] / 2
    calls = report.recipe.config.train.gradient_accumulation_steps
    useful *= calls * work.trained * images
    update = sum(results["update"].values())
    mfu = useful / (update * card.tflops * 1e12)
    print(
        f"\nbound: {steps:.2f} s an image for {work.steps:g} steps ({sampling:.2f} with the "
        f"decoder), {update:.1f} s an update; its operations without rematerialisation are "
        f"{mfu:.2f} of {card.tflops} TFLOP/s"
    )


if __name__ == "__main__":
    main()
