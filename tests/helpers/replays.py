"""A call of a family's rollout on random weights, and the programs that replay it."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from realgen_jax.models.flux import transformer as flux
from realgen_jax.models.flux.family import FLUX
from realgen_jax.models.guidance import Guided, is_guided
from realgen_jax.models.loading import weight_sharding
from realgen_jax.models.model import Model
from realgen_jax.models.sd3 import transformer as sd3
from realgen_jax.models.sd3.family import SD3
from realgen_jax.models.trainable import AllWeights
from realgen_jax.models.zimage import transformer as zimage
from realgen_jax.models.zimage.family import Z_IMAGE
from realgen_jax.nn.convert import abstract, with_shardings
from realgen_jax.nn.lora import LoraConfig
from realgen_jax.nn.vae import VaeConfig
from realgen_jax.rollout import compiler_options
from realgen_jax.sharding import batch_sharding, param_sharding
from realgen_jax.update import Batch, EmaConfig, TrainState, make_optimizer, update
from tests.helpers.models import fresh_adapters
from tests.helpers.objectives import grpo
from tests.helpers.quantized import SMALL_FLUX, quantized

SCALE = 4.5  # of guidance
OPTIMIZER = make_optimizer(1e-3, 0.9, 0.999, 1e-8, 1e-4, 1e9)
FAMILIES = {"flux": FLUX, "sd3": SD3, "zimage": Z_IMAGE}


@dataclass(frozen=True)
class Size:
    """A transformer and its inputs: side of the pictures and text tokens.

    `wide` sizes are the published ones with fewer blocks, for GPUs.
    """

    config: Any
    side: int
    text: int


# With fewer than 64 channels and 8 rows, XLA's CPU compiler makes another kind of loop of a product
# in each of the two programs, and the last bit differs.
SIZES = {
    ("flux", "tiny"): Size(SMALL_FLUX, side=4, text=21),
    ("flux", "wide"): Size(flux.FluxConfig(num_layers=2, num_single_layers=2), side=32, text=512),
    ("sd3", "tiny"): Size(
        sd3.SD3Config(
            num_layers=4,
            dual_attention_layers=(0, 1),
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=48,
            caption_projection_dim=64,
            pooled_projection_dim=40,
            pos_embed_max_size=8,
            image_size=(4, 4),
        ),
        side=4,
        text=21,
    ),
    ("sd3", "mid"): Size(
        sd3.SD3Config(
            num_layers=5,
            dual_attention_layers=(0, 1),
            attention_head_dim=64,
            num_attention_heads=8,
            joint_attention_dim=128,
            caption_projection_dim=512,
            pooled_projection_dim=64,
            pos_embed_max_size=24,
            image_size=(16, 16),
        ),
        side=16,
        text=45,
    ),
    ("sd3", "wide"): Size(
        sd3.SD3Config(
            num_layers=6,
            dual_attention_layers=(0, 1, 2),
            qk_norm="rms_norm",
            pos_embed_max_size=384,
            image_size=(32, 32),
        ),
        side=32,
        text=333,
    ),
    ("zimage", "tiny"): Size(
        zimage.ZImageConfig(
            dim=96, n_layers=2, n_refiner_layers=1, n_heads=4, n_kv_heads=4, cap_feat_dim=24,
            axes_dims=(8, 8, 8),
        ),
        side=4,
        text=64,
    ),
    ("zimage", "mid"): Size(
        zimage.ZImageConfig(
            dim=384, n_layers=4, n_refiner_layers=1, n_heads=6, n_kv_heads=6, cap_feat_dim=96,
            axes_dims=(16, 24, 24),
        ),
        side=16,
        text=64,
    ),
    ("zimage", "wide"): Size(zimage.ZImageConfig(n_layers=2), side=32, text=128),
}  # fmt: skip


def random_model(name, size, dtype, mesh, remat="full", quantization="", offload=False):
    """A model with random weights and adapters that are not zero."""
    chosen = SIZES[name, size]
    family = FAMILIES[name]
    config = replace(chosen.config, dtype=dtype, param_dtype=dtype, remat=remat)
    # One program draws all weights, each where it belongs.
    sharding = param_sharding(mesh, family.rules)
    state = nnx.to_flat_state(nnx.state(abstract(family.Module, config)[1]))
    where = [
        (path, leaf.replace(sharding(".".join(map(str, path)), leaf.shape))) for path, leaf in state
    ]
    draw = jax.jit(
        lambda key: nnx.state(family.Module(config, nnx.Rngs(key))),
        out_shardings=nnx.from_flat_state(where),
    )
    params = draw(jax.random.key(0))
    if quantization:
        config, params = quantized(family, config, params, quantization, mesh)
    where = with_shardings(params, weight_sharding(family, mesh, offload))
    params = jax.tree.map(lambda a, like: jax.device_put(a, like.sharding), params, where)
    base = Model(
        params=params,
        vae_params=None,
        family=family,
        config=config,
        vae=VaeConfig(),
        schedule=family.Schedule(),
        trainable=AllWeights(),
        height=chosen.side,
        width=chosen.side,
        mesh=mesh,
    )
    model, adapters = fresh_adapters(base, LoraConfig(rank=4, alpha=8.0), jax.random.key(1))

    def moved(a):
        return a + 0.02 * jax.random.normal(jax.random.key(a.size), a.shape)

    return model, jax.jit(lambda tree: jax.tree.map(moved, tree))(adapters)


def random_cond(name, model, size, slots, gradient):
    """Random embeddings; the negative prompt's are the same in every row."""
    text = SIZES[name, size].text
    max_tokens = text - 77 if name == "sd3" else text
    shapes = model.family.cond_shapes(model.config, slots, max_tokens, model.config.dtype)
    if name == "sd3":
        width = model.config.joint_attention_dim
        shapes = replace(shapes, text=jax.ShapeDtypeStruct((slots, text, width), shapes.text.dtype))
    rng = np.random.default_rng(0)

    def draw(leaf, rows):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return np.broadcast_to(rng.integers(5, text, (rows, *leaf.shape[1:])), leaf.shape)
        values = rng.normal(size=(rows, *leaf.shape[1:]))
        return np.broadcast_to(values, leaf.shape)

    def tree(rows):
        return jax.tree.map(lambda leaf: jnp.asarray(draw(leaf, rows), leaf.dtype), shapes)

    if not is_guided(model.family, SCALE):
        return tree(slots)
    return Guided(tree(slots), tree(1), jnp.full(slots, SCALE), gradient)


