"""The estimate of a run: program arguments as ShapeDtypeStructs on the target mesh, and costs."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from realgen_jax.models import cost
from realgen_jax.models.guidance import is_guided
from realgen_jax.models.loading import EVALUATIONS, abstract_model, rollout_sizes, size_of
from realgen_jax.models.model import Model
from realgen_jax.nn.attention import fills_tiles
from realgen_jax.nn.convert import leaves
from realgen_jax.sharding import (
    batch_devices,
    batch_sharding,
    is_on_host,
    make_mesh,
    replicated,
)
from realgen_jax.training.programs import (
    Programs,
    Recipe,
    abstract_state,
    check_mesh,
    check_model,
    make_programs,
    make_recipe,
)
from realgen_jax.update import Batch

# Kernels that XLA copies into another layout on TPUs: those of queries, keys and values
# (sharding.py), and in Z-Image those before an RMS norm.
TURNED = re.compile(r".*qkv\.kernel|layers\.(proj|mlp\.fc2)\.kernel")

# The code is never run, and its planned memory is the same without optimisation.
QUICK = {"xla_backend_optimization_level": 0}


@dataclass(frozen=True)
class Report:
    """The estimate of a run; bytes are per device.

    model: that of the rollouts' largest pictures. work, evaluation: the sizes of the run, and of
    one call of its evaluations. parts: number of parts the batch is split into. held: {name: bytes}
    that stay in memory (weights, trained arrays, optimizer state). host: the same for what stays in
    host memory. phases: {phase: {name: bytes}}.
    flops: operations of an iteration, over all devices, and of one call of an evaluation, which is
    not in the total.
    """

    recipe: Recipe
    model: Model
    work: cost.Work
    evaluation: cost.Work
    parts: int
    devices: int
    held: dict[str, int]
    host: dict[str, int]
    phases: dict[str, dict[str, float]]
    flops: dict[str, float]

    @property
    def peak(self) -> float:
        """Bytes of the phase that needs the most."""
        largest = max(sum(phase.values()) for phase in self.phases.values())
        return sum(self.held.values()) + largest


def with_scores(report: Report) -> Report:
    """Return the report of a device without a flash kernel: attention's scores go to memory."""
    return _with_works(
        report, replace(report.work, flash=False), replace(report.evaluation, flash=False)
    )


def on_tpu(report: Report) -> Report:
    """Return the report of a TPU.

    Its attention kernel takes only some sizes (nn/attention.py), and XLA keeps a turned copy of
    some kernels. Where attention is XLA's, its scores are counted in sampling too, though the
    compiler may keep them on chip there.
    """
    return _with_works(
        report, tpu_work(report.work, report.model), tpu_work(report.evaluation, report.model)
    )


def tpu_work(work: cost.Work, model: Model) -> cost.Work:
    """The sizes that the formulas take on a TPU."""
    kernels = leaves(model.params)
    turned = device_bytes([array for path, array in kernels.items() if TURNED.fullmatch(path)])
    fits = fills_tiles(work.tokens, work.model.attention_head_dim)
    return replace(work, flash=work.flash and fits, turned=turned)


def _with_works(report: Report, work: cost.Work, evaluation: cost.Work) -> Report:
    """The report of other sizes."""
    return replace(
        report,
        work=work,
        evaluation=evaluation,
        phases=_phases(work, evaluation, report.parts, report.held["trained"]),
        flops=_flops(work, evaluation),
    )


def _phases(
    work: cost.Work, evaluation: cost.Work, parts: int, trained: float
) -> dict[str, dict[str, float]]:
    """Bytes of each phase besides what stays in memory, on one device."""
    phases = cost.phase_bytes(work, parts, trained)
    return {**phases, "evaluation": cost.evaluation_bytes(evaluation, parts)}


def _flops(work: cost.Work, evaluation: cost.Work) -> dict[str, float]:
    """Operations of an iteration, and of one call of an evaluation, over all devices."""
    return {**cost.epoch_flops(work), "evaluation": cost.sampling_flops(evaluation)}


