"""A FluxPipeline folder on a mesh: transformer, autoencoder and schedule, ready to sample with."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from realgen_jax.models.flux.transformer import Cond, FluxConfig, FluxTransformer
from realgen_jax.nn.convert import (
    Sharding,
    abstract,
    leaves,
    load_transformer,
    load_vae,
    transformer_config,
    vae_config,
)
from realgen_jax.nn.lora import LoraConfig, make_velocity
from realgen_jax.nn.vae import Autoencoder, VaeConfig, decode_tokens
from realgen_jax.rollout import Velocity, sample
from realgen_jax.sde import SchedulerConfig, flux_sigmas, ode_steps
from realgen_jax.sharding import batch_sharding, param_sharding, replicated
from realgen_jax.text_cache import TextCache

PATCH = 2  # latent pixels a token's side
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Pipeline:
    """`params` are the transformer's frozen weights; `velocity(params, trainable, ...)` reads adapters if `lora`."""

    model: FluxConfig
    params: nnx.State
    vae_graph: nnx.GraphDef
    vae_params: nnx.State
    velocity: Velocity
    lora: LoraConfig | None
    scheduler: SchedulerConfig
    height: int  # tokens down and across
    width: int
    mesh: Mesh

    @property
    def token_shape(self) -> tuple[int, int]:
        """(image tokens, channels of a token)."""
        return self.height * self.width, self.model.in_channels

    def with_lora(self, lora: LoraConfig) -> "Pipeline":
        """The same weights with room for these adapters."""
        return replace(
            self,
            lora=lora,
            velocity=make_velocity(self.model, lora, self.height, self.width, self.mesh),
        )

    def sigmas(self, num_steps: int) -> np.ndarray:
        return flux_sigmas(num_steps, self.height * self.width, self.scheduler)

    @jax.named_scope("decode")
    def decode(self, vae_params: nnx.State, tokens: Array) -> Array:
        """Final latents [n, s, c] -> uint8 [n, 3, H, W]."""
        return decode_tokens(
            nnx.merge(self.vae_graph, vae_params), tokens, self.height, self.width, self.mesh
        )

    def cond(self, cache: TextCache, prompts: Sequence[str], guidance: float) -> Cond:
        """The prompts' embeddings, one a slot, spread over the mesh; a host reads those of its own slots."""
        n, sharding = len(prompts), batch_sharding(self.mesh)
        slots = sorted(
            {
                i
                for (rows,) in sharding.addressable_devices_indices_map((n,)).values()
                for i in range(n)[rows]
            }
        )
        arrays = cache.read([prompts[i] for i in slots])

        def place(own: np.ndarray) -> Array:
            rows = lambda index: own[np.searchsorted(slots, np.arange(n)[index[0]])]  # noqa: E731
            return jax.make_array_from_callback((n, *own.shape[1:]), sharding, rows)

        guidances = np.full(len(slots), guidance, np.float32)
        return Cond(place(arrays["t5"]), place(arrays["clip"]), place(guidances))

    def sampler(self, num_steps: int) -> Any:
        """A jitted (params, vae_params, trainable, cond, key, ids int32 [n]) -> uint8 pictures [n, 3, H, W].

        The noise of a picture comes from its id and the key alone, whatever the batch it is in.
        """
        ode = ode_steps(self.sigmas(num_steps))

        @jax.jit
        @jax.named_scope("evaluate")
        def run(params, vae_params, trainable, cond, key, ids):
            draw = lambda i: jax.random.normal(jax.random.fold_in(key, i), self.token_shape)  # noqa: E731
            latents = jax.lax.with_sharding_constraint(
                jax.vmap(draw)(ids), batch_sharding(self.mesh)
            )
            tokens = sample(self.velocity, params, trainable, cond, latents, ode)
            return jax.lax.with_sharding_constraint(
                self.decode(vae_params, tokens), batch_sharding(self.mesh)
            )

        return partial(run, self.params, self.vae_params)


def no_model(folder: Path) -> str:
    """What to do about a missing model folder."""
    return (
        f"config.pretrained.model is {str(folder)!r}, which holds no model_index.json; expected a FluxPipeline folder "
        "of diffusers. For FLUX.1-dev accept its licence on the Hugging Face hub, run\n"
        "    hf download black-forest-labs/FLUX.1-dev --local-dir models/FLUX.1-dev\n"
        "and name the folder with --config.pretrained.model=models/FLUX.1-dev"
    )


