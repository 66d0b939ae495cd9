"""The figures of preflight.py as tables for people and as JSON for machines."""

import math
from collections.abc import Callable
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from realgen_jax.models.flux import cost

GIB = 2**30
TERA = 1e12

# name: (dense bf16 TFLOP/s, GiB that a program sees). NVIDIA's data sheets of A100 (2021), H100 and H200 SXM (2024);
# cloud.google.com/tpu/docs, "TPU v5p" and "TPU v6e" (a chip each).
ACCELERATORS = {
    "A100 80 GB": (312, 79.0),
    "H100 SXM": (989, 78.0),
    "H200 SXM": (989, 139.0),
    "TPU v5p": (459, 95.0),
    "TPU v6e": (918, 31.2),
}
USABLE = 0.95  # of that memory: the rest goes to the driver's context, the kernels' workspaces, and holes
KEPT_SIDE = 518  # the most pixels a side that a reward that learns keeps of a picture
DEFAULT_FRACTION = 0.75  # of a GPU that JAX claims at its start

WORDS = {
    "transformer": "transformer, frozen",
    "autoencoder": "autoencoder",
    "trained": "{trained}",
    "EMA": "their average (EMA)",
    "optimizer": "Adam's two moments",
    "trajectories": "trajectories of {calls} calls{twice}",
    "embeddings": "text embeddings{twice}",
    "pictures": "pictures, until they are scored",
    "gradients": "gradients, sum and present call",
    "activations": "activations at their peak",
}


def show(
    report: Any,
    arguments: dict[str, int],
    mfu: float,
    described: bool,
    changes: Callable[[float], tuple[list, list]],
) -> dict[str, Any]:
    """Print the tables and return their figures. changes(bytes): what makes the run fit into so many bytes a device."""
    console = Console(highlight=False, width=None)
    config = report.recipe.config
    if not described:
        sizes = (
            "no config.json beside its weights"
            if config.pretrained.transformer
            else "no such folder"
        )
        console.print(
            f"[yellow]{config.pretrained.model}[/yellow]: {sizes}; the sizes are those of FLUX.1-dev"
        )
    console.print(summary(report))
    console.print(bytes_table(report))
    if arguments:
        text = ", ".join(f"{name} {size / GIB:.2f}" for name, size in arguments.items())
        console.print(
            f"Both programs compile for this mesh. Arguments by XLA, GiB a device: {text}\n"
        )
    else:
        console.print("Both programs trace and lower for this mesh.\n")
    console.print(flops_table(report))
    rows = [accelerator(report, name, mfu) for name in ACCELERATORS]
    console.print(time_table(report, rows, mfu))
    for line in advice(report, rows, changes):
        console.print(line)
    return figures(report, arguments, mfu, rows)


def summary(report: Any) -> str:
    layout, config, mesh = report.recipe.layout, report.recipe.config, report.pipe.mesh.shape
    steps = layout.calls // config.train.gradient_accumulation_steps * config.train.num_inner_epochs
    what = (
        f"LoRA of rank {report.recipe.lora.rank}"
        if report.recipe.lora
        else "all weights, float32 masters"
    )
    side, each = config.sample.resolution, layout.images // report.parts
    where = " x ".join(f"{axis} {size}" for axis, size in mesh.items())
    return (
        f"[bold]{config.preset}[/bold]  {what}, on {report.devices} training devices ({where})\n"
        f"an iteration: {layout.calls * layout.images} images of {side} x {side} pixels, {layout.groups} prompts with "
        f"{layout.group} images each, in {layout.calls} calls of {layout.images} ({each} a device); {steps} optimizer "
        f"steps; the window of {report.work.window} steps begins after {report.work.prefix:g} of {report.work.steps} "
        "on average\n"
    )


