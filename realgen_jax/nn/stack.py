"""Runs a transformer's blocks as one scan with rematerialisation.

Blocks of one kind are a single module whose parameters have a leading layer axis. A scan compiles
the block once, however many layers there are.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from realgen_jax.nn.attention import SPLASH
from realgen_jax.nn.layers import PROJECTION, Linear, modulated_norm
from realgen_jax.nn.quantize import check_format
from realgen_jax.sharding import BATCH_AXES, constrain, is_on_host, to_device

_splash = jax.checkpoint_policies.save_only_these_names(SPLASH)


def _flash_attention(primitive: Any, *args: Any, **params: Any) -> bool:
    """Remat policy: save what a flash kernel returns, so that its forward does not run twice."""
    cudnn = primitive.name.startswith("dot_product_attention_fwd")
    return cudnn or _splash(primitive, *args, **params)


# The adapters' products are not saved: they are cheap to recompute and as large as the projections.
_projections = jax.checkpoint_policies.save_only_these_names(PROJECTION)

# What a block's forward pass saves for the backward pass; the rest is recomputed.
REMAT_POLICIES = {
    # Only the block's input.
    "full": jax.checkpoint_policies.nothing_saveable,
    # Also the output of attention, where a flash kernel runs.
    "attention": _flash_attention,
    # Also the outputs of the projections.
    "dots": jax.checkpoint_policies.save_from_both_policies(_projections, _flash_attention),
    # Everything that autodiff needs.
    "none": jax.checkpoint_policies.everything_saveable,
}


def check_remat(remat: str, quantization: str = "") -> None:
    """Raise ValueError for an unknown policy or format, and for two that do not go together."""
    if remat not in REMAT_POLICIES:
        raise ValueError(f"remat is {remat!r}; choose one of {', '.join(REMAT_POLICIES)}")
    check_format(quantization)
    if quantization and remat == "none":
        raise ValueError(
            "remat is 'none', which would keep the dequantised weights of all blocks; with "
            f"quantization {quantization!r} choose one of full, attention, dots"
        )


def pin_rows(tree: Any, mesh: Mesh | None) -> Any:
    """Shard activations [n, ...] by rows over data and fsdp; tokens and channels are not split.

    Without this constraint, GSPMD splits a block's channels instead of gathering its weights.
    """
    return jax.tree.map(lambda a: constrain(a, mesh, BATCH_AXES), tree)


def scan_blocks(
    apply: Callable[[Any, Any, Any], Any],
    blocks: nnx.Module,
    carry: Any,
    modulation: Any,
    policy: str,
    mesh: Mesh | None,
) -> Any:
    """Run stacked blocks in order: carry = apply(block, carry, modulation of this layer).

    blocks: a module whose parameters are [layers, ...]. carry: activations, each [n, ...].
    modulation: arrays [layers, n, ...]. policy: a key of REMAT_POLICIES. Parameters in host memory
    are copied to the devices layer by layer, in the forward and in the backward pass.
    """
    graph, weights = nnx.split(blocks)
    weights, read = _offloaded(weights)

    def body(carry: Any, layer: tuple[Any, Any]) -> tuple[Any, None]:
        weights, modulation = layer
        block = nnx.merge(graph, read(weights))
        carry = apply(block, pin_rows(carry, mesh), modulation)
        return pin_rows(carry, mesh), None

    # XLA replaces a loop of one iteration by its body. The recomputed values would then be merged
    # with the first ones, and the body with what stands before it, which compiles the forward pass
    # differently in rollout and update.
    layers = len(jax.tree.leaves(weights)[0])
    body = jax.checkpoint(body, policy=REMAT_POLICIES[policy], prevent_cse=layers == 1)
    if layers == 1:
        carry, modulation = jax.lax.optimization_barrier((carry, modulation))
    carry, _ = jax.lax.scan(body, carry, (weights, modulation))
    return carry


def _offloaded(weights: nnx.State) -> tuple[Any, Callable[[Any], nnx.State]]:
    """Return what a scan slices, and a function that makes of a slice the weights of its layer.

    Weights in host memory are not sliced by the scan but by a layer's number, which the program
    reads from memory. XLA for GPUs works out where a slice of host memory lies from the loop's
    counter alone, and in jax 0.10 it is wrong if the loop counts down: the backward pass would
    silently take the layers in the order of the forward pass (openxla/xla#46231).
    """
    flat, tree = jax.tree.flatten(weights)
    on_host = [is_on_host(leaf) for leaf in flat]
    if not any(on_host):
        return weights, lambda layer: layer
    sliced = [None if host else leaf for leaf, host in zip(flat, on_host, strict=True)]
    numbers = jax.lax.optimization_barrier(jnp.arange(len(flat[0])))

    def read(layer: tuple[list[Array | None], Array]) -> nnx.State:
        own, number = layer
        whole = []
        for leaf, host, stack in zip(own, on_host, flat, strict=True):
            if host:
                leaf = to_device(jax.lax.dynamic_index_in_dim(stack, number, keepdims=False))
            whole.append(leaf)
        return jax.tree.unflatten(tree, whole)

    return (sliced, numbers), read


def output_layer(project: Linear, x: Array, shift: Array, scale: Array) -> Array:
    """The last AdaLN and projection: x [n, s, D], shift and scale [n, D] -> [n, s, channels].

    The norm is recomputed in the backward pass, and barriers stand around the layer. If the norm's
    statistics were kept, or if the layer were joined with its neighbours, the update would compile
    it differently than the rollout, and the last bit could differ. The weights are behind a barrier
    too, or XLA would join the products of the policy and of the reference, which have the same.
    """
    graph, weights = nnx.split(project)

    def apply(x: Array, shift: Array, scale: Array, weights: nnx.State) -> Array:
        return nnx.merge(graph, weights)(modulated_norm(x, shift, scale))

    inputs = jax.lax.optimization_barrier((x, shift, scale, weights))
    return jax.lax.optimization_barrier(jax.checkpoint(apply)(*inputs))


@jax.named_scope("modulation")
def modulation_of_layers(project: Linear, vector: Array, mesh: Mesh | None) -> Array:
    """The AdaLN modulations of all layers in one product: vector [n, D] -> [layers, n, k D].

    These projections hold a quarter of FLUX's weights but see only one row per image. So the rows
    move to the devices that hold the weights, and the results move back; the weights do not move.
    """
    vector = constrain(vector, mesh, "data")
    out = project(vector)
    out = constrain(out, mesh, None, "data", ("fsdp", "tensor"))
    return constrain(out, mesh, None, BATCH_AXES)
