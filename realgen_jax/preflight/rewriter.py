"""The estimate of a run that trains the rewriter: memory and seconds by part of an epoch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from realgen_jax.models import cost, language_cost
from realgen_jax.models.guidance import is_guided
from realgen_jax.models.language import LanguageModel, abstract_language_model
from realgen_jax.models.loading import EVALUATIONS, abstract_model, rollout_sizes, size_of
from realgen_jax.models.model import Model
from realgen_jax.objectives.token_grpo import TokenBatch
from realgen_jax.preflight.figures import ACCELERATORS, GIB, TERA, USABLE, memory_fraction
from realgen_jax.preflight.report import device_bytes
from realgen_jax.preflight.tables import COLUMNS, PETA, clock, new_table
from realgen_jax.sharding import batch_devices, batch_sharding, make_mesh, replicated
from realgen_jax.training.programs import (
    Recipe,
    abstract_state,
    check_mesh,
    check_model,
    make_recipe,
)
from realgen_jax.training.progress import plain_console
from realgen_jax.training.rewriter_programs import make_rewriter_programs

# TB/s of memory. Sources: as of ACCELERATORS (figures.py).
BANDWIDTH = {
    "RTX 4090": 1.008,
    "L40S": 0.864,
    "A100 40 GB": 1.555,
    "A100 80 GB": 2.039,
    "H100 SXM": 3.35,
    "H200 SXM": 4.8,
    "TPU v5p": 2.765,
    "TPU v6e": 1.64,
}
# Fraction of it that the sampling of tokens is assumed to reach.
OF_BANDWIDTH = 0.5


@dataclass(frozen=True)
class RewriterReport:
    """The estimate of a run; bytes are per device.

    held: {name: bytes} that stay in memory. phases: {phase: {name: bytes}}. flops: operations of
    an epoch over all devices, by part. read: bytes that one device reads while rewrites are
    sampled.
    """

    recipe: Recipe
    language: LanguageModel
    model: Model
    work: language_cost.LanguageWork
    devices: int
    held: dict[str, int]
    phases: dict[str, dict[str, float]]
    flops: dict[str, float]
    read: float

    @property
    def peak(self) -> float:
        """Bytes of the phase that needs the most."""
        largest = max(sum(phase.values()) for phase in self.phases.values())
        return sum(self.held.values()) + largest

    def seconds(self, name: str, mfu: float) -> dict[str, float]:
        """Seconds of each part of an epoch on a kind of accelerator, at a fraction of its peak.

        Rewriting takes as long as its memory traffic, if that is longer than its operations.
        """
        tflops, _ = ACCELERATORS[name]
        rate = self.devices * tflops * TERA * mfu
        seconds = {part: flops / rate for part, flops in self.flops.items()}
        traffic = self.read / (BANDWIDTH[name] * TERA * OF_BANDWIDTH)
        seconds["rewrite"] = max(seconds["rewrite"], traffic)
        return seconds


def make_rewriter_report(
    config: ConfigDict, devices: int, target: Sequence[jax.Device] | None = None
) -> RewriterReport:
    """Return the report of a config on this many devices.

    target: devices to compile for (preflight/targets.py); None: this machine's.
    Raises ValueError for invalid names and sizes, as scripts/train.py would.
    """
    recipe = make_recipe(config)
    mesh = make_mesh(**config.mesh, devices=(target or jax.devices())[:devices])
    check_mesh(recipe, mesh)
    parts = batch_devices(mesh)
    ((key, size),) = rollout_sizes(config.sample).items()
    model = abstract_model(config.pretrained, size, mesh, recipe.trainable, key)
    check_model(recipe, model)
    size = size_of(config.evaluate.sample)
    evaluated = abstract_model(config.pretrained, size, mesh, recipe.trainable, EVALUATIONS)
    language = abstract_language_model(config.rewriter, mesh, recipe.trainable)

    state = abstract_state(recipe, language)
    trained = device_bytes(state.trainable)
    held = {
        "language model": device_bytes(language.params),
        "image model": device_bytes(model.params),
        "autoencoder": device_bytes(model.vae_params),
        "trained": trained,
        "EMA": device_bytes(state.ema),
        "optimizer": device_bytes(state.opt_state),
    }
    work = language_work(recipe, language)
    tensor = mesh.shape["tensor"]
    drawing = drawing_work(recipe, model, recipe.layout.images, config.sample)
    evaluation = drawing_work(
        recipe, evaluated, config.sample.test_batch_size, config.evaluate.sample
    )
    return RewriterReport(
        recipe=recipe,
        language=language,
        model=model,
        work=work,
        devices=mesh.size,
        held=held,
        phases={
            "rewrite": language_cost.rewrite_bytes(work, parts, tensor),
            "draw": cost.evaluation_bytes(drawing, parts),
            "update": language_cost.update_bytes(work, parts, trained),
            "evaluation": cost.evaluation_bytes(evaluation, parts),
        },
        flops={
            **language_cost.epoch_flops(work),
            "draw": recipe.layout.calls * cost.sampling_flops(drawing),
        },
        read=language_cost.decode_bytes_read(
            work, parts, mesh.shape["fsdp"] * mesh.shape["tensor"]
        ),
    )


def language_work(recipe: Recipe, language: LanguageModel) -> language_cost.LanguageWork:
    """The sizes that the language model's formulas take."""
    settings = recipe.config.rewriter
    train = recipe.config.train
    rows = settings.prompts_per_epoch * settings.rewrites_per_prompt
    steps = rows // (settings.microbatch * train.gradient_accumulation_steps)
    return language_cost.LanguageWork(
        model=language.config,
        rank=recipe.trainable.rank,
        rows=rows,
        prompt=settings.max_prompt_tokens,
        new=settings.max_new_tokens,
        microbatch=settings.microbatch,
        chunk=settings.logit_chunk,
        reference=train.beta > 0,
        recompute=steps * train.num_inner_epochs > 1 or train.recompute_old,
        inner_epochs=train.num_inner_epochs,
    )


