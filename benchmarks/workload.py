"""The programs of a training run at any size, for the benchmarks.

They call what the programs of realgen_jax/training/programs.py call, but that module needs
ml_collections and grain, which a GPU machine may lack. Needs jax, flax, optax and what the model
itself imports. Arguments are abstract (jax.ShapeDtypeStruct) until `fill` makes them on the device,
so that a program can be lowered without memory.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from realgen_jax.models import cost
from realgen_jax.models.flux.family import FLUX
from realgen_jax.models.flux.transformer import FluxConfig
from realgen_jax.models.model import Model
from realgen_jax.models.trainable import Lora
from realgen_jax.nn.convert import abstract
from realgen_jax.nn.lora import LoraConfig
from realgen_jax.nn.vae import Autoencoder, VaeConfig
from realgen_jax.objectives.grpo import Grpo, LossConfig, guard_loss, velocity_kl
from realgen_jax.objectives.reference import Reference
from realgen_jax.rollout import Plan, Trajectory, draw_latents, sample
from realgen_jax.sde import ode_steps
from realgen_jax.sharding import make_mesh
from realgen_jax.update import Batch, EmaConfig, TrainState, make_optimizer, update


@dataclass(frozen=True)
class Size:
    """Everything that the programs' shapes depend on.

    The defaults are RealGen's: the preset flux_dev_8xh200 of configs/flux_grpo.py.
    """

    model: FluxConfig = field(default_factory=FluxConfig)
    vae: VaeConfig = field(default_factory=VaeConfig)
    side: int = 64  # image tokens down and across: 1024 pixels
    text: int = 512
    steps: int = 28
    window: int = 7
    bounds: tuple[int, int] = (0, 21)
    branches: int = 3
    rank: int = 64

    @property
    def start(self) -> int:
        """The mean of the window's starts, so that a rollout takes as long as the average one."""
        return (self.bounds[0] + self.bounds[1] - self.window) // 2

    @property
    def objective(self) -> Grpo:
        """GRPO-Guard as RealGen trains it, but for its clip.

        RealGen clips at 2e-6. Random trajectories would then all be clipped, and their gradients
        zero.
        """
        return Grpo(
            loss=guard_loss,
            kl=velocity_kl,
            config=LossConfig(clip_range=1.0, adv_clip_max=5.0),
            reference=Reference(beta=4e-4),
            sde_type="sde",
            noise_level=0.9,
            window=self.window,
            window_range=self.bounds,
            branches=self.branches,
        )

    @property
    def plan(self) -> Plan:
        plan = self.objective.make_plan(FLUX.Schedule().sigmas(self.steps, self.side**2))
        return replace(plan, start=jnp.int32(self.start))

    def work(self, slots: int) -> cost.Work:
        """One rollout call and its update, for the formulas of operations.

        On a CPU, attention writes its scores to memory.
        """
        cond_shapes = FLUX.cond_shapes(self.model, 1, self.text, self.model.dtype)
        return cost.Work(
            formulas=FLUX.cost,
            model=self.model,
            vae=self.vae,
            image_tokens=self.side**2,
            text_tokens=self.text,
            text_bytes=cost.row_bytes(cond_shapes),
            rank=self.rank,
            images=slots * self.branches,
            slots=slots,
            steps=self.steps,
            window=self.window,
            trained=self.window,
            prefix=self.start,
            calls=1,
            inner_epochs=1,
            reference=1,
            recompute=False,
            flash=jax.default_backend() != "cpu",
            fused=jax.default_backend() != "cpu",
        )


@dataclass(frozen=True)
class Program:
    """A jitted call with its arguments."""

    call: Callable
    arguments: tuple  # the model first
    flops: float  # useful operations: what is computed a second time does not count for MFU
    feeds_back: bool = False  # the first result replaces the second argument, which is donated

    def after(self, arguments: tuple, result: Any) -> tuple:
        """Return the next call's arguments."""
        if self.feeds_back:
            return (arguments[0], result[0], *arguments[2:])
        return arguments


def weights(size: Size) -> Model:
    """The abstract model, on one device: its leaves are the weights of all programs."""
    return Model(
        params=abstract(FLUX.Module, size.model)[1],
        vae_params=abstract(Autoencoder, size.vae)[1],
        family=FLUX,
        config=size.model,
        vae=size.vae,
        schedule=FLUX.Schedule(),
        trainable=Lora(LoraConfig(size.rank)),
        height=size.side,
        width=size.side,
        mesh=make_mesh(1, 1, 1, jax.devices()[:1]),
    )


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _cond(model: Model, size: Size, rows: int) -> Any:
    return model.abstract_cond(rows, size.text, size.model.dtype, guidance=3.5)


def sampling(size: Size, images: int) -> Program:
    """(model, latents [n, s, c], cond) -> latents: ODE sampling of the base model, undecoded."""
    abstract_model = weights(size)
    ode = ode_steps(abstract_model.sigmas(size.steps))

    @jax.jit
    def call(model: Model, latents: jax.Array, cond: Any) -> jax.Array:
        return sample(partial(model.velocity, None), cond, latents, ode)

    latents = _float32(images, *abstract_model.token_shape)
    arguments = (abstract_model, latents, _cond(abstract_model, size, images))
    forward = FLUX.cost.forward_flops(replace(size.work(1), rank=0))
    return Program(call, arguments, images * size.steps * sum(forward.values()))


