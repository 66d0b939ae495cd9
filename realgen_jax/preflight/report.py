"""A run on paper: its programs' arguments as ShapeDtypeStructs on the target's mesh, and what they cost."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from realgen_jax.models.flux import cost
from realgen_jax.models.flux.family import Pipeline, abstract_pipeline
from realgen_jax.models.flux.transformer import Cond
from realgen_jax.objectives.grpo import Batch
from realgen_jax.rollout import Trajectory
from realgen_jax.sharding import batch_devices, batch_sharding, make_mesh, replicated
from realgen_jax.training.programs import (
    Programs,
    Recipe,
    abstract_state,
    check_mesh,
    make_programs,
    make_recipe,
)

# the code is never run; what the compiler plans to hold is the same
QUICK = {"xla_backend_optimization_level": 0}


@dataclass(frozen=True)
class Report:
    """A run on paper; bytes are one device's."""

    recipe: Recipe
    pipe: Pipeline
    work: cost.Work
    parts: int  # of the batch
    devices: int
    held: dict[str, int]  # what stays: weights, trained arrays, optimizer state
    phases: dict[str, dict[str, float]]
    flops: dict[str, float]

    @property
    def peak(self) -> float:
        return sum(self.held.values()) + max(sum(phase.values()) for phase in self.phases.values())


def device_bytes(tree: Any) -> int:
    """Bytes of an abstract tree on one device."""
    return sum(
        a.dtype.itemsize * int(np.prod(a.sharding.shard_shape(a.shape), dtype=np.int64))
        for a in jax.tree.leaves(tree)
    )


def make_report(config: ConfigDict, devices: int) -> Report:
    """Raises ValueError for what does not exist, divide or fit together, as train.py would."""
    recipe = make_recipe(config)
    mesh = make_mesh(**config.mesh, devices=jax.devices()[:devices])
    parts = batch_devices(mesh)
    check_mesh(recipe, mesh)
    pipe = abstract_pipeline(config.pretrained, config.sample.resolution, recipe.lora, mesh)
    recipe.plan(pipe)
    state, work = abstract_state(recipe, pipe), make_work(recipe, pipe)
    trainable = device_bytes(state.trainable)
    held = {
        "transformer": device_bytes(pipe.params),
        "autoencoder": device_bytes(pipe.vae_params),
        "trained": trainable,
        "EMA": device_bytes(state.ema),
        "optimizer": device_bytes(state.opt_state),
    }
    phases = cost.phase_bytes(work, parts, trainable)
    return Report(recipe, pipe, work, parts, mesh.size, held, phases, cost.epoch_flops(work))


def make_work(recipe: Recipe, pipe: Pipeline) -> cost.Work:
    """The formulas' sizes."""
    sample, t = recipe.config.sample, recipe.config.train
    low, high = sample.sde_window_range
    return cost.Work(
        model=pipe.model,
        vae=nnx.merge(pipe.vae_graph, pipe.vae_params).config,
        image_tokens=pipe.token_shape[0],
        text_tokens=recipe.config.prompts.max_tokens,
        rank=recipe.lora.rank if recipe.lora else 0,
        images=recipe.layout.images,
        slots=recipe.layout.slots,
        steps=sample.num_steps,
        window=sample.sde_window_size,
        prefix=(low + high - sample.sde_window_size) / 2,
        calls=recipe.layout.calls,
        inner_epochs=t.num_inner_epochs,
        reference=t.beta > 0,
        recompute=t.recompute_old,
        weight_parts=pipe.mesh.shape["fsdp"] * pipe.mesh.shape["tensor"],
    )


def sample_arguments(recipe: Recipe, pipe: Pipeline) -> tuple:
    """Of programs.sample, as ShapeDtypeStructs on the mesh."""
    slots, model, config = recipe.layout.slots, pipe.model, recipe.config
    rows, dtype = batch_sharding(pipe.mesh), jnp.dtype(config.prompts.dtype)
    cond = Cond(
        jax.ShapeDtypeStruct(
            (slots, config.prompts.max_tokens, model.joint_attention_dim), dtype, sharding=rows
        ),
        jax.ShapeDtypeStruct((slots, model.pooled_projection_dim), dtype, sharding=rows),
        jax.ShapeDtypeStruct((slots,), jnp.float32, sharding=rows),
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(pipe.mesh))
    trainable = abstract_state(recipe, pipe).trainable
    return pipe.params, pipe.vae_params, trainable, cond, (key, key), recipe.plan(pipe)


def update_arguments(recipe: Recipe, pipe: Pipeline, programs: Programs) -> tuple:
    """Of programs.update: the calls of one step, stacked."""
    arguments = sample_arguments(recipe, pipe)
    _, t, _ = jax.eval_shape(programs.sample, *arguments)
    calls = recipe.config.train.gradient_accumulation_steps

    def stack(a: jax.ShapeDtypeStruct, axis: int | None) -> jax.ShapeDtypeStruct:
        where = replicated(pipe.mesh) if axis is None else batch_sharding(pipe.mesh, axis=axis)
        return jax.ShapeDtypeStruct((calls, *a.shape), a.dtype, sharding=where)

    trajectory = Trajectory(
        stack(t.latents, 2),
        stack(t.mean, 2),
        stack(t.logp, 2),
        jax.tree.map(lambda a: stack(a, None), t.steps),
    )
    cond = jax.tree.map(lambda a: stack(a, 1), arguments[3])
    advantages = stack(jax.ShapeDtypeStruct((recipe.layout.images,), jnp.float32), 1)
    return pipe.params, abstract_state(recipe, pipe), Batch(trajectory, cond, advantages)


def build(report: Report, compile: bool) -> dict[str, int]:
    """Trace and lower the run's two large programs; their arguments' bytes on one device, by XLA, where compiled."""
    recipe, pipe = report.recipe, report.pipe
    programs = make_programs(recipe, pipe)
    sample = programs.sample.trace(*sample_arguments(recipe, pipe)).lower()
    update = programs.update.trace(*update_arguments(recipe, pipe, programs)).lower()
    if not compile:
        return {}
    return {
        name: lowered.compile(QUICK).memory_analysis().argument_size_in_bytes
        for name, lowered in (("sample", sample), ("update", update))
    }
