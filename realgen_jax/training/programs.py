"""The compiled programs of a run, and the recipe that they are built from.

All arrays are passed as arguments, so that preflight can build the same programs without weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from ml_collections import ConfigDict

from realgen_jax.config import base
from realgen_jax.data import Layout
from realgen_jax.models.guidance import check_gradient
from realgen_jax.models.model import Model, tuned_steps
from realgen_jax.models.prompts import check_max_tokens
from realgen_jax.models.trainable import Trainable, make_trainable
from realgen_jax.objectives import make_objective
from realgen_jax.objectives.token_grpo import make_token_grpo
from realgen_jax.rollout import compiler_options, draw_latents, numbered_latents
from realgen_jax.sharding import batch_devices, batch_sharding, replicated, to_host
from realgen_jax.update import Batch, EmaConfig, Objective, TrainState, make_optimizer, update


@dataclass(frozen=True)
class Recipe:
    """Everything that defines an epoch except the model."""

    config: ConfigDict
    layout: Layout
    objective: Objective
    trainable: Trainable
    optimizer: optax.GradientTransformation
    ema: EmaConfig


def make_recipe(config: ConfigDict) -> Recipe:
    """Return the recipe of a config.

    Raises ValueError for unknown names and inconsistent numbers.
    """
    train = config.train
    layout, objective = PARTS[config.stage](config)
    return Recipe(
        config=config,
        layout=layout,
        objective=objective,
        trainable=make_trainable(train),
        optimizer=make_optimizer(
            train.learning_rate,
            train.adam_beta1,
            train.adam_beta2,
            train.adam_epsilon,
            train.adam_weight_decay,
            train.max_grad_norm,
        ),
        ema=EmaConfig(train.ema_decay, train.ema_update_interval),
    )


def _image_parts(config: ConfigDict) -> tuple[Layout, Objective]:
    """The layout and the objective of config.stage diffusion."""
    sample = config.sample
    layout = Layout(
        calls=sample.num_batches_per_epoch,
        images=sample.train_batch_size,
        branches=sample.branches,
        group=sample.num_image_per_prompt,
        previews=sample.scout.previews,
    )
    _check_scout(sample)
    if config.pretrained.quantization and not config.train.lora:
        raise ValueError(
            f"config.pretrained.quantization is {config.pretrained.quantization!r}, but "
            "config.train.lora=False trains all weights, which codes cannot hold; expected ''"
        )
    if config.pretrained.offload and not config.train.lora:
        raise ValueError(
            "config.pretrained.offload keeps frozen weights in host memory, but "
            "config.train.lora=False trains all weights; expected config.pretrained.offload=False"
        )
    if config.pretrained.offload and config.pretrained.remat == "none":
        raise ValueError(
            "config.pretrained.remat is 'none', which would keep the weights of all blocks on the "
            "device; with config.pretrained.offload choose one of full, attention, dots"
        )
    steps = config.train.gradient_accumulation_steps
    if layout.calls % steps:
        raise ValueError(
            f"num_batches_per_epoch {layout.calls} must be a multiple of "
            f"gradient_accumulation_steps {steps}"
        )
    return layout, make_objective(config.train, sample)


def _text_parts(config: ConfigDict) -> tuple[Layout, Objective]:
    """The layout of pictures, and the objective, of config.stage rewriter."""
    settings = config.rewriter
    rewrites = settings.prompts_per_epoch * settings.rewrites_per_prompt
    pictures = rewrites * settings.images_per_rewrite
    images = config.sample.train_batch_size
    if pictures % images:
        raise ValueError(
            f"config.rewriter: {settings.prompts_per_epoch} prompts_per_epoch x "
            f"{settings.rewrites_per_prompt} rewrites_per_prompt x {settings.images_per_rewrite} "
            f"images_per_rewrite = {pictures} pictures are not whole calls of "
            f"config.sample.train_batch_size {images}; expected {nearest(pictures, images)}"
        )
    step = settings.microbatch * config.train.gradient_accumulation_steps
    if rewrites % step:
        raise ValueError(
            f"config.rewriter: {rewrites} rewrites an epoch are not whole optimizer steps of "
            f"gradient_accumulation_steps {config.train.gradient_accumulation_steps} microbatches "
            f"of {settings.microbatch}; expected {nearest(rewrites, step)}"
        )
    group = settings.rewrites_per_prompt * settings.images_per_rewrite
    layout = Layout(calls=pictures // images, images=images, branches=1, group=group)
    return layout, make_token_grpo(settings, config.train)


def nearest(number: int, unit: int) -> str:
    """The multiples of a unit around a number, for an error message."""
    below = number // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)


# config.stage -> a function (config) -> (layout of an epoch's pictures, objective)
PARTS = {"diffusion": _image_parts, "rewriter": _text_parts}


def _check_scout(sample: ConfigDict) -> None:
    """Raise ValueError for keys that contradict config.sample.scout."""
    if sample.scout.previews and sample.same_latent:
        raise ValueError(
            f"config.sample.same_latent is True, but config.sample.scout.previews is "
            f"{sample.scout.previews}, and previews from the same noise would all be the same"
        )
    default = base().sample.scout
    for name, value in sample.scout.items():
        if not sample.scout.previews and value != default[name]:
            raise ValueError(
                f"config.sample.scout.{name} is {value!r}, which has no effect because "
                f"config.sample.scout.previews is 0; expected {default[name]!r}"
            )


def check_mesh(recipe: Recipe, mesh: Any, processes: int = 1) -> None:
    """Raise ValueError if the mesh cannot split the images of a call evenly.

    mesh: a Mesh or an AbstractMesh.
    """
    parts = batch_devices(mesh)
    recipe.layout.check(parts)
    if recipe.config.stage == "rewriter":
        _check_rewrites(recipe.config.rewriter, parts)
    test = recipe.config.sample.test_batch_size
    if test % parts:
        raise ValueError(
            f"test_batch_size {test} must be a multiple of {parts}, the mesh's data x fsdp"
        )
    if parts % processes:
        raise ValueError(
            f"the mesh's data x fsdp is {parts}, which {processes} processes cannot share evenly; "
            "each must hold pictures of its own: let config.mesh.tensor divide a host's devices"
        )


def _check_rewrites(settings: ConfigDict, parts: int) -> None:
    """Raise ValueError if `parts` devices cannot share rewrites and microbatches evenly."""
    rewrites = settings.prompts_per_epoch * settings.rewrites_per_prompt
    for name, number in (
        ("prompts_per_epoch x rewrites_per_prompt", rewrites),
        ("microbatch", settings.microbatch),
    ):
        if number % parts:
            raise ValueError(
                f"config.rewriter.{name} is {number}; expected a multiple of {parts}, the mesh's "
                f"data x fsdp, such as {nearest(number, parts)}"
            )


def check_model(recipe: Recipe, model: Model) -> None:
    """Raise ValueError if the recipe's steps, guidance or prompts do not fit an abstract model."""
    config = recipe.config
    family = model.family
    if config.stage == "diffusion":
        recipe.objective.make_plan(model.sigmas(config.sample.num_steps))
        check_gradient(family, config.sample.guidance_scale, config.train.cfg_gradient)
    tuned_steps(config.evaluate.sample)
    check_max_tokens(family, config.prompts.max_tokens)