def drawing_work(recipe: Recipe, model: Model, images: int, sample: Any) -> cost.Work:
    """The sizes of one call of the frozen image model. sample: its steps and guidance."""
    prompts = recipe.config.prompts
    guided = is_guided(model.family, sample.guidance_scale)
    cond = model.family.cond_shapes(model.config, 1, prompts.max_tokens, jnp.dtype(prompts.dtype))
    mesh = model.mesh.shape
    return cost.Work(
        formulas=model.family.cost,
        model=model.config,
        vae=model.vae,
        image_tokens=model.token_shape[0],
        text_tokens=model.family.text_tokens(prompts.max_tokens),
        text_bytes=cost.row_bytes(cond) * (1 + guided),
        rank=0,
        images=images,
        slots=images,
        steps=sample.num_steps,
        window=0,
        trained=0,
        prefix=0,
        calls=recipe.layout.calls,
        inner_epochs=0,
        reference=0,
        recompute=False,
        guided=guided,
        weight_parts=mesh["fsdp"] * mesh["tensor"],
    )


# -- Programs


def lowered_rewriter(report: RewriterReport) -> dict[str, jax.stages.Lowered]:
    """Trace and lower the run's three large programs for the devices of its mesh."""
    recipe = report.recipe
    language = report.language
    model = report.model
    mesh = model.mesh
    config = recipe.config
    state = abstract_state(recipe, language)
    programs = make_rewriter_programs(recipe, language, model, ends=(0,), pad=0)

    def rows(*shape: int, dtype: Any, axis: int = 0) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh, axis=axis))

    def whole(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(mesh))

    # Rewrites: all of an epoch in one call.
    work = report.work
    prompts = (work.rows, work.prompt)
    key = jax.eval_shape(lambda: jax.random.key(0)).dtype
    rewrite = (
        language,
        state.trainable,
        rows(*prompts, dtype=jnp.int32),
        rows(*prompts, dtype=jnp.bool_),
        whole((work.rows,), key),
    )

    # An optimizer step on them: its microbatches are stacked.
    tokens, _ = jax.eval_shape(programs.rewrite, *rewrite)
    calls = config.train.gradient_accumulation_steps

    def stack(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return rows(calls, work.microbatch, *leaf.shape[1:], dtype=leaf.dtype, axis=1)

    tokens = jax.tree.map(stack, tokens)
    batch = TokenBatch(
        tokens=tokens,
        advantages=rows(calls, work.microbatch, dtype=jnp.float32, axis=1),
        reference=tokens.logp if work.reference else None,
        old=tokens.logp if work.recompute else None,
        denominators=whole((), jnp.float32),
    )

    # A call of pictures, of the image model as it is published.
    images = recipe.layout.images
    cond = model.abstract_cond(
        images,
        config.prompts.max_tokens,
        jnp.dtype(config.prompts.dtype),
        config.sample.guidance_scale,
    )
    draw = (model, None, cond, whole((), key), rows(images, dtype=jnp.int32))

    return {
        "rewrite": programs.rewrite.trace(*rewrite).lower(),
        "draw": programs.draw.trace(*draw).lower(),
        "update": programs.update.trace(language, state, batch).lower(),
    }


# -- Tables

LABELS = {
    "trained": "trained weights, float32",
    "EMA": "moving average (EMA)",
    "optimizer": "Adam's two moments",
    "gradients": "gradients: the sum and the current microbatch's",
    "embeddings": "text embeddings",
    "activations": "activations at their peak",
    "block inputs": "inputs of all blocks",
}


def show_rewriter(report: RewriterReport, mfu: float) -> dict[str, Any]:
    """Print the tables and return their figures."""
    console = plain_console()
    console.print(_summary(report))
    console.print(_bytes_table(report))
    console.print(_time_table(report, mfu))
    console.print(
        "Rewards and text encoders are not counted: they run on the reward's device, and score and "
        "encode other calls while one is drawn.\n"
    )
    by_name = {}
    for name, (_, gib) in ACCELERATORS.items():
        share = report.peak / (gib * GIB)
        by_name[name] = {
            "seconds": report.seconds(name, mfu),
            "fits": share <= USABLE,
            "share": share,
        }
    return {
        "preset": report.recipe.config.preset,
        "devices": report.devices,
        "mesh": dict(report.model.mesh.shape),
        "bytes": {"held": report.held, **report.phases, "peak": report.peak},
        "flops": report.flops,
        "mfu": mfu,
        "accelerators": by_name,
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


def _time_table(report: RewriterReport, mfu: float) -> Any:
    title = (
        f"One epoch at {mfu:.0%} of peak FLOP/s and {OF_BANDWIDTH:.0%} of the bandwidth, "
        f"on {report.devices} of each"
    )
    parts = ("rewrite", "draw", "reference", "update")
    table = new_table(title, ("",), (*parts, "total", "GiB", "fraction"))
    petaflops = [f"{report.flops[part] / PETA:,.2f}" for part in parts]
    table.add_row("PFLOP, all devices", *petaflops, f"{sum(report.flops.values()) / PETA:,.1f}")
    for name, (_, gib) in ACCELERATORS.items():
        seconds = report.seconds(name, mfu)
        share = report.peak / (gib * GIB)
        fraction = f"{memory_fraction(share):.2f}" if share <= USABLE else "does not fit"
        if name.startswith("TPU"):
            fraction = "-" if share <= USABLE else "does not fit"
        table.add_row(
            name,
            *[clock(seconds[part]) for part in parts],
            clock(sum(seconds.values())),
            f"{report.peak / GIB:.1f} of {gib:.0f}",
            fraction,
        )
    return table
