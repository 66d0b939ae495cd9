"""Models with quantised weights, made from those with random ones."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from realgen_jax.models.flux.transformer import FluxConfig
from realgen_jax.nn.convert import abstract, leaves
from realgen_jax.nn.quantize import dequantize, quantize
from realgen_jax.nn.quantized_files import SCALE
from realgen_jax.sharding import param_sharding

# Two blocks of a kind, and sides that 2 x 2 devices split into whole blocks of 64 inputs.
SMALL_FLUX = FluxConfig(
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=64,
    num_attention_heads=4,
    joint_attention_dim=64,
    pooled_projection_dim=24,
    axes_dims_rope=(16, 24, 24),
    dtype=jnp.float32,
    param_dtype=jnp.float32,
)


def quantized(family, config, params, name, mesh):
    """(config, params) in format `name`, with the shardings that loading gives them."""
    config = replace(config, quantization=name)
    state = abstract(family.Module, config)[1]
    wanted = leaves(state)
    arrays = {leaf: np.asarray(array) for leaf, array in leaves(params).items()}
    for leaf in [path for path in arrays if path + SCALE in wanted]:
        arrays[leaf], arrays[leaf + SCALE] = quantize(
            arrays[leaf], name, wanted[leaf], wanted[leaf + SCALE]
        )
    sharding = param_sharding(mesh, family.rules)
    flat = []
    for leaf, (path, variable) in zip(wanted, nnx.to_flat_state(state), strict=True):
        array = jax.device_put(arrays[leaf], sharding(leaf, arrays[leaf].shape))
        flat.append((path, variable.replace(array)))
    return config, nnx.from_flat_state(flat)


def dequantized(family, config, params):
    """(config, params) without quantisation and with the values that the codes stand for."""
    plain = replace(config, quantization="")
    state = abstract(family.Module, plain)[1]
    wanted = leaves(state)
    arrays = leaves(params)
    flat = []
    for leaf, (path, variable) in zip(wanted, nnx.to_flat_state(state), strict=True):
        array = arrays[leaf]
        if leaf + SCALE in arrays:
            halved = [n for n, size in enumerate(wanted[leaf].shape) if size != array.shape[n]]
            axis = halved[0] - 1 if halved else 0
            kernels = []
            for codes, scales in zip(array, arrays[leaf + SCALE], strict=True):
                kernels.append(dequantize(codes, scales, config.quantization, axis, config.dtype))
            array = jnp.stack(kernels)
        flat.append((path, variable.replace(array)))
    return plain, nnx.from_flat_state(flat)