@dataclass(frozen=True)
class Programs:
    """The jitted calls of a run, each traced once for a size of pictures.

    sample(model, trainable, cond, keys, plan, numbers) -> pictures uint8 [n, 3, H, W], record,
      finite []
    preview(model, trainable, cond, key, ids int32 [n]) -> pictures uint8 [n, 3, H, W]
    update(model, state, batch) -> state, metrics; the state is donated
    recompute(model, trainable, batch) -> batch
    evaluate(model, trainable, cond, key, ids int32 [n]) -> pictures uint8 [n, 3, H, W]
    """

    sample: Callable
    preview: Callable
    update: Callable
    recompute: Callable
    evaluate: Callable


def make_programs(recipe: Recipe, model: Model) -> Programs:
    """Return the programs of a recipe. Nothing is compiled before the first call.

    The model, which may be abstract, determines how the state is sharded. Calls take models
    of other sizes too; each size is traced once.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(recipe, model))

    def update_call(model: Model, state: TrainState, batch: Batch) -> tuple[TrainState, Any]:
        return update(recipe.objective, recipe.optimizer, recipe.ema, model.velocity, state, batch)

    def recompute_call(model: Model, trainable: Any, batch: Batch) -> Batch:
        return recipe.objective.recompute_means(model.velocity, trainable, batch)

    same_latent = recipe.config.sample.same_latent
    scout = recipe.config.sample.scout
    evaluation = recipe.config.evaluate.sample
    options = compiler_options(model.config.dtype, model.mesh, model.offload)
    jit = partial(jax.jit, compiler_options=options)
    return Programs(
        sample=jit(partial(sample_call, recipe.layout, same_latent, recipe.objective)),
        preview=model.sampler(scout.num_steps, scout.solver, scope="preview"),
        update=jit(
            update_call, donate_argnums=1, out_shardings=(shardings, replicated(model.mesh))
        ),
        recompute=jit(recompute_call),
        evaluate=model.sampler(evaluation.num_steps, evaluation.solver, tuned_steps(evaluation)),
    )


def sample_call(
    layout: Layout,
    same_latent: bool,
    objective: Objective,
    model: Model,
    trainable: Any,
    cond: Any,
    keys: tuple[Array, Array],
    plan: Any,
    numbers: Array | None = None,
) -> tuple[Array, Any, Array]:
    """Run one rollout call.

    cond: leaves [slots, ...]; keys: for the initial latents and for the other noise. numbers:
    int32 [slots], the previews that are sampled in full; None: there are none. Returns pictures
    uint8 [n, 3, H, W], the objective's record, and whether all latents are finite, bool [].
    """
    latent_key, noise_key = keys
    rows = batch_sharding(model.mesh)

    # Noise, sharded over the mesh by images.
    if numbers is None:
        distinct = max(1, layout.images // layout.group) if same_latent else layout.slots
        latents = draw_latents(latent_key, layout.slots, distinct, model.token_shape)
    else:
        latents = numbered_latents(latent_key, numbers, model.token_shape)
    noise = objective.draw_noise(noise_key, plan, layout.images, model.token_shape)
    latents = jax.lax.with_sharding_constraint(latents, rows)
    noise = jax.tree.map(
        lambda leaf: jax.lax.with_sharding_constraint(leaf, batch_sharding(model.mesh, axis=1)),
        noise,
    )

    tokens, record = objective.collect(model.velocity, trainable, cond, latents, noise, plan)
    pictures = jax.lax.with_sharding_constraint(model.decode(tokens), rows)
    return pictures, record, jnp.isfinite(tokens).all()


def abstract_state(recipe: Recipe, model: Any) -> TrainState:
    """Return the training state as jax.ShapeDtypeStructs with shardings.

    With config.train.offload, optimizer state and moving average are in host memory. model: the
    Model or LanguageModel that is trained, which may be abstract.
    """
    everywhere = replicated(model.mesh)
    trainable = recipe.trainable.abstract(model)
    place = to_host if recipe.config.train.offload else lambda sharding: sharding

    def like_param(leaf: jax.ShapeDtypeStruct, param: jax.ShapeDtypeStruct) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(param.sharding))

    def like_scalar(leaf: jax.ShapeDtypeStruct) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere)

    # The optimizer's moments are sharded like the arrays that they belong to.
    opt_state = optax.tree_map_params(
        recipe.optimizer,
        like_param,
        jax.eval_shape(recipe.optimizer.init, trainable),
        trainable,
        transform_non_params=like_scalar,
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    old = trainable if recipe.objective.keeps_old else None
    average = jax.tree.map(like_param, trainable, trainable)
    return TrainState(trainable, average, opt_state, step, old)


def first_state(recipe: Recipe, model: Any, key: Array, file: str = "") -> TrainState:
    """Return the initial state on the mesh: fresh, or from a file of adapters.

    model: the Model or LanguageModel that is trained.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(recipe, model))
    if file:
        trainable = recipe.trainable.load(model, file, key)
    else:
        trainable = recipe.trainable.init(model, key)

    def start(trainable: Any) -> TrainState:
        average = jax.tree.map(jnp.copy, trainable)
        old = jax.tree.map(jnp.copy, trainable) if recipe.objective.keeps_old else None
        opt_state = recipe.optimizer.init(trainable)
        return TrainState(trainable, average, opt_state, jnp.int32(0), old)

    return jax.jit(start, out_shardings=shardings)(trainable)


def keep_compiled(folder: str) -> None:
    """Use this folder as the compilation cache. If `folder` is empty, nothing is cached."""
    if folder:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