def load_pipeline(
    pretrained: Any, resolution: int, lora: LoraConfig | None, mesh: Mesh
) -> Pipeline:
    """Load what `config.pretrained` names for square pictures of `resolution` pixels, with room for `lora` adapters."""
    folder = Path(pretrained.model)
    if not (folder / "model_index.json").exists():
        raise FileNotFoundError(no_model(folder))
    dtypes, vae_dtype = _dtypes(pretrained)
    source = Path(pretrained.transformer or folder / "transformer")
    model, params = load_transformer(source, param_sharding(mesh), remat=pretrained.remat, **dtypes)
    vae, vae_params = load_vae(
        folder / "vae", lambda leaf, shape: replicated(mesh), dtype=vae_dtype
    )
    return _pipeline(model, params, vae, vae_params, _scheduler(folder), resolution, lora, mesh)


def described(pretrained: Any) -> bool:
    """Whether the sizes of the model are on the disk: BFL's single file has none beside its weights."""
    return (Path(pretrained.model) / "model_index.json").exists() and not Path(
        pretrained.transformer
    ).is_file()


def abstract_pipeline(
    pretrained: Any, resolution: int, lora: LoraConfig | None, mesh: Mesh
) -> Pipeline:
    """The same without weights: `params` and `vae_params` are jax.ShapeDtypeStructs with their shardings.

    Sizes come from the folder's config.json files if it is `described`, else they are FLUX.1-dev's. No weights are
    read.
    """
    folder = Path(pretrained.model)
    dtypes, vae_dtype = _dtypes(pretrained)
    kw = {"remat": pretrained.remat, **dtypes}
    if described(pretrained):
        model = transformer_config(Path(pretrained.transformer or folder / "transformer"), **kw)
        vae, scheduler = vae_config(folder / "vae", dtype=vae_dtype), _scheduler(folder)
    else:
        model, vae, scheduler = FluxConfig(**kw), VaeConfig(dtype=vae_dtype), SchedulerConfig()
    params = _placed(abstract(FluxTransformer, model)[1], param_sharding(mesh))
    vae_params = _placed(abstract(Autoencoder, vae)[1], lambda leaf, shape: replicated(mesh))
    return _pipeline(model, params, vae, vae_params, scheduler, resolution, lora, mesh)


def _placed(state: nnx.State, sharding: Sharding) -> nnx.State:
    """An abstract state with the sharding of every array."""
    arrays = leaves(state)
    return nnx.from_flat_state(
        (
            path,
            variable.replace(
                jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding(leaf, a.shape))
            ),
        )
        for (leaf, a), (path, variable) in zip(
            arrays.items(), nnx.to_flat_state(state), strict=True
        )
    )


def _dtypes(pretrained: Any) -> tuple[dict[str, Any], Any]:
    """The transformer's dtype and param_dtype, and the autoencoder's dtype."""
    for name in ("dtype", "param_dtype", "vae_dtype"):
        if pretrained[name] not in DTYPES:
            raise ValueError(
                f"config.pretrained.{name} is {pretrained[name]!r}; choose one of {', '.join(DTYPES)}"
            )
    return {name: jnp.dtype(pretrained[name]) for name in ("dtype", "param_dtype")}, jnp.dtype(
        pretrained.vae_dtype
    )


def _scheduler(folder: Path) -> SchedulerConfig:
    found = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    names = {field.name for field in fields(SchedulerConfig)} & found.keys()
    return SchedulerConfig(**{name: found[name] for name in names})


def _pipeline(
    model: FluxConfig,
    params: nnx.State,
    vae: VaeConfig,
    vae_params: nnx.State,
    scheduler: SchedulerConfig,
    resolution: int,
    lora: LoraConfig | None,
    mesh: Mesh,
) -> Pipeline:
    side = PATCH * 2 ** (len(vae.block_out_channels) - 1)
    if resolution % side:
        raise ValueError(f"config.sample.resolution is {resolution}; expected a multiple of {side}")
    height = width = resolution // side
    velocity = make_velocity(model, lora, height, width, mesh)
    vae_graph = abstract(Autoencoder, vae)[0]
    return Pipeline(
        model, params, vae_graph, vae_params, velocity, lora, scheduler, height, width, mesh
    )