def device_bytes(tree: Any) -> int:
    """Bytes of an abstract tree on one device, without what is in host memory."""
    return _bytes([leaf for leaf in jax.tree.leaves(tree) if not is_on_host(leaf)])


def host_bytes(tree: Any) -> int:
    """Bytes of an abstract tree that are in host memory, for one device."""
    return _bytes([leaf for leaf in jax.tree.leaves(tree) if is_on_host(leaf)])


def host_sizes(arrays: Mapping[str, Any]) -> dict[str, int]:
    """`host_bytes` of each tree that has any."""
    sizes = {name: host_bytes(tree) for name, tree in arrays.items()}
    return {name: size for name, size in sizes.items() if size}


def _bytes(arrays: Iterable[jax.ShapeDtypeStruct]) -> int:
    total = 0
    for leaf in arrays:
        shape = leaf.sharding.shard_shape(leaf.shape)
        total += leaf.dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    return total


def make_report(
    config: ConfigDict, devices: int, target: Sequence[jax.Device] | None = None
) -> Report:
    """Return the report of a config on this many devices.

    target: devices to compile for (preflight/targets.py); None: this machine's.
    Raises ValueError for invalid names and sizes, as scripts/train.py would.
    """
    recipe = make_recipe(config)
    mesh = make_mesh(**config.mesh, devices=(target or jax.devices())[:devices])
    check_mesh(recipe, mesh)
    models = []
    for key, size in rollout_sizes(config.sample).items():
        models.append(abstract_model(config.pretrained, size, mesh, recipe.trainable, key))
        check_model(recipe, models[-1])
    model = max(models, key=lambda model: model.token_shape[0])

    state = abstract_state(recipe, model)
    trained = device_bytes(state.trainable)
    arrays = {
        "transformer": model.params,
        "autoencoder": model.vae_params,
        "trained": state.trainable,
        "EMA": state.ema,
        "optimizer": state.opt_state,
        **({"old policy": state.old} if state.old is not None else {}),
    }
    work = make_work(recipe, model)
    size = size_of(config.evaluate.sample)
    evaluated = abstract_model(config.pretrained, size, mesh, recipe.trainable, EVALUATIONS)
    evaluation = evaluation_work(recipe, work, evaluated)
    parts = batch_devices(mesh)
    return Report(
        recipe=recipe,
        model=model,
        work=work,
        evaluation=evaluation,
        parts=parts,
        devices=mesh.size,
        held={name: device_bytes(tree) for name, tree in arrays.items()},
        host=host_sizes(arrays),
        phases=_phases(work, evaluation, parts, trained),
        flops=_flops(work, evaluation),
    )


def make_work(recipe: Recipe, model: Model) -> cost.Work:
    """The sizes that the formulas take."""
    sample = recipe.config.sample
    train = recipe.config.train
    low, high = sample.sde_window_range
    objective = recipe.objective
    update = objective.work
    mesh = model.mesh.shape
    max_tokens = recipe.config.prompts.max_tokens
    dtype = jnp.dtype(recipe.config.prompts.dtype)
    cond_shapes = model.family.cond_shapes(model.config, 1, max_tokens, dtype)
    guided = is_guided(model.family, sample.guidance_scale)
    return cost.Work(
        formulas=model.family.cost,
        model=model.config,
        vae=model.vae,
        image_tokens=model.token_shape[0],
        text_tokens=model.family.text_tokens(max_tokens),
        text_bytes=cost.row_bytes(cond_shapes) * (1 + guided),
        rank=recipe.trainable.rank,
        images=recipe.layout.images,
        slots=recipe.layout.slots,
        steps=objective.make_plan(model.sigmas(sample.num_steps)).mean_steps,
        window=update.recorded,
        trained=update.trained,
        prefix=(low + high - update.recorded) / 2 if objective.coupled else 0,
        calls=recipe.layout.calls,
        inner_epochs=train.num_inner_epochs,
        reference=update.frozen,
        recompute=train.recompute_old,
        guided=guided,
        previews=recipe.layout.groups * recipe.layout.previews,
        preview_steps=sample.scout.num_steps,
        free_gradient=train.cfg_gradient == "both",
        weight_parts=mesh["fsdp"] * mesh["tensor"],
    )