def decoding(size: Size, images: int) -> Program:
    """(model, latents [n, s, c]) -> uint8 pictures [n, 3, H, W]."""
    abstract_model = weights(size)
    call = jax.jit(Model.decode)
    tokens = _float32(images, *abstract_model.token_shape)
    return Program(call, (abstract_model, tokens), images * cost.decode_flops(size.work(1)))


def rollouts(size: Size, slots: int) -> Program:
    """(model, adapters, cond, keys, plan) -> (latents, trajectory), not decoded."""
    abstract_model = weights(size)
    objective = size.objective
    images = slots * size.branches

    @jax.jit
    def call(model: Model, trainable: Any, cond: Any, keys: Any, plan: Plan) -> Any:
        latent_key, noise_key = keys
        latents = draw_latents(latent_key, slots, slots, model.token_shape)
        noise = objective.draw_noise(noise_key, plan, images, model.token_shape)
        return objective.collect(model.velocity, trainable, cond, latents, noise, plan)

    arguments = (
        abstract_model,
        abstract_model.trainable.abstract(abstract_model),
        _cond(abstract_model, size, slots),
        (jax.random.key(0), jax.random.key(1)),
        size.plan,
    )
    return Program(call, arguments, cost.epoch_flops(size.work(slots))["rollout"])


def updating(size: Size, slots: int) -> Program:
    """(model, state, batch) -> (state, metrics): one optimizer step on one rollout call."""
    abstract_model = weights(size)
    objective = size.objective
    optimizer = make_optimizer(1e-4, 0.9, 0.999, 1e-8, 1e-4, 1.0)
    ema = EmaConfig(0.9, 8)

    @partial(jax.jit, donate_argnums=1)
    def call(model: Model, state: TrainState, batch: Batch) -> Any:
        return update(objective, optimizer, ema, model.velocity, state, batch)

    # The state.
    trainable = abstract_model.trainable.abstract(abstract_model)
    opt_state = jax.eval_shape(optimizer.init, trainable)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(trainable, trainable, opt_state, step)

    # One call's trajectory, with the true coefficients of its steps.
    images = slots * size.branches
    latent = abstract_model.token_shape
    window = slice(size.start, size.start + size.window)
    trajectory = Trajectory(
        latents=_float32(1, size.window + 1, images, *latent),
        mean=_float32(1, size.window, images, *latent),
        logp=_float32(1, size.window, images),
        steps=jax.tree.map(lambda values: values[None, window], size.plan.noisy),
    )

    # Its conditioning, with the axis of calls in front.
    cond = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype),
        _cond(abstract_model, size, slots),
    )

    epoch = cost.epoch_flops(size.work(slots))
    flops = epoch["useful"] - epoch["rollout"] - epoch["decode"]
    batch = Batch(trajectory, cond, _float32(1, images))
    return Program(call, (abstract_model, state, batch), flops, feeds_back=True)


@partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return 0.02 * jax.random.normal(key, shape, dtype)


def fill(tree: Any, seed: int = 0) -> Any:
    """Replace abstract arrays by random ones on the device, N(0, 0.02^2), each in its precision.

    Norms' scales are 1; biases, the optimizer's moments and integers are 0. Arrays stay as they
    are.
    """
    key = jax.random.key(seed, impl="rbg")  # compiles quickly, and takes one pass over the memory

    def make(path: Any, leaf: Any, i: int) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        name = jax.tree_util.keystr(path)
        if re.search(r"\b(query|key|scale)\b", name) and ".opt_state" not in name:
            return jnp.ones(leaf.shape, leaf.dtype)
        if re.search(r"\.(mu|nu|count)\b|\bbias\b", name) or jnp.issubdtype(
            leaf.dtype, jnp.integer
        ):
            return jnp.zeros(leaf.shape, leaf.dtype)
        return _normal(jax.random.fold_in(key, i), leaf.shape, leaf.dtype)

    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    return structure.unflatten(make(path, leaf, i) for i, (path, leaf) in enumerate(leaves))


def filled(program: Program, weights: Model, seed: int = 0) -> tuple:
    """A program's arguments on the device: the arrays of `weights`, all others random.

    The model is the program's own otherwise, because its config may name another
    rematerialisation policy than that of `weights`.
    """
    own: Model = program.arguments[0]
    model = replace(own, params=weights.params, vae_params=weights.vae_params)
    return (model, *fill(program.arguments[1:], seed))


def start(program: Program, weights: Model) -> Callable[[], Any]:
    """Compile a program on random arguments. A call that feeds back continues from the last one."""
    arguments = filled(program, weights)
    compiled = program.call.lower(*arguments).compile()

    def call() -> Any:
        nonlocal arguments
        result = compiled(*arguments)
        arguments = program.after(arguments, result)
        return result

    return call


def tiny(double: int = 2, single: int = 2, **kw: Any) -> Size:
    """A toy for tests.

    It has two blocks of each kind, because XLA unrolls a loop of one iteration into another
    program.
    """
    model = FluxConfig(
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
        dtype=jnp.float32,
        param_dtype=jnp.float32,
    )
    vae = VaeConfig((8, 8), layers_per_block=1, norm_num_groups=4)
    size = Size(model, vae, side=4, text=8, steps=4, window=2, bounds=(0, 4), rank=4)
    return replace(size, **kw)
