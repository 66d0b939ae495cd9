"""The compiled programs of a run and what they are made of. Arrays come in as arguments only, so that preflight.py can
build the same programs without weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from realgen_jax.data import Layout
from realgen_jax.models.flux.family import Pipeline
from realgen_jax.nn.lora import LoraConfig, init_lora
from realgen_jax.objectives.grpo import (
    EmaConfig,
    LossConfig,
    TrainState,
    make_optimizer,
    recompute_means,
    update,
)
from realgen_jax.rollout import Plan, draw_noise, make_plan, rollout
from realgen_jax.sharding import batch_devices, batch_sharding, replicated


@dataclass(frozen=True)
class Recipe:
    """What an epoch computes, but for the model."""

    config: ConfigDict
    layout: Layout
    lora: LoraConfig | None
    loss: LossConfig
    optimizer: optax.GradientTransformation
    ema: EmaConfig

    def plan(self, pipe: Pipeline) -> Plan:
        sample = self.config.sample
        return make_plan(
            pipe.sigmas(sample.num_steps),
            kind=sample.sde_type,
            noise_level=sample.noise_level,
            window=sample.sde_window_size,
            bounds=tuple(sample.sde_window_range),
            branches=sample.branches,
        )


def make_recipe(config: ConfigDict) -> Recipe:
    """Raises ValueError for names that do not exist and numbers that do not fit together."""
    sample, t = config.sample, config.train
    layout = Layout(
        sample.num_batches_per_epoch,
        sample.train_batch_size,
        sample.branches,
        sample.num_image_per_prompt,
    )
    if layout.calls % t.gradient_accumulation_steps:
        raise ValueError(
            f"num_batches_per_epoch {layout.calls} must be a multiple of gradient_accumulation_steps "
            f"{t.gradient_accumulation_steps}"
        )
    return Recipe(
        config=config,
        layout=layout,
        lora=LoraConfig(t.lora_rank, t.lora_alpha, t.lora_init) if t.lora else None,
        loss=LossConfig(t.loss, t.kl, t.beta, t.clip_range, t.adv_clip_max, t.guard_bias),
        optimizer=make_optimizer(
            t.learning_rate,
            t.adam_beta1,
            t.adam_beta2,
            t.adam_epsilon,
            t.adam_weight_decay,
            t.max_grad_norm,
        ),
        ema=EmaConfig(t.ema_decay, t.ema_update_interval),
    )


def check_mesh(recipe: Recipe, mesh: Mesh) -> None:
    """Raises ValueError for calls whose images the mesh cannot share evenly."""
    parts, test = batch_devices(mesh), recipe.config.sample.test_batch_size
    recipe.layout.check(parts)
    if test % parts:
        raise ValueError(
            f"test_batch_size {test} must be a multiple of {parts}, the mesh's data x fsdp"
        )


@dataclass(frozen=True)
class Programs:
    """The jitted calls, each traced once."""

    sample: Callable
    update: Callable
    recompute: Callable
    evaluate: Callable


def make_programs(recipe: Recipe, pipe: Pipeline) -> Programs:
    shardings = jax.tree.map(lambda a: a.sharding, abstract_state(recipe, pipe))
    return Programs(
        sample=jax.jit(partial(sample_call, pipe, recipe.layout, recipe.config.sample.same_latent)),
        update=jax.jit(
            partial(update, pipe.velocity, recipe.optimizer, recipe.loss, recipe.ema),
            donate_argnums=1,
            out_shardings=(shardings, replicated(pipe.mesh)),
        ),
        recompute=jax.jit(partial(recompute_means, pipe.velocity, recipe.loss)),
        evaluate=pipe.sampler(recipe.config.sample.eval_num_steps),
    )


def sample_call(
    pipe: Pipeline,
    layout: Layout,
    same_latent: bool,
    params,
    vae_params,
    trainable,
    cond,
    keys,
    plan,
):
    """One rollout call: (uint8 pictures, trajectory, whether all latents are finite)."""
    distinct = max(1, layout.images // layout.group) if same_latent else layout.slots
    latents, noise = draw_noise(*keys, plan, layout.slots, distinct, pipe.token_shape)
    latents = jax.lax.with_sharding_constraint(latents, batch_sharding(pipe.mesh))
    noise = jax.lax.with_sharding_constraint(noise, batch_sharding(pipe.mesh, axis=1))
    tokens, trajectory = rollout(pipe.velocity, params, trainable, cond, latents, noise, plan)
    pictures = jax.lax.with_sharding_constraint(
        pipe.decode(vae_params, tokens), batch_sharding(pipe.mesh)
    )
    return pictures, trajectory, jnp.isfinite(tokens).all()


def abstract_state(recipe: Recipe, pipe: Pipeline) -> TrainState:
    """The training state as jax.ShapeDtypeStructs with their shardings: adapters are replicated, weights (with float32
    masters) lie as the frozen ones do.
    """
    everywhere = replicated(pipe.mesh)
    if pipe.lora is None:
        trainable = jax.tree.map(
            lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=p.sharding), pipe.params
        )
    else:
        adapters = jax.eval_shape(lambda: init_lora(pipe.model, pipe.lora, jax.random.key(0)))
        trainable = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), adapters
        )
    opt_state = optax.tree_map_params(
        recipe.optimizer,
        lambda a, like: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=like.sharding),
        jax.eval_shape(recipe.optimizer.init, trainable),
        trainable,
        transform_non_params=lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere),
    )
    return TrainState(
        trainable, trainable, opt_state, jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    )
