"""A text-to-image model of any family on a mesh: transformer, autoencoder and schedule.

loading.py loads the weights; Family (family.py) holds everything that differs between families.
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
from realgen_jax.models.guidance import Guided, guided_velocity, is_guided
from realgen_jax.models.trainable import Trainable
from realgen_jax.nn.convert import abstract
from realgen_jax.nn.tokens import PATCH
from realgen_jax.nn.vae import Autoencoder, VaeConfig, decode_tokens
from realgen_jax.rollout import SOLVERS, copy_options, hybrid, numbered_latents
from realgen_jax.sharding import batch_sharding, is_on_host, local_slots, to_device


def tuned_steps(settings: Any) -> int:
    """Return the number of steps that take the tuned weights, of config.evaluate.sample.

    Raises ValueError if it is 0.
    """
    share = settings.tuned_share
    steps = round(share * settings.num_steps)
    if steps == 0:
        raise ValueError(
            f"config.evaluate.sample.tuned_share is {share}, which is none of num_steps "
            f"{settings.num_steps} steps; expected a number above {0.5 / settings.num_steps:g}"
        )
    return steps


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "vae_params"],
    meta_fields=["family", "config", "vae", "schedule", "trainable", "height", "width", "mesh"],
)
@dataclass(frozen=True)
class Model:
    """A pytree of the frozen weights, so that jitted functions can take it as an argument.

    params: the transformer's weights; vae_params: the autoencoder's. In an abstract model they are
    jax.ShapeDtypeStructs. height, width: image size in tokens. Raises ValueError if the mesh axis
    `tensor` does not divide the number of attention heads.
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
                f"num_attention_heads {heads} is not divisible by mesh axis tensor={parts}; "
                "attention is split by whole heads"
            )

    @property
    def token_shape(self) -> tuple[int, int]:
        """(image tokens, channels of a token)."""
        return self.height * self.width, PATCH**2 * self.vae.latent_channels

    @property
    def offload(self) -> bool:
        """Whether weights are in host memory."""
        return any(is_on_host(leaf) for leaf in jax.tree.leaves(self.params))

    def sigmas(self, steps: int) -> np.ndarray:
        """Noise levels of the schedule, float32 [steps + 1] from 1 to 0."""
        return self.schedule.sigmas(steps, self.height * self.width)

    def velocity(self, trainable: Any, x: Array, sigma: Array, cond: Any) -> Array:
        """Predict v = eps - x0, float32 [n, s, c], from x [n, s, c] and sigma, float32 [n].

        `trainable` is the trained state; None means the base model. cond: as `cond` returns it.
        """
        if isinstance(cond, Guided):
            return guided_velocity(self._one_pass, trainable, x, sigma, cond)
        return self._one_pass(trainable, x, sigma, cond)

    def _one_pass(self, trainable: Any, x: Array, sigma: Array, cond: Any) -> Array:
        """One pass of the network, without classifier-free guidance."""
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
        vae = nnx.merge(graph, to_device(self.vae_params))
        return decode_tokens(vae, tokens, self.height, self.width, self.mesh)

    def cond(
        self, cache: Any, prompts: Sequence[str], guidance: float, gradient: str = "both"
    ) -> Any:
        """Return the prompts' conditioning, one prompt per slot, sharded over the mesh.

        cache: a TextCache, with read(prompts) -> {array: [n, ...]}. Each host reads only the
            embeddings of its own slots.
        guidance: the guidance scale. gradient: of GRADIENTS in guidance.py; it matters only where
            classifier-free guidance is differentiated.
        """
        n = len(prompts)
        sharding = batch_sharding(self.mesh)
        slots = local_slots(self.mesh, n)

        # The rows of this host.
        scale = np.full(len(slots), guidance, np.float32)
        own = self.family.cond(cache.read([prompts[slot] for slot in slots]), scale)
        if is_guided(self.family, guidance):
            # One row, which stands for all slots.
            arrays = cache.read([self.family.negative_prompt])
            negative = jax.tree.map(
                lambda leaf: np.broadcast_to(leaf, (len(slots), *leaf.shape[1:])),
                self.family.cond(arrays, scale[:1]),
            )
            own = Guided(own, negative, scale + np.float32(self.family.guidance_offset), gradient)

        def place(leaf: np.ndarray) -> Array:
            def rows(index: tuple[slice, ...]) -> np.ndarray:
                return leaf[np.searchsorted(slots, np.arange(n)[index[0]])]

            return jax.make_array_from_callback((n, *leaf.shape[1:]), sharding, rows)

        return jax.tree.map(place, own)

    def abstract_cond(
        self, slots: int, max_tokens: int, dtype: Any, guidance: float, gradient: str = "both"
    ) -> Any:
        """The conditioning of `slots` prompts as jax.ShapeDtypeStructs on the mesh.

        max_tokens, dtype: of config.prompts. guidance, gradient: as for `cond`.
        """
        cond = self.family.cond_shapes(self.config, slots, max_tokens, dtype)
        if is_guided(self.family, guidance):
            scale = jax.ShapeDtypeStruct((slots,), jnp.float32)
            cond = Guided(cond, cond, scale, gradient)
        rows = batch_sharding(self.mesh)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rows), cond
        )

    def sampler(
        self, steps: int, solver: str, tuned: int | None = None, scope: str = "evaluate"
    ) -> Callable[..., Array]:
        """Return a jitted (model, trainable, cond, key, ids int32 [n]) -> uint8 [n, 3, H, W].

        The noise of a picture depends only on its id and the key, not on its batch. solver: a key
        of SOLVERS (rollout.py). tuned: number of steps that take `trainable`; the others take the
        base model. None: all of them do. scope: the name in a profile.
        """

        @partial(jax.jit, compiler_options=copy_options(self.mesh, self.offload))
        @jax.named_scope(scope)
        def pictures(model: Model, trainable: Any, cond: Any, key: Array, ids: Array) -> Array:
            return decode_rows(
                model, sample_rows(model, trainable, cond, key, ids, steps, solver, tuned)
            )

        return pictures

    def with_trainable(self, trainable: Trainable) -> "Model":
        """Return a model with the same weights and a different trainable part."""
        return replace(self, trainable=trainable)


def sample_rows(
    model: Model,
    trainable: Any,
    cond: Any,
    key: Array,
    ids: Array,
    steps: int,
    solver: str,
    tuned: int | None = None,
) -> Array:
    """Return the final latents of pictures, [n, s, c], sharded over the mesh by rows.

    For use in jitted functions; the arguments are those of `Model.sampler` and what it returns.
    """
    ode = SOLVERS[solver]
    latents = numbered_latents(key, ids, model.token_shape)
    latents = jax.lax.with_sharding_constraint(latents, batch_sharding(model.mesh))
    sigmas = model.sigmas(steps)
    velocity = partial(model.velocity, trainable)
    if trainable is not None and tuned is not None:
        velocity = hybrid(velocity, partial(model.velocity, None), sigmas, tuned)
    return ode.sample(velocity, cond, latents, ode.steps(sigmas))


def decode_rows(model: Model, tokens: Array) -> Array:
    """Decode pictures [n, s, c] to uint8 [n, 3, H, W], sharded over the mesh by rows."""
    return jax.lax.with_sharding_constraint(model.decode(tokens), batch_sharding(model.mesh))
