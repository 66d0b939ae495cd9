"""The estimate of a run that trains the rewriter: memory and seconds by part of an epoch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from realgen_jax.preflight.figures import ACCELERATORS, TERA
from realgen_jax.preflight.report import device_bytes, host_sizes, tpu_work
from realgen_jax.sharding import batch_devices, batch_sharding, make_mesh, replicated
from realgen_jax.training.programs import (
    Recipe,
    abstract_state,
    check_mesh,
    check_model,
    make_recipe,
)
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

    work: the sizes of the rewrites. drawing, evaluation: those of a call of pictures. held: {name:
    bytes} that stay in memory. host: the same for host memory. phases: {phase: {name: bytes}}.
    flops: operations of an epoch over all devices, by part. read: bytes that one device reads while
    rewrites are sampled.
    """

    recipe: Recipe
    language: LanguageModel
    model: Model
    work: language_cost.LanguageWork
    drawing: cost.Work
    evaluation: cost.Work
    devices: int
    held: dict[str, int]
    host: dict[str, int]
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
    arrays = {
        "language model": language.params,
        "image model": model.params,
        "autoencoder": model.vae_params,
        "trained": state.trainable,
        "EMA": state.ema,
        "optimizer": state.opt_state,
    }
    work = language_work(recipe, language)
    drawing = drawing_work(recipe, model, recipe.layout.images, config.sample)
    evaluation = drawing_work(
        recipe, evaluated, config.sample.test_batch_size, config.evaluate.sample
    )
    return RewriterReport(
        recipe=recipe,
        language=language,
        model=model,
        work=work,
        drawing=drawing,
        evaluation=evaluation,
        devices=mesh.size,
        held={name: device_bytes(tree) for name, tree in arrays.items()},
        host=host_sizes(arrays),
        phases=_phases(work, drawing, evaluation, parts, trained),
        flops={
            **language_cost.epoch_flops(work),
            "draw": recipe.layout.calls * cost.sampling_flops(drawing),
        },
        read=language_cost.decode_bytes_read(work, parts),
    )


def rewriter_on_tpu(report: RewriterReport) -> RewriterReport:
    """Return the report of a TPU, where the language model has no flash kernel."""
    work = replace(report.work, flash=False)
    drawing = tpu_work(report.drawing, report.model)
    evaluation = tpu_work(report.evaluation, report.model)
    parts = batch_devices(report.language.mesh)
    return replace(
        report,
        work=work,
        drawing=drawing,
        evaluation=evaluation,
        phases=_phases(work, drawing, evaluation, parts, report.held["trained"]),
    )


def _phases(
    work: language_cost.LanguageWork,
    drawing: cost.Work,
    evaluation: cost.Work,
    parts: int,
    trained: float,
) -> dict[str, dict[str, float]]:
    """Bytes of each phase besides what stays in memory, on one device."""
    return {
        "rewrite": language_cost.rewrite_bytes(work, parts),
        "draw": cost.evaluation_bytes(drawing, parts),
        "update": language_cost.update_bytes(work, parts, trained),
        "evaluation": cost.evaluation_bytes(evaluation, parts),
    }


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
        fsdp=language.mesh.shape["fsdp"],
        tensor=language.mesh.shape["tensor"],
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
