"""What quantised weights cost in exactness, on the embedded FLUX and on one with random weights.

    python benchmarks/quantization.py

For each format of config.pretrained.quantization, and for kernels of blocks with and without their
modulations: the RMS error of all velocities of 10 steps on the exact path, and of the final latents
of 10 steps, relative to the RMS of those in bfloat16. "float32" is the same model in float32.
"""

import argparse
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import measure
import numpy as np
from flax import nnx

from realgen_configs.embedded import tiny
from realgen_jax.data import read_prompts
from realgen_jax.models.flux.transformer import Cond, FluxConfig, FluxTransformer
from realgen_jax.models.loading import load_model
from realgen_jax.models.prompts import embed_prompts
from realgen_jax.nn.convert import abstract, leaves
from realgen_jax.nn.quantize import FORMATS, dequantize, quantize, quantized_shapes
from realgen_jax.rollout import draw_latents, sample
from realgen_jax.sde import ode_steps
from realgen_jax.sharding import make_mesh

ENCODE = (sys.executable, str(measure.ROOT / "scripts" / "encode_prompts.py"))
STEPS = 10
IMAGES = 8
GUIDANCE = 3.5
RANDOM = FluxConfig(
    num_layers=3,
    num_single_layers=6,
    attention_head_dim=64,
    num_attention_heads=4,
    joint_attention_dim=256,
    pooled_projection_dim=64,
    axes_dims_rope=(16, 24, 24),
)
TEXT = 32  # tokens of the random model's prompts


def restored(model: Any, name: str, modulations: bool) -> Any:
    """The model with the values that codes of a format stand for."""
    dense = leaves(model.params)
    codes = leaves(
        abstract(model.family.Module, replace(model.config, quantization="int8", remat="full"))[1]
    )
    flat = []
    for leaf, (path, variable) in zip(dense, nnx.to_flat_state(model.params), strict=True):
        array = dense[leaf]
        if leaf + "_scale" in codes and (modulations or "_mod." not in leaf):
            # The axes of inputs have one scale in int8.
            scales = codes[leaf + "_scale"].shape
            axes_in = sum(size == 1 for size in scales[1:])
            shape_in = array.shape[1 : 1 + axes_in]
            shapes = quantized_shapes(name, array.shape[:1], shape_in, array.shape[1 + axes_in :])
            layers = zip(*quantize(np.asarray(array), name, *shapes), strict=True)
            kernels = [dequantize(*layer, name, axes_in - 1, array.dtype) for layer in layers]
            array = jnp.stack(kernels)
        flat.append((path, variable.replace(array)))
    return replace(model, params=nnx.from_flat_state(flat))


def embedded(dtype: str) -> tuple[Any, Any]:
    """The demo's model, and the conditioning of its first prompts."""
    config = tiny()
    config.pretrained.dtype = dtype
    config.pretrained.param_dtype = dtype
    prompts = read_prompts(config.prompts.train)[:IMAGES]
    cache = embed_prompts(prompts, config.pretrained, config.prompts, ENCODE)
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    model = load_model(config.pretrained, (config.sample.width, config.sample.height), mesh)
    return model, model.cond(cache, prompts, config.sample.guidance_scale)


def random(dtype: str) -> tuple[Any, Any]:
    """A model of random weights on 16 x 16 tokens, and random embeddings."""
    base, _ = embedded(dtype)
    kinds = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(dtype)}
    config = replace(RANDOM, in_channels=base.config.in_channels, **kinds)
    draw = jax.jit(
        lambda: nnx.state(FluxTransformer(replace(config, param_dtype=jnp.float32), nnx.Rngs(0)))
    )
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), draw())
    model = replace(base, config=config, params=params, height=16, width=16)

    images = 2
    states = jax.random.normal(jax.random.key(1), (images, TEXT, config.joint_attention_dim))
    pooled = jax.random.normal(jax.random.key(2), (images, config.pooled_projection_dim))
    return model, Cond(states, pooled, jnp.full(images, GUIDANCE))


def errors(make: Any) -> list[dict[str, Any]]:
    """A row for float32 and for each format."""

    @jax.jit
    def velocities(model: Any, cond: Any, path: jax.Array) -> jax.Array:
        sigmas = jnp.asarray(model.sigmas(STEPS)[:-1])

        def one(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
            x, sigma = inputs
            return model.velocity(None, x, jnp.full(len(x), sigma), cond)

        return jax.lax.map(one, (path, sigmas))

    @jax.jit
    def final(model: Any, cond: Any, latents: jax.Array) -> jax.Array:
        return sample(partial(model.velocity, None), cond, latents, ode_steps(model.sigmas(STEPS)))

    def relative(own: jax.Array, exact: jax.Array) -> float:
        return float(jnp.sqrt(jnp.mean((own - exact) ** 2) / jnp.mean(exact**2)))

    # The path of the bfloat16 model: the noise and its picture, mixed as at each step.
    model, cond = make("bfloat16")
    images = len(cond.guidance)
    latents = draw_latents(jax.random.key(0), images, images, model.token_shape)
    x0 = final(model, cond, latents)
    sigmas = model.sigmas(STEPS)[:-1].reshape(-1, 1, 1, 1)
    path = sigmas * latents + (1 - sigmas) * x0
    exact = velocities(model, cond, path)

    single, single_cond = make("float32")
    others = {("float32", ""): (single, single_cond)}
    for name in FORMATS:
        for modulations in (True, False):
            kernels = "all" if modulations else "no modulations"
            others[name, kernels] = (restored(model, name, modulations), cond)
    rows = []
    for (name, kernels), (other, own_cond) in others.items():
        rows.append(
            {
                "weights": name,
                "kernels": kernels,
                "velocity": relative(velocities(other, own_cond, path), exact),
                "picture": relative(final(other, own_cond, latents), x0),
            }
        )
    return rows


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    results = {}
    table = []
    for name, make in (("embedded", embedded), ("random", random)):
        results[name] = errors(make)
        for row in results[name]:
            numbers = [f"{row[key]:.4f}" for key in ("velocity", "picture")]
            table.append([name, row["weights"], row["kernels"], *numbers])
    measure.print_table(("model", "weights", "kernels", "velocity", "picture"), table)
    print(f"written to {measure.save('quantization', results)}")


if __name__ == "__main__":
    main()
