"""The programs of a training run at any size, for the benchmarks.

They are the programs that realgen_jax/training/programs.py makes from a config. Arguments are
abstract (jax.ShapeDtypeStruct) until `fill` makes them on the device, so that a program can be
lowered without memory. Needs jax, flax, optax and what the model itself imports, but not
ml_collections, which may not be installed.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from realgen_jax.models.flux import cost
from realgen_jax.models.flux.transformer import Cond, FluxConfig, FluxTransformer
from realgen_jax.nn.convert import abstract
from realgen_jax.nn.lora import LoraConfig, init_lora, make_velocity
from realgen_jax.nn.vae import Autoencoder, VaeConfig, decode_tokens
from realgen_jax.objectives.grpo import (
    Batch,
    EmaConfig,
    LossConfig,
    TrainState,
    make_optimizer,
    update,
)
from realgen_jax.rollout import Plan, Trajectory, draw_noise, make_plan, rollout, sample
from realgen_jax.sde import SchedulerConfig, flux_sigmas, ode_steps


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
    def plan(self) -> Plan:
        sigmas = flux_sigmas(self.steps, self.side**2, SchedulerConfig())
        window = {"window": self.window, "bounds": self.bounds, "branches": self.branches}
        plan = make_plan(sigmas, kind="sde", noise_level=0.9, **window)
        return replace(plan, start=jnp.int32(self.start))

    def work(self, slots: int) -> cost.Work:
        """One rollout call and its update, for the formulas of operations.

        On a CPU, attention writes its scores to memory.
        """
        return cost.Work(
            model=self.model,
            vae=self.vae,
            image_tokens=self.side**2,
            text_tokens=self.text,
            rank=self.rank,
            images=slots * self.branches,
            slots=slots,
            steps=self.steps,
            window=self.window,
            prefix=self.start,
            calls=1,
            inner_epochs=1,
            reference=True,
            recompute=False,
            flash=jax.default_backend() != "cpu",
        )


@dataclass(frozen=True)
class Program:
    """A jitted call with its arguments."""

    call: Callable
    arguments: tuple  # weights first
    flops: float  # useful operations: what is computed a second time does not count for MFU
    feeds_back: bool = False  # the first result replaces the second argument, which is donated

    def after(self, arguments: tuple, result: Any) -> tuple:
        """Return the next call's arguments."""
        if self.feeds_back:
            return (arguments[0], result[0], *arguments[2:])
        return arguments


def weights(size: Size) -> nnx.State:
    return abstract(FluxTransformer, size.model)[1]


def adapters(size: Size) -> nnx.State:
    return jax.eval_shape(lambda: init_lora(size.model, LoraConfig(size.rank), jax.random.key(0)))


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _cond(size: Size, *rows: int) -> Cond:
    model = size.model
    t5 = jax.ShapeDtypeStruct((*rows, size.text, model.joint_attention_dim), model.dtype)
    clip = jax.ShapeDtypeStruct((*rows, model.pooled_projection_dim), model.dtype)
    return Cond(t5, clip, _float32(*rows))


def sampling(size: Size, images: int) -> Program:
    """(weights, latents [n, s, c], cond) -> latents: ODE sampling of the base model, undecoded."""
    velocity = make_velocity(size.model, None, size.side, size.side)
    ode = ode_steps(flux_sigmas(size.steps, size.side**2, SchedulerConfig()))
    call = jax.jit(lambda params, latents, cond: sample(velocity, params, None, cond, latents, ode))
    flops = images * size.steps * sum(cost.forward_flops(replace(size.work(1), rank=0)).values())
    latents = _float32(images, size.side**2, size.model.in_channels)
    return Program(call, (weights(size), latents, _cond(size, images)), flops)


def decoding(size: Size, images: int) -> Program:
    """(the autoencoder's weights, latents [n, s, c]) -> uint8 pictures [n, 3, H, W]."""
    graph, params = abstract(Autoencoder, size.vae)
    call = jax.jit(
        lambda params, tokens: decode_tokens(nnx.merge(graph, params), tokens, size.side, size.side)
    )
    tokens = _float32(images, size.side**2, size.model.in_channels)
    return Program(call, (params, tokens), images * cost.decode_flops(size.work(1)))


def rollouts(size: Size, slots: int) -> Program:
    """(weights, adapters, cond, keys, plan) -> (latents, trajectory), not decoded."""
    velocity = make_velocity(size.model, LoraConfig(size.rank), size.side, size.side)
    shape = size.side**2, size.model.in_channels

    @jax.jit
    def call(params, trainable, cond, keys, plan):
        latents, noise = draw_noise(*keys, plan, slots, slots, shape)
        return rollout(velocity, params, trainable, cond, latents, noise, plan)

    keys = jax.random.key(0), jax.random.key(1)
    flops = cost.epoch_flops(size.work(slots))["rollout"]
    return Program(
        call, (weights(size), adapters(size), _cond(size, slots), keys, size.plan), flops
    )


def updating(size: Size, slots: int) -> Program:
    """(weights, state, batch) -> (state, metrics): one optimizer step on one rollout call."""
    velocity = make_velocity(size.model, LoraConfig(size.rank), size.side, size.side)
    optimizer = make_optimizer(1e-4, 0.9, 0.999, 1e-8, 1e-4, 1.0)
    # RealGen clips at 2e-6. Random trajectories would then all be clipped, and their gradients
    # zero.
    loss = LossConfig("guard", "velocity", beta=4e-4, clip_range=1.0, adv_clip_max=5.0)
    call = jax.jit(partial(update, velocity, optimizer, loss, EmaConfig(0.9, 8)), donate_argnums=1)
    trainable = adapters(size)
    state = TrainState(
        trainable,
        trainable,
        jax.eval_shape(optimizer.init, trainable),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    images, latent = slots * size.branches, (size.side**2, size.model.in_channels)
    steps = jax.tree.map(lambda a: a[None, size.start : size.start + size.window], size.plan.noisy)
    trajectory = Trajectory(
        _float32(1, size.window + 1, images, *latent),
        _float32(1, size.window, images, *latent),
        _float32(1, size.window, images),
        steps,
    )
    epoch = cost.epoch_flops(size.work(slots))
    flops = epoch["useful"] - epoch["rollout"] - epoch["decode"]
    batch = Batch(trajectory, _cond(size, 1, slots), _float32(1, images))
    return Program(call, (weights(size), state, batch), flops, feeds_back=True)


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


def start(program: Program, params: Any) -> Callable[[], Any]:
    """Compile a program on random arguments. A call that feeds back continues from the last one."""
    arguments = (params, *fill(program.arguments[1:]))
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
