"""Print a preflight report as tables."""

import itertools
import math
from collections.abc import Callable
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from realgen_jax.models import cost
from realgen_jax.models.loading import default_model, rollout_sizes
from realgen_jax.models.model import Model
from realgen_jax.preflight.advice import Tried, advice
from realgen_jax.preflight.figures import (
    ACCELERATORS,
    GIB,
    HOST_LIMIT,
    PCIE,
    TERA,
    Accelerator,
    accelerator,
    figures,
)
from realgen_jax.preflight.report import Report, host_bytes
from realgen_jax.preflight.rewriter import RewriterReport
from realgen_jax.sharding import batch_devices
from realgen_jax.training.progress import plain_console

PETA = 1e15

# The columns of the table of memory, by phase.
COLUMNS = {
    "previews": "previews",
    "sample": "sampling",
    "rewrite": "rewriting",
    "draw": "drawing",
    "update": "update",
    "evaluation": "evaluation",
}


def show(
    report: Report,
    arguments: dict[str, int],
    mfu: float,
    described: bool,
    changes: Callable[[Report, float], tuple[Tried, Tried]],
) -> dict[str, Any]:
    """Print the tables and return their figures.

    Args:
        report: The run's report.
        arguments: The programs' argument bytes according to XLA; empty if they were not compiled.
        mfu: The fraction of peak FLOP/s that is reached.
        described: Whether the model's own config files were found.
        changes: Returns the changes that make a report's run fit into a number of bytes per device,
            and all changes that were tried.
    """
    console = plain_console()

    # The computation and the devices.
    if not described:
        console.print(default_sizes(report))
    console.print(summary(report))

    # Memory and operations.
    console.print(bytes_table(report))
    for line in in_host_memory(report, report.work, report.model, mfu):
        console.print(f"{line}\n")
    if arguments:
        sizes = ", ".join(f"{name} {size / GIB:.2f}" for name, size in arguments.items())
        console.print(
            "Both programs compile for this mesh. Size of their arguments according to XLA, in GiB "
            f"per device: {sizes}\n"
        )
    else:
        console.print("Both programs trace and lower for this mesh.\n")
    console.print(flops_table(report))

    # Time, and whether it fits.
    accelerators = [accelerator(report, name, mfu) for name in ACCELERATORS]
    console.print(time_table(report, accelerators, mfu))
    console.print(evaluation_times(accelerators))
    for line in advice(report, accelerators, changes):
        console.print(line)
    return figures(report, arguments, mfu, accelerators)


def default_sizes(report: Report) -> Text:
    """Say that the sizes of the family's published model are used instead of the model's own."""
    model = report.recipe.config.pretrained.model
    _, published = default_model(report.recipe.config.pretrained)
    words = f": no such folder; using the sizes of {published.name}"
    return Text.assemble((model, "yellow"), words)


def summary(report: Report) -> Text:
    """Describe an iteration in a few lines."""
    recipe = report.recipe
    layout = recipe.layout
    work = report.work

    trained = "all weights, float32 masters"
    if recipe.trainable.rank:
        trained = f"LoRA of rank {recipe.trainable.rank}"
    mesh = " x ".join(f"{axis} {size}" for axis, size in report.model.mesh.shape.items())
    width, height = max(rollout_sizes(recipe.config.sample).values(), key=math.prod)
    others = ", its largest size" if recipe.config.sample.buckets else ""
    per_device = layout.images // report.parts
    train = recipe.config.train
    steps = layout.calls // train.gradient_accumulation_steps * train.num_inner_epochs
    if work.window:
        where = (
            f"The window of {work.window} steps starts after {work.prefix:g} of {work.steps:g} "
            "steps on average."
        )
    else:
        where = (
            f"An image takes {work.steps:g} steps without noise and is trained on at "
            f"{work.trained} noise levels."
        )
    return Text.assemble(
        (recipe.config.preset, "bold"),
        f"  {trained}, on {report.devices} training devices "
        f"({mesh})\n"
        f"One iteration: {layout.calls * layout.images} images of {width} x {height} pixels{others}"
        f" ({layout.groups} prompts, {layout.group} images each) in {layout.calls} calls of "
        f"{layout.images} images ({per_device} per device), then {steps} optimizer steps. "
        f"{where}{guidance(report)}\n",
    )