def bytes_table(report: Any) -> Table:
    trained = "LoRA, float32" if report.recipe.lora else "trained weights, float32"
    table = Table(
        title="Memory of one device, GiB", box=box.SIMPLE, title_justify="left", title_style="bold"
    )
    for name in ("", "sampling", "update"):
        table.add_column(name, justify="right" if name else "left")
    for name, size in report.held.items():
        table.add_row(WORDS[name].format(trained=trained), *[f"{size / GIB:.2f}"] * 2)
    sample, update = report.phases["sample"], report.phases["update"]
    for name in dict.fromkeys([*sample, *update]):
        twice = ", twice in the update" if name in ("trajectories", "embeddings") else ""
        label = WORDS[name].format(calls=report.work.calls, twice=twice)
        table.add_row(
            label, *(f"{p[name] / GIB:.2f}" if name in p else "-" for p in (sample, update))
        )
    held = sum(report.held.values())
    totals = [f"{(held + sum(p.values())) / GIB:.1f}" for p in (sample, update)]
    table.add_section()
    table.add_row("in all", *totals, style="bold")
    return table


def flops_table(report: Any) -> Table:
    work, forward = report.work, cost.forward_flops(report.work)
    per_image = sum(forward.values()) - forward["lora"]
    table = Table(
        title="Operations of an iteration, PFLOP",
        box=box.SIMPLE,
        title_justify="left",
        title_style="bold",
    )
    table.add_column("")
    table.add_column("all devices", justify="right")
    table.add_column("what it is")
    flops, steps = report.flops, work.steps
    products = f"{per_image / TERA:.1f} TFLOP a step and image"
    remat = {
        "full": "all blocks twice",
        "attention": "projections twice" if work.flash else "all blocks twice",
        "dots": "elementwise operations twice" if work.flash else "attention twice",
        "none": "nothing twice",
    }[work.model.remat]
    reference = ", and the reference" if work.reference else ""
    rows = {
        "rollout": f"{steps} steps, {work.prefix:g} of them for {work.images // work.slots} images at once; {products}",
        "decode": f"{cost.decode_flops(work) / TERA:.1f} TFLOP a picture",
        "update": f"{work.window} steps, forward and backward, {remat}{reference}",
        "total": "",
        "useful": "without what is computed a second time",
    }
    for name, text in rows.items():
        table.add_row(
            name, f"{flops[name] / 1e15:,.1f}", text, style="bold" if name == "total" else None
        )
    return table


def accelerator(report: Any, name: str, mfu: float) -> dict[str, Any]:
    """Seconds of an iteration, whether it fits, and the share of the memory that JAX has to be given."""
    tflops, gib = ACCELERATORS[name]
    fraction = report.peak / (gib * GIB)
    return {
        "name": name,
        "seconds": report.flops["total"] / (report.devices * tflops * TERA * mfu),
        "sample_seconds": (report.flops["rollout"] + report.flops["decode"])
        / (report.devices * tflops * TERA * mfu),
        "fits": fraction <= USABLE,
        "share": fraction,
        "fraction": None if "TPU" in name else fraction_for(fraction),
    }


def time_table(report: Any, rows: list[dict], mfu: float) -> Table:
    title = f"An iteration at {mfu:.0%} of the peak, on {report.devices} of each"
    table = Table(title=title, box=box.SIMPLE, title_justify="left", title_style="bold")
    for name in ("", "sampling", "update", "together", "GiB", "fits", "fraction"):
        table.add_column(name, justify="right" if name not in ("", "fits") else "left")
    for row in rows:
        sample, both = row["sample_seconds"], row["seconds"]
        need = f"{report.peak / GIB:.1f} of {ACCELERATORS[row['name']][1]:.0f}"
        fits = "[green]yes[/green]" if row["fits"] else "[red]no[/red]"
        fraction = f"{row['fraction']:.2f}" if row["fits"] and row["fraction"] else "-"
        table.add_row(
            row["name"], clock(sample), clock(both - sample), clock(both), need, fits, fraction
        )
    return table


def fraction_for(share: float) -> float:
    """XLA_CLIENT_MEM_FRACTION for a run that needs this share of a GPU: a tenth more, in steps of 0.05."""
    return min(USABLE, math.ceil(share * 1.1 / 0.05) * 0.05)


