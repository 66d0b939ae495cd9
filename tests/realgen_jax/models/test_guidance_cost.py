"""What guidance costs in an update: where the free pass is constant, it has no backward pass.

XLA counts the body of a loop once in its operations, in both gradient forms alike.
"""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from realgen_configs.flux_grpo import get_config
from realgen_jax.models.guidance import GRADIENTS, Guided, guided_velocity
from realgen_jax.models.model import Model
from realgen_jax.models.sd3.family import SD3, SD3Schedule
from realgen_jax.models.sd3.transformer import SD3Config
from realgen_jax.nn.convert import abstract
from realgen_jax.nn.vae import Autoencoder, VaeConfig
from realgen_jax.preflight.report import sample_arguments, update_arguments
from realgen_jax.training.programs import make_programs, make_recipe
from tests.helpers.compiling import QUICK
from tests.helpers.models import one_device

IMAGES = 8


def check_halves(programs):
    """Backward operations and saved bytes of "bound" are half of those of "both".

    programs: {gradient: (compiled velocity, compiled update)}. The bytes are XLA's temporary
    memory, which what the backward pass saves dominates.
    """
    backward = {}
    saved = {}
    for gradient, (velocity, update) in programs.items():
        forward = velocity.cost_analysis()["flops"]
        backward[gradient] = update.cost_analysis()["flops"] - forward
        saved[gradient] = update.memory_analysis().temp_size_in_bytes
    assert backward["bound"] == pytest.approx(backward["both"] / 2, rel=0.02)
    assert saved["bound"] == pytest.approx(saved["both"] / 2, rel=0.05)


def layers(weights, x, sigma, cond):
    """A velocity of many layers, weights [layers, c, c]."""

    def layer(x, weight):
        return x + jnp.tanh(x @ weight + cond[:, None]), None

    x, _ = jax.lax.scan(layer, x * sigma[:, None, None], weights)
    return x


def test_a_constant_pass_has_no_backward_pass():
    weights = jax.ShapeDtypeStruct((32, 16, 16), jnp.float32)
    x = jax.ShapeDtypeStruct((IMAGES, 64, 16), jnp.float32)
    row = jax.ShapeDtypeStruct((IMAGES,), jnp.float32)
    words = jax.ShapeDtypeStruct((IMAGES, 16), jnp.float32)
    velocity = partial(guided_velocity, layers)

    def update(weights, x, sigma, cond):
        loss, gradient = jax.value_and_grad(
            lambda weights: jnp.mean(velocity(weights, x, sigma, cond) ** 2)
        )(weights)
        return loss, gradient

    programs = {}
    for gradient in GRADIENTS:
        arguments = (weights, x, row, Guided(words, words, row, gradient))
        programs[gradient] = [
            jax.jit(program).lower(*arguments).compile(QUICK) for program in (velocity, update)
        ]
    check_halves(programs)


def sd3_run(gradient, remat, layers):
    """The recipe and the abstract model of a small SD3 with LoRA."""
    config = get_config().unlock()
    config.sample.update(
        guidance_scale=4.5,
        sde_type="cps",
        noise_level=0.8,
        sde_window_size=2,
        sde_window_range=(0, 2),
        branches=1,
        train_batch_size=IMAGES,
        num_image_per_prompt=IMAGES,
        num_batches_per_epoch=1,
    )
    config.train.update(cfg_gradient=gradient, loss="grpo", beta=0.0, lora_rank=2)
    recipe = make_recipe(config)

    sizes = SD3Config(
        sample_size=8,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=64,
        pooled_projection_dim=32,
        pos_embed_max_size=4,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
        image_size=(4, 4),
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        remat=remat,
    )
    model = Model(
        params=abstract(SD3.Module, sizes)[1],
        vae_params=abstract(Autoencoder, VaeConfig())[1],
        family=SD3,
        config=sizes,
        vae=VaeConfig(),
        schedule=SD3Schedule(),
        trainable=recipe.trainable,
        height=4,
        width=4,
        mesh=one_device(),
    )
    return SimpleNamespace(recipe=recipe, model=model)


@pytest.mark.slow
@pytest.mark.parametrize(("remat", "layers"), [("full", 34), ("none", 8)])
def test_sd3_has_no_backward_pass_for_the_negative_prompt(remat, layers):
    """The trainer's update, with so many layers that what they save dominates."""
    programs = {}
    for gradient in GRADIENTS:
        run = sd3_run(gradient, remat, layers)
        _, trainable, cond, _, _ = sample_arguments(run.recipe, run.model)
        x = jax.ShapeDtypeStruct((IMAGES, *run.model.token_shape), jnp.float32)
        sigma = jax.ShapeDtypeStruct((IMAGES,), jnp.float32)
        velocity = jax.jit(Model.velocity).lower(run.model, trainable, x, sigma, cond)

        compiled = make_programs(run.recipe, run.model)
        update = compiled.update.lower(*update_arguments(run.recipe, run.model, compiled))
        programs[gradient] = velocity.compile(QUICK), update.compile(QUICK)
    check_halves(programs)