class Replay:
    """One call of n images that was sampled on a mesh, and the programs that replay it."""

    def __init__(self, name, size, dtype, gradient, mesh, remat="full", n=8, **weights):
        """weights: quantization and offload, of random_model."""
        self.model, self.adapters = random_model(name, size, dtype, mesh, remat, **weights)
        rows = batch_sharding(mesh)
        cond = jax.device_put(random_cond(name, self.model, size, n, gradient), rows)
        self.objective = grpo(beta=0.1, window=2, bounds=(0, 4), sde_type="cps", noise_level=0.8)
        keys = jax.random.split(jax.random.key(2), 3)
        plan = self.objective.make_plan(self.model.sigmas(6)).draw(keys[0])
        shape = self.model.token_shape
        latents = jax.device_put(jax.random.normal(keys[1], (n, *shape)), rows)
        noise = self.objective.draw_noise(keys[2], plan, n, shape)
        noise = jax.device_put(noise, batch_sharding(mesh, axis=1))
        options = compiler_options(dtype, mesh, self.model.offload)
        self.jit = partial(jax.jit, compiler_options=options)
        collect = self.jit(partial(self.objective.collect, self.model.velocity))
        self.latents, record = collect(self.adapters, cond, latents, noise, plan)
        advantages = jax.device_put(jnp.linspace(-1, 1, n), rows)
        self.batch = jax.tree.map(lambda a: a[None], Batch(record, cond, advantages))
        self.recompute = self.jit(partial(self.objective.recompute_means, self.model.velocity))

    def update(self):
        """(state, metrics) after one update; its first moment is the gradient times 0.1."""
        return self.updater()(self.state(), self.batch)

    def state(self):
        opt_state = OPTIMIZER.init(self.adapters)
        return TrainState(self.adapters, self.adapters, opt_state, jnp.int32(0))

    def updater(self):
        ema = EmaConfig(0.9, 1)
        return self.jit(partial(update, self.objective, OPTIMIZER, ema, self.model.velocity))