def clock(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def advice(
    report: Any, rows: list[dict], changes: Callable[[float], tuple[list, list]]
) -> list[str]:
    """What the tables mean, and for every accelerator that is too small what was tried and fits."""
    lines = [
        "Not counted: the rewards (they score beside the next call), evaluations, checkpoints, communication. "
        "Activations are an estimate: within 15 % of XLA's on CPU devices, also over fsdp; a split over tensor needs "
        "less; not yet compared with a GPU or TPU.",
        f"fraction: start with this XLA_CLIENT_MEM_FRACTION where it is above {DEFAULT_FRACTION} (what JAX claims of a "
        "GPU unless told otherwise), or where rewards share the GPU; they have the rest.",
        *learners(report.recipe),
    ]
    for row in rows:
        if row["fits"]:
            continue
        room = USABLE * ACCELERATORS[row["name"]][1] * GIB
        fitting, tried = changes(room)
        lines.append(
            f"\n[bold]{row['name']}[/bold]: {report.peak / GIB:.1f} GiB of {room / GIB:.1f} that can be used"
        )
        if not fitting:
            best = min((one.peak for _, one in tried), default=report.peak)
            lines.append(
                f"  No change that was tried fits; the best needs {best / GIB:.1f} GiB.{other_counts(report)}"
            )
        lines += [f"  fits with {describe(report, change, one)}" for change, one in fitting[:3]]
    return lines


def learners(recipe: Any) -> list[str]:
    """What rewards that learn do in an epoch, and what their history takes."""
    lines, pairs = [], recipe.layout.calls * recipe.layout.images
    side = min(recipe.config.sample.resolution, KEPT_SIDE)
    for name, a in recipe.config.reward.adversarial.items():
        steps = a.max_passes * -(-pairs // (a.batch_size or pairs))
        history = 2 * 3 * side**2 * a.history_size / GIB
        rest = (
            f" The generator rests in {a.learn_epochs} of {a.cycle} epochs."
            if a.skip_generator
            else ""
        )
        lines.append(
            f"{name} learns: up to {steps:,} steps in such an epoch, of {a.batch_size or pairs} + "
            f"{a.history_batch_size} pairs, all processes together. Its history takes up to {history:.2g} GiB in host "
            f"memory, and in every checkpoint, for every process.{rest}"
        )
    return lines


def other_counts(report: Any) -> str:
    """The nearest numbers of devices that can share the weights, where this one cannot."""
    width, n = report.work.model.hidden_dim, report.devices
    if width % n == 0 and n > 1:
        return " Take more devices."
    able = [m for m in range(2, width + 1) if width % m == 0]
    near = sorted({max((m for m in able if m < n), default=able[0]), min(m for m in able if m > n)})
    text = " or ".join(map(str, near))
    split = f"split the weights' width of {width} (mesh.fsdp)"
    return (
        f" {text} devices could {split}." if n == 1 else f" {n} devices cannot {split}, {text} can."
    )


def describe(report: Any, change: dict[str, Any], one: Any) -> str:
    """The change as options, and what it moves most."""
    options = " ".join(f"--config.{key}={value}" for key, value in change.items())
    before, after = sizes(report), sizes(one)
    what = max(before, key=lambda name: before[name] - after[name])
    return (
        f"{options}\n    ({what} {before[what] / GIB:.1f} -> {after[what] / GIB:.1f} GiB, "
        f"in all {report.peak / GIB:.1f} -> {one.peak / GIB:.1f})"
    )


def sizes(report: Any) -> dict[str, float]:
    phases = {
        f"{name} ({phase})": size for phase, p in report.phases.items() for name, size in p.items()
    }
    return {**report.held, **phases}


def figures(report: Any, arguments: dict[str, int], mfu: float, rows: list[dict]) -> dict[str, Any]:
    layout, work = report.recipe.layout, report.work
    return {
        "preset": report.recipe.config.preset,
        "devices": report.devices,
        "mesh": dict(report.pipe.mesh.shape),
        "images": layout.calls * layout.images,
        "prompts": layout.groups,
        "mean_prefix": work.prefix,
        "bytes": {
            "held": report.held,
            **report.phases,
            "peak": report.peak,
            "arguments_by_xla": arguments,
        },
        "flops": {
            **report.flops,
            "forward": cost.forward_flops(work),
            "update_image_step": cost.update_flops(work),
        },
        "mfu": mfu,
        "accelerators": {
            row["name"]: {k: v for k, v in row.items() if k != "name"} for row in rows
        },
    }
