"""The tables of a run that trains the rewriter."""

from typing import Any

from realgen_jax.preflight.figures import ACCELERATORS, GIB, USABLE, memory_fraction
from realgen_jax.preflight.rewriter import OF_BANDWIDTH, RewriterReport, rewriter_on_tpu
from realgen_jax.preflight.tables import COLUMNS, PETA, clock, in_host_memory, new_table
from realgen_jax.training.progress import plain_console

LABELS = {
    "trained": "trained weights, float32",
    "EMA": "moving average (EMA)",
    "optimizer": "Adam's two moments",
    "gradients": "gradients, summed and of a microbatch",
    "head": "the head, gathered, and its gradient",
    "embeddings": "text embeddings",
    "activations": "activations at their peak",
    "block inputs": "inputs of all blocks",
}


def show_rewriter(report: RewriterReport, mfu: float) -> dict[str, Any]:
    """Print the tables and return their figures."""
    by_name = {name: _accelerator(report, name, mfu) for name in ACCELERATORS}
    console = plain_console()
    console.print(_summary(report))
    console.print(_bytes_table(report))
    for line in in_host_memory(report, report.drawing, report.model, mfu):
        console.print(f"{line}\n")
    console.print(_time_table(report, mfu, by_name))
    console.print(
        "Rewards and text encoders are not counted: they run on the reward's device, and score and "
        "encode other calls while one is drawn.\n"
    )
    return {
        "preset": report.recipe.config.preset,
        "devices": report.devices,
        "mesh": dict(report.model.mesh.shape),
        "bytes": {"held": report.held, "host": report.host, **report.phases, "peak": report.peak},
        "flops": report.flops,
        "mfu": mfu,
        "accelerators": by_name,
    }


def _accelerator(report: RewriterReport, name: str, mfu: float) -> dict[str, Any]:
    """An epoch on a kind of accelerator. peak: bytes of a device; share: of its memory."""
    if name.startswith("TPU"):
        report = rewriter_on_tpu(report)
    _, gib = ACCELERATORS[name]
    share = report.peak / (gib * GIB)
    return {
        "seconds": report.seconds(name, mfu),
        "fits": share <= USABLE,
        "peak": report.peak,
        "share": share,
    }


def _summary(report: RewriterReport) -> str:
    config = report.recipe.config
    settings = config.rewriter
    rank = report.recipe.trainable.rank
    trained = f"LoRA of rank {rank}" if rank else "all weights, float32 masters"
    layout = report.recipe.layout
    mesh = " x ".join(f"{axis} {size}" for axis, size in report.language.mesh.shape.items())
    step = settings.microbatch * config.train.gradient_accumulation_steps
    return (
        f"{config.preset}  {trained} of the language model, on {report.devices} training devices "
        f"({mesh})\nOne epoch: {settings.prompts_per_epoch} prompts x "
        f"{settings.rewrites_per_prompt} rewrites of up to {settings.max_new_tokens} tokens, "
        f"{layout.calls * layout.images} images of {config.sample.width} x {config.sample.height} "
        f"pixels in {layout.calls} calls, then {report.work.rows // step} optimizer steps.\n"
    )


def _bytes_table(report: RewriterReport) -> Any:
    table = new_table(
        "Memory of one device, GiB", ("",), tuple(COLUMNS[name] for name in report.phases)
    )
    for name, size in report.held.items():
        table.add_row(LABELS.get(name, name), *[f"{size / GIB:.2f}"] * len(report.phases))
    phases = list(report.phases.values())
    for name in dict.fromkeys(key for phase in phases for key in phase):
        cells = [f"{phase[name] / GIB:.2f}" if name in phase else "-" for phase in phases]
        table.add_row(LABELS.get(name, name), *cells)
    held = sum(report.held.values())
    totals = [f"{(held + sum(phase.values())) / GIB:.1f}" for phase in phases]
    table.add_section()
    table.add_row("total", *totals, style="bold")
    return table


def _time_table(report: RewriterReport, mfu: float, by_name: dict[str, dict[str, Any]]) -> Any:
    title = (
        f"One epoch at {mfu:.0%} of peak FLOP/s and {OF_BANDWIDTH:.0%} of the bandwidth, "
        f"on {report.devices} of each"
    )
    parts = ("rewrite", "draw", "reference", "update")
    table = new_table(title, ("",), (*parts, "total", "GiB", "fraction"))
    petaflops = [f"{report.flops[part] / PETA:,.2f}" for part in parts]
    table.add_row("PFLOP, all devices", *petaflops, f"{sum(report.flops.values()) / PETA:,.1f}")
    for name, there in by_name.items():
        fraction = f"{memory_fraction(there['share']):.2f}" if there["fits"] else "does not fit"
        if name.startswith("TPU"):
            fraction = "-" if there["fits"] else "does not fit"
        table.add_row(
            name,
            *[clock(there["seconds"][part]) for part in parts],
            clock(sum(there["seconds"].values())),
            f"{there['peak'] / GIB:.1f} of {ACCELERATORS[name][1]:.0f}",
            fraction,
        )
    return table
