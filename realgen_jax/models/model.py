"""A text-to-image model on a mesh, whatever its family: transformer, autoencoder and schedule.

Weights are loaded by loading.py; what differs between families is in Family (family.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from realgen_jax.models.family import Family
from realgen_jax.models.trainable import Trainable
from realgen_jax.nn.convert import abstract
from realgen_jax.nn.tokens import PATCH
from realgen_jax.nn.vae import Autoencoder, VaeConfig, decode_tokens
from realgen_jax.rollout import sample
from realgen_jax.sde import ode_steps
from realgen_jax.sharding import batch_sharding


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "vae_params"],
    meta_fields=["family", "config", "vae", "schedule", "trainable", "height", "width", "mesh"],
)
@dataclass(frozen=True)
class Model:
    """A pytree of the frozen weights, so that jitted functions take it as an argument.

    params: the transformer's weights; vae_params: the autoencoder's. Of an abstract model they are
    jax.ShapeDtypeStructs. height, width: tokens down and across. Raises ValueError if the mesh axis
    `tensor` does not divide the attention heads.
    """

    params: nnx.State
    vae_params: nnx.State
    family: Family
    config: Any
    vae: VaeConfig
    schedule: Any
    trainable: Trainable
    height: int
    width: int
    mesh: Mesh

    def __post_init__(self):
        heads = self.config.num_attention_heads
        parts = self.mesh.shape["tensor"]
        if heads % parts:
            raise ValueError(
                f"num_attention_heads {heads} does not divide by mesh axis tensor={parts}; "
                "attention is split by whole heads"
            )

    @property
    def token_shape(self) -> tuple[int, int]:
        """(image tokens, channels of a token)."""
        return self.height * self.width, PATCH**2 * self.vae.latent_channels

    def sigmas(self, steps: int) -> np.ndarray:
        """Noise levels of the schedule, float32 [steps + 1] from 1 to 0."""
        return self.schedule.sigmas(steps, self.height * self.width)

    def velocity(self, trainable: Any, x: Array, sigma: Array, cond: Any) -> Array:
        """v = eps - x0, float32 [n, s, c], of x [n, s, c] at noise levels sigma float32 [n].

        `trainable` is the trained state; None means the base model.
        """
        if trainable is None:
            graph, _ = abstract(self.family.Module, self.config)
            network = nnx.merge(graph, self.params)
        else:
            network = self.trainable.bind(self, trainable)
        return network(x, sigma, cond, self.height, self.width, self.mesh)

    @jax.named_scope("decode")
    def decode(self, tokens: Array) -> Array:
        """Final latents [n, s, c] -> uint8 [n, 3, H, W]."""
        graph, _ = abstract(Autoencoder, self.vae)
        vae = nnx.merge(graph, self.vae_params)
        return decode_tokens(vae, tokens, self.height, self.width, self.mesh)

    def cond(self, cache: Any, prompts: Sequence[str], guidance: float) -> Any:
        """The prompts' conditioning, one a slot, spread over the mesh.

        cache: a TextCache, with read(prompts) -> {array: [n, ...]}. Every host reads the
            embeddings of its own slots only.
        """
        n = len(prompts)
        sharding = batch_sharding(self.mesh)
        index_map = sharding.addressable_devices_indices_map((n,))
        slots = sorted({slot for (rows,) in index_map.values() for slot in range(n)[rows]})

        # The rows of this host.
        arrays = cache.read([prompts[slot] for slot in slots])
        negative = None
        if self.family.negative_prompt is not None:
            negative = cache.read([self.family.negative_prompt] * len(slots))
        own = self.family.cond(arrays, negative, np.full(len(slots), guidance, np.float32))

        def place(leaf: np.ndarray) -> Array:
            def rows(index: tuple[slice, ...]) -> np.ndarray:
                return leaf[np.searchsorted(slots, np.arange(n)[index[0]])]

            return jax.make_array_from_callback((n, *leaf.shape[1:]), sharding, rows)

        return jax.tree.map(place, own)

    def abstract_cond(self, slots: int, max_tokens: int, dtype: Any) -> Any:
        """The conditioning of `slots` prompts as jax.ShapeDtypeStructs on the mesh."""
        shapes = self.family.text_shapes(self.config, max_tokens)
        arrays = {
            name: jax.ShapeDtypeStruct((slots, *shape), dtype) for name, shape in shapes.items()
        }
        negative = None if self.family.negative_prompt is None else arrays
        guidance = jax.ShapeDtypeStruct((slots,), jnp.float32)
        cond = jax.eval_shape(self.family.cond, arrays, negative, guidance)
        rows = batch_sharding(self.mesh)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rows), cond
        )

    def sampler(self, steps: int) -> Callable[..., Array]:
        """A jitted (model, trainable, cond, key, ids int32 [n]) -> uint8 pictures [n, 3, H, W].

        The noise of a picture comes from its id and the key alone, whatever the batch it is in.
        """
        ode = ode_steps(self.sigmas(steps))

        @jax.jit
        @jax.named_scope("evaluate")
        def pictures(model: Model, trainable: Any, cond: Any, key: Array, ids: Array) -> Array:
            def noise(number: Array) -> Array:
                return jax.random.normal(jax.random.fold_in(key, number), model.token_shape)

            rows = batch_sharding(model.mesh)
            latents = jax.lax.with_sharding_constraint(jax.vmap(noise)(ids), rows)
            tokens = sample(partial(model.velocity, trainable), cond, latents, ode)
            return jax.lax.with_sharding_constraint(model.decode(tokens), rows)

        return pictures

    def with_trainable(self, trainable: Trainable) -> "Model":
        """The same weights with another trained part."""
        return replace(self, trainable=trainable)