def evaluation_work(recipe: Recipe, work: cost.Work, model: Model) -> cost.Work:
    """The sizes of one call of an evaluation. model: that of its pictures."""
    sample = recipe.config.evaluate.sample
    images = recipe.config.sample.test_batch_size
    guided = is_guided(model.family, sample.guidance_scale)
    return replace(
        work,
        model=model.config,
        image_tokens=model.token_shape[0],
        text_bytes=work.text_bytes // work.passes * (1 + guided),
        images=images,
        slots=images,
        steps=sample.num_steps,
        guided=guided,
    )


def sample_arguments(recipe: Recipe, model: Model) -> tuple:
    """The arguments of programs.sample as ShapeDtypeStructs on the mesh."""
    config = recipe.config
    cond = model.abstract_cond(
        recipe.layout.slots,
        config.prompts.max_tokens,
        jnp.dtype(config.prompts.dtype),
        config.sample.guidance_scale,
        config.train.cfg_gradient,
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(model.mesh))
    trainable = abstract_state(recipe, model).trainable
    plan = recipe.objective.make_plan(model.sigmas(config.sample.num_steps))
    return model, trainable, cond, (key, key), plan


def update_arguments(recipe: Recipe, model: Model, programs: Programs) -> tuple:
    """The arguments of programs.update: the calls of one optimizer step, stacked."""
    arguments = sample_arguments(recipe, model)
    _, record, _ = jax.eval_shape(programs.sample, *arguments)
    calls = recipe.config.train.gradient_accumulation_steps
    images = recipe.layout.images

    def stack(leaf: jax.ShapeDtypeStruct, axis: int | None) -> jax.ShapeDtypeStruct:
        sharding = replicated(model.mesh)
        if axis is not None:
            sharding = batch_sharding(model.mesh, axis=axis)
        return jax.ShapeDtypeStruct((calls, *leaf.shape), leaf.dtype, sharding=sharding)

    def stack_record(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        """Recorded arrays have images on the second axis, or are the same for all images.

        Latents alone, [n, s, c], have them on the first.
        """
        if leaf.ndim == 3 and leaf.shape[0] == images:
            return stack(leaf, 1)
        has_images = leaf.ndim > 1 and leaf.shape[1] == images
        return stack(leaf, 2 if has_images else None)

    record = jax.tree.map(stack_record, record)
    cond = jax.tree.map(lambda leaf: stack(leaf, 1), arguments[2])
    advantages = stack(jax.ShapeDtypeStruct((images,), jnp.float32), 1)
    kl_weights = advantages if recipe.config.train.kl_gate.against else None
    return model, abstract_state(recipe, model), Batch(record, cond, advantages, kl_weights)


def lowered(report: Report) -> dict[str, jax.stages.Lowered]:
    """Trace and lower the run's two large programs for the devices of its mesh."""
    recipe = report.recipe
    model = report.model
    programs = make_programs(recipe, model)
    return {
        "sample": programs.sample.trace(*sample_arguments(recipe, model)).lower(),
        "update": programs.update.trace(*update_arguments(recipe, model, programs)).lower(),
    }


def argument_bytes(programs: Mapping[str, jax.stages.Lowered]) -> dict[str, int]:
    """Compile the programs and return the bytes of their arguments on one device, by XLA."""
    sizes = {}
    for name, program in programs.items():
        memory = program.compile(QUICK).memory_analysis()
        sizes[name] = memory.argument_size_in_bytes
    return sizes
