"""The table of benchmarks/flux_gpu.py."""

from typing import Any

from flux_suite import GOAL_MFU, GOAL_SECONDS, GPUS, IMAGES, SUITES, Suite, rates
from measure import machine, print_table


def row(
    label: str, program: dict[str, Any], images: int, goal: str, product_tflops: float | None
) -> list[str]:
    """Format a row of the table; the images share the seconds. Absent figures stay empty."""

    def cell(key: str, form: str, scale: float = 1.0) -> str:
        return format(program[key] / scale, form) if key in program else ""

    of_product = f"{program['tflops'] / product_tflops:.1%}" if product_tflops else ""
    return [
        label,
        f"{program['seconds'] / images:.3g}",
        goal,
        cell("mfu", ".1%"),
        of_product,
        cell("planned_bytes", ".1f", 1e9),
        cell("peak_bytes_so_far", ".1f", 1e9),
        cell("compile_seconds", ".1f"),
        cell("cached_compile_seconds", ".1f"),
    ]


def named(suite: Suite, results: dict[str, Any]) -> list[tuple[str, dict[str, Any], int, str]]:
    """Return (label, results, images, goal) of every program measured so far."""
    full = suite is SUITES["full"]
    rows = []

    # Sampling alone, and with decoding as the sum of two programs.
    decode = results.get("sampling", {}).get("decode", {})
    for label, program in results.get("sampling", {}).items():
        if label == "decode":
            rows.append(("decoding alone", program, 1, ""))
            continue
        n = int(label)
        goal = f"{GOAL_SECONDS[n]} s" if full and n in GOAL_SECONDS else ""
        rows.append((f"sampling, batch {n}", program, n, goal))
        if "seconds" in program and "seconds" in decode:
            seconds = program["seconds"] + n * decode["seconds"]
            flops = program["flops"] + n * decode["flops"]
            both = {"seconds": seconds, **rates(flops, seconds)}
            rows.append((f"sampling, batch {n}, with decoding", both, n, ""))

    for label, program in results.get("rollout", {}).items():
        rows.append((f"rollout, 1 slot x {label}", program, int(label), ""))

    goal = f"{GOAL_MFU:.0%} MFU" if full else ""
    for label, program in results.get("update", {}).items():
        policy, n = label.split()
        rows.append((f"update, {policy}, batch {n}", program, int(n), goal))
    return rows


def show(suite: Suite, results: dict[str, Any]) -> None:
    """Print the table, what failed, the iteration, and PyTorch's results."""
    show_programs(suite, results)
    if "tflops" in results.get("product", {}):
        product = results["product"]
        share = f", {product['mfu']:.0%} of the data sheet's rate" if "mfu" in product else ""
        print(f"a bfloat16 product of side {suite.product}: {product['tflops']:.3g} TFLOP/s{share}")

    if "seconds" in results.get("iteration", {}):
        total = results["iteration"]
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in total["parts"].items())
        mfu = f", MFU {total['mfu']:.0%}" if "mfu" in total else ""
        setting = f"{IMAGES} images on {GPUS} GPUs, remat {total['remat']}"
        print(f"RealGen's iteration, {setting}: {total['seconds']:.1f} s ({parts}){mfu}")

    if "torch" in results:
        sampling_seconds = results.get("sampling", {}).get("1", {}).get("seconds", float("nan"))
        step = sampling_seconds / suite.size.steps
        figures = []
        for name, value in results["torch"].items():
            if isinstance(value, float):
                figures.append(f"{name} {value:.3g}")
        text = ", ".join(figures) or results["torch"]
        print(f"torch: {text}; a step of sampling at batch 1 here: {step:.3g} s")


def show_programs(suite: Suite, results: dict[str, Any]) -> None:
    """Print a row for each program, and the reasons of those that failed."""
    header = (
        "program",
        "s/image",
        "goal",
        "MFU",
        "of product",
        "plan, GB",
        "peak, GB",
        "compile, s",
        "cached, s",
    )
    product_tflops = results.get("product", {}).get("tflops")
    rows = []
    failed = []
    for label, program, images, goal in named(suite, results):
        if "seconds" in program:
            rows.append(row(label, program, images, goal, product_tflops))
        else:
            failed.append(f"{label}: {program['failed']}")

    window = suite.size.window
    print(f"\n{machine()}. An update has {window} window steps. Peak: of the process so far.")
    if suite is SUITES["full"]:
        print("Goals are for one H200.")
    else:
        print("This is a toy; its figures mean nothing.")
    print_table(header, rows)
    for line in failed:
        print(line)