def guidance(report: Report) -> str:
    """Say what classifier-free guidance costs; "" without it."""
    if not report.work.guided:
        return ""
    gradient = "both" if report.work.free_gradient else "the one with the prompt alone"
    return (
        f" Guidance of {report.recipe.config.sample.guidance_scale:g}: each velocity takes two "
        f"passes of the transformer, and the gradient goes through {gradient}."
    )


def new_table(title: str, left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    """Return an empty table with left-aligned columns, then right-aligned ones."""
    table = Table(title=title, box=box.SIMPLE, title_justify="left", title_style="bold")
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    return table


def bytes_table(report: Report) -> Table:
    """The memory of one device in each phase."""
    columns = tuple(COLUMNS[name] for name in report.phases)
    table = new_table("Memory of one device, GiB", ("",), columns)
    labels = memory_labels(report)

    # Arrays that stay in memory all the time.
    for name, size in report.held.items():
        gib = f"{size / GIB:.2f}"
        table.add_row(labels[name], *[gib] * len(report.phases))

    # Arrays of some of the phases.
    phases = list(report.phases.values())
    for name in dict.fromkeys(itertools.chain(*phases)):
        cells = [f"{phase[name] / GIB:.2f}" if name in phase else "-" for phase in phases]
        table.add_row(labels[name], *cells)

    held = sum(report.held.values())
    totals = [f"{(held + sum(phase.values())) / GIB:.1f}" for phase in phases]
    table.add_section()
    table.add_row("total", *totals, style="bold")
    return table


def in_host_memory(
    report: Report | RewriterReport, work: cost.Work, model: Model, mfu: float
) -> list[str]:
    """Say what is in host memory, and how long the blocks' kernels take to the devices.

    work, model: of a call of pictures.
    """
    if not report.host:
        return []
    sizes = ", ".join(f"{name} {size / GIB:.2f}" for name, size in report.host.items())
    line = f"In host memory, GiB for each device: {sizes}."
    needed = report.devices * sum(report.host.values())
    if needed > HOST_LIMIT:
        line += (
            f" All devices together: {needed / GIB:.0f}. On GPUs, give each process its share of it"
            f" by XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB, which is {HOST_LIMIT / 1e9:.0f} by default."
        )
    copied = host_bytes(model.params)
    if copied:
        # One pass over a device's share of a call.
        images = work.images / batch_devices(model.mesh)
        flops = images * sum(cost.velocity_flops(work).values()) / work.passes
        parts = report.devices / batch_devices(model.mesh)
        times = []
        for name, (tflops, _) in ACCELERATORS.items():
            if not name.startswith("TPU"):
                seconds = flops / (parts * tflops * TERA * mfu)
                times.append(f"{name} {clock(seconds)}")
        line += (
            f" Each pass of the transformer, forward or backward, copies {copied / GIB:.1f} GiB of "
            f"weights to the device: {clock(copied / PCIE)} at {PCIE / 1e9:.0f} GB/s (PCIe 4.0). "
            f"Its operations take, forward for one call: {', '.join(times)}. Copies run beside "
            "them and are not in the times below; the longer of the two sets the time."
        )
    return [line]


def memory_labels(report: Report) -> dict[str, str]:
    """Return descriptions of the sizes in a report, by name."""
    trained = "LoRA" if report.recipe.trainable.rank else "trained weights"
    return {
        "transformer": "transformer, frozen",
        "autoencoder": "autoencoder",
        "trained": f"{trained}, float32",
        "EMA": "moving average (EMA)",
        "old policy": "old policy",
        "optimizer": "Adam's two moments",
        "trajectories": f"trajectories of {report.work.calls} calls, twice in the update",
        "embeddings": "text embeddings, twice in the update",
        "pictures": "pictures waiting for scores",
        "gradients": "gradients: the sum and the current call's",
        "activations": "activations at their peak",
    }


def flops_table(report: Report) -> Table:
    """The operations of an iteration over all devices."""
    table = new_table("Operations of an iteration, PFLOP", ("",), ("all devices",))
    table.add_column("details")
    for name, details in flops_details(report).items():
        style = "bold" if name == "total" else None
        table.add_row(name, f"{report.flops[name] / PETA:,.1f}", details, style=style)
    return table


def flops_details(report: Report) -> dict[str, str]:
    """Return descriptions of the operations of each part."""
    work = report.work
    forward = cost.velocity_flops(work)
    per_image = (sum(forward.values()) - forward["lora"]) / TERA
    decode = cost.decode_flops(work) / TERA
    branches = work.images // work.slots

    # What rematerialisation recomputes. A flash kernel keeps its scores on chip.
    recomputed = {
        "full": "all blocks computed twice",
        "attention": "all blocks computed twice",
        "dots": "attention computed twice",
        "none": "nothing computed twice",
    }
    if work.flash:
        recomputed["attention"] = "projections computed twice"
        recomputed["dots"] = "elementwise operations computed twice"
    places, shared = "noise levels", ""
    if work.window:
        places, shared = "steps", f", {work.prefix:g} of them for {branches} images at once"
    update = f"{work.trained} {places}, forward and backward, {recomputed[work.model.remat]}"
    if work.reference == 1 and work.window:
        update += ", and the reference"
    elif work.reference:
        update += f", and {work.reference} passes without gradient"
    previews = {}
    if work.previews:
        sizes = f"{work.previews} previews of {work.preview_steps} steps, decoded"
        previews["previews"] = f"{sizes}; {work.images * work.calls} are sampled in full"
    return {
        **previews,
        "rollout": f"{work.steps:g} steps{shared}; {per_image:.1f} TFLOP per step and image",
        "decode": f"{decode:.1f} TFLOP per picture",
        "update": update,
        "total": "",
        "useful": "without recomputation",
        "evaluation": evaluation_call(report),
    }


def evaluation_call(report: Report) -> str:
    """Describe one call of an evaluation."""
    sample = report.recipe.config.evaluate.sample
    images = report.evaluation.images
    return (
        f"one call of {images} images of {sample.width} x {sample.height} pixels, "
        f"{sample.num_steps} {sample.solver} steps; not in the total"
    )


def time_table(report: Report, accelerators: list[Accelerator], mfu: float) -> Table:
    """The time of an iteration on each kind of accelerator, and whether the run fits."""
    table = new_table(
        f"One iteration at {mfu:.0%} of peak FLOP/s, on {report.devices} of each",
        ("",),
        ("sampling", "update", "total", "GiB"),
    )
    table.add_column("fits")
    table.add_column("fraction", justify="right")
    for estimate in accelerators:
        _, gib = ACCELERATORS[estimate.name]
        fraction = "-"
        if estimate.fits and estimate.fraction:
            fraction = f"{estimate.fraction:.2f}"
        table.add_row(
            estimate.name,
            clock(estimate.sample_seconds),
            clock(estimate.seconds - estimate.sample_seconds),
            clock(estimate.seconds),
            f"{estimate.peak / GIB:.1f} of {gib:.0f}",
            Text("yes", "green") if estimate.fits else Text("no", "red"),
            fraction,
        )
    return table


def evaluation_times(accelerators: list[Accelerator]) -> str:
    """The time of one call of an evaluation on each kind of accelerator."""
    times = [f"{each.name} {clock(each.evaluation_seconds)}" for each in accelerators]
    return f"One call of an evaluation: {', '.join(times)}.\n"


def clock(seconds: float) -> str:
    """Format a duration in seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.3g} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
