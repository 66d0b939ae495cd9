"""A transformer's equal blocks, stacked along a leading layer axis and run by a rematerialised scan."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from realgen_jax.nn.layers import PROJECTION
from realgen_jax.sharding import BATCH_AXES, constrain


def _flash_attention(primitive: Any, *_: Any, **__: Any) -> bool:
    """A remat policy that keeps what cuDNN's forward kernel gives, so that the backward pass does not run it again."""
    return primitive.name.startswith("dot_product_attention_fwd")


_policies = jax.checkpoint_policies
_projections = _policies.save_only_these_names(
    PROJECTION
)  # not the adapters' products: cheap, and as large
REMAT_POLICIES = {
    "full": _policies.nothing_saveable,  # keeps the blocks' inputs only
    "attention": _flash_attention,  # and the attentions' outputs, on a GPU
    "dots": _policies.save_from_both_policies(
        _projections, _flash_attention
    ),  # and the projections' outputs
    "none": _policies.everything_saveable,
}


def pin_rows(tree: Any, mesh: Mesh | None) -> Any:
    """Pin activations [n, ...]: rows over data and fsdp, tokens and channels whole. Left to itself, GSPMD splits the
    channels of a block instead of fetching its weights.
    """
    return jax.tree.map(lambda a: constrain(a, mesh, BATCH_AXES), tree)


def scan_blocks(
    apply: Callable,
    blocks: nnx.Module,
    carry: Any,
    modulation: Any,
    policy: str,
    mesh: Mesh | None,
) -> Any:
    """Run the stacked blocks in order; the modulation's leading axis is the layer."""
    graph, weights = nnx.split(blocks)

    def body(carry, layer):
        weights, modulation = layer
        return pin_rows(
            apply(nnx.merge(graph, weights), pin_rows(carry, mesh), modulation), mesh
        ), None

    body = jax.checkpoint(body, policy=REMAT_POLICIES[policy], prevent_cse=False)
    return jax.lax.scan(body, carry, (weights, modulation))[0]
