"""Everything a run needs before its first epoch: checks, model, rewards, the compiled calls' functions, first state."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from encode_prompts import ensure_encoded
from ml_collections import ConfigDict

from realgen_jax.checkpoint import Checkpoints
from realgen_jax.data import Layout, read_prompts
from realgen_jax.flux.lora import LoraConfig, init_lora, load_lora
from realgen_jax.flux.pipeline import Pipeline, load_pipeline, no_model
from realgen_jax.flux.text import TextCache
from realgen_jax.flux.transformer import Cond
from realgen_jax.grpo import LossConfig, TrainState, make_optimizer
from realgen_jax.rollout import Plan, make_plan
from realgen_jax.sharding import batch_devices, make_mesh, replicated
from reward_bridge.bridge import RewardBridge, resolve
from reward_bridge.dlpack import check_room, reserve
from reward_bridge.metrics import METRICS, make_metric
from reward_bridge.rewards import REWARDS, make_reward

FILES = {"path", "base", "clip", "tokenizer"}  # options of rewards that name files or folders
INIT = 2  # the stream of the run's root key that draws the first weights; train.py has the others


@dataclass(frozen=True)
class Run:
    """What stays the same from the first epoch to the last."""

    config: ConfigDict
    folder: Path
    layout: Layout
    pipe: Pipeline
    plan: Plan
    cache: TextCache
    prompts: list[str]
    test_prompts: list[str]
    bridge: RewardBridge
    metrics: dict[str, Callable[[np.ndarray], float]]
    checkpoints: Checkpoints
    loss: LossConfig
    optimizer: optax.GradientTransformation
    shardings: TrainState  # of the state

    def cond(self, prompts: Sequence[str]) -> Cond:
        return self.pipe.cond(self.cache, prompts, self.config.sample.guidance_scale)

    def key(self, stream: int) -> jax.Array:
        return jax.random.fold_in(jax.random.key(self.config.seed), stream)


def set_up(config: ConfigDict, folder: Path) -> tuple[Run, TrainState]:
    """Load everything, compile nothing. Returns the run and its first state."""
    sample, t = config.sample, config.train
    check(config)
    loss = LossConfig(t.loss, t.kl, t.beta, t.clip_range, t.adv_clip_max, t.guard_bias)
    layout = Layout(sample.num_batches_per_epoch, sample.train_batch_size, sample.branches, sample.num_image_per_prompt)
    if layout.calls % t.gradient_accumulation_steps:  # told before gigabytes are loaded
        raise ValueError(
            f"num_batches_per_epoch {layout.calls} must be a multiple of gradient_accumulation_steps "
            f"{t.gradient_accumulation_steps}"
        )
    devices = reward_devices(config.reward)
    metrics_device = resolve(config.reward.device)
    used = {*devices.values()} | ({metrics_device} if config.reward.metrics else set())
    shared = reserve(used, config.reward.share_gpu)
    prompts, test_prompts = read_prompts(config.prompts.train), read_prompts(config.prompts.test)
    # text encoders and rewards come before JAX, which takes what it finds of the memory of its devices
    cache = ensure_encoded([*prompts, *test_prompts], config.pretrained.model, config.prompts)
    options = config.reward.options.to_dict()
    rewards = {name: make_reward(name, devices[name], options.get(name, {})) for name in devices}
    metrics = {name: make_metric(name, metrics_device, options.get(name, {})) for name in config.reward.metrics}
    for device in shared:
        check_room(device)
    mesh = make_mesh(**config.mesh, devices=jax.devices())
    layout.check(batch_devices(mesh))
    if sample.test_batch_size % batch_devices(mesh):
        parts = batch_devices(mesh)
        raise ValueError(
            f"test_batch_size {sample.test_batch_size} must be a multiple of {parts}, the mesh's data x fsdp"
        )

    lora = LoraConfig(t.lora_rank, t.lora_alpha, t.lora_init) if t.lora else None
    pipe = load_pipeline(config.pretrained, sample.resolution, lora, mesh)
    optimizer = make_optimizer(
        t.learning_rate, t.adam_beta1, t.adam_beta2, t.adam_epsilon, t.adam_weight_decay, t.max_grad_norm
    )
    init_key = jax.random.fold_in(jax.random.key(config.seed), INIT)
    state, shardings = first_state(pipe, config, optimizer, init_key)
    run = Run(
        config=config,
        folder=folder,
        layout=layout,
        pipe=pipe,
        plan=make_plan(
            pipe.sigmas(sample.num_steps),
            kind=sample.sde_type,
            noise_level=sample.noise_level,
            window=sample.sde_window_size,
            bounds=tuple(sample.sde_window_range),
            branches=sample.branches,
        ),
        cache=cache,
        prompts=prompts,
        test_prompts=test_prompts,
        bridge=RewardBridge(
            rewards,
            devices,
            deadline=config.reward.deadline,
            retries=config.reward.retries,
            batch_size=config.reward.batch_size,
        ),
        metrics=metrics,
        checkpoints=Checkpoints(folder / "checkpoints", config.num_checkpoint_limit),
        loss=loss,
        optimizer=optimizer,
        shardings=shardings,
    )
    return run, state


def check(config: ConfigDict) -> None:
    """Name everything that is missing at once, before anything is loaded."""
    model, reward, missing = Path(config.pretrained.model), config.reward, []
    if not (model / "model_index.json").exists():
        missing.append(no_model(model))
    for name in ("train", "test"):
        if not Path(config.prompts[name]).is_file():
            missing.append(
                f"config.prompts.{name} is {config.prompts[name]!r}, which does not exist; expected one prompt a line "
                "(.txt) or .jsonl. RealGen's own files come with its repository, under dataset/realgen"
            )
    names = [*reward.fn, *reward.held_out]
    if twice := {name for name in names if names.count(name) > 1}:
        missing.append(f"{', '.join(sorted(twice))}: trained on and held out at once, in config.reward; choose one")
    options = reward.options.to_dict()
    local = [name for name in names if "servers" not in options.get(name, {})]  # servers know their own
    for name in local:
        for option, file in sorted(options.get(name, {}).items()):
            if option in FILES and file and not Path(file).expanduser().exists():
                missing.append(
                    f"config.reward.options.{name}.{option} is {file!r}, which does not exist; "
                    "README.md, Rewards, says where the weights come from"
                )
    for kind, wanted, known in (
        ("reward", local, REWARDS),
        ("metric", reward.metrics, METRICS),
    ):
        if unknown := [name for name in wanted if name not in known]:
            missing.append(f"there is no {kind} {', '.join(unknown)}; choose from {', '.join(sorted(known))}")
    if config.pretrained.lora and not config.train.lora:
        missing.append("config.pretrained.lora is set, but config.train.lora=False trains all weights and no adapters")
    if config.eval_freq < 1 or config.save_freq < 1:
        missing.append(f"eval_freq {config.eval_freq} and save_freq {config.save_freq} must be 1 or more epochs")
    if config.wandb_project and importlib.util.find_spec("wandb") is None:
        missing.append("config.wandb_project is set, but wandb is not installed: pip install wandb")
    if missing:
        raise ValueError("\n".join(missing))


def reward_devices(reward: ConfigDict) -> dict[str, str]:
    """The torch device of every reward: its own in `reward.devices`, else the CPU for what servers score, else
    `reward.device`.
    """
    remote = {name: "cpu" for name in reward.options if "servers" in reward.options[name]}
    own = remote | reward.devices.to_dict()
    if unknown := set(reward.devices) - {*reward.fn, *reward.held_out}:
        raise ValueError(f"config.reward.devices names {', '.join(sorted(unknown))}, which is no reward of this run")
    return {name: resolve(own.get(name, reward.device)) for name in (*reward.fn, *reward.held_out)}


def first_state(
    pipe: Pipeline, config: ConfigDict, optimizer: optax.GradientTransformation, key: jax.Array
) -> tuple[TrainState, TrainState]:
    """The state before any step, on the mesh, and its shardings: adapters are replicated, weights lie as they are."""
    everywhere = replicated(pipe.mesh)
    if pipe.lora is None:
        trainable = jax.tree.map(lambda p: p.astype(jnp.float32), pipe.params)
        shardings = jax.tree.map(lambda p: p.sharding, pipe.params)
    else:
        trainable = init_lora(pipe.model, pipe.lora, key)
        if config.pretrained.lora:
            found, trainable = load_lora(config.pretrained.lora, pipe.model)
            if (found.rank, found.alpha) != (pipe.lora.rank, pipe.lora.alpha):
                raise ValueError(
                    f"{config.pretrained.lora} has rank {found.rank} and alpha {found.alpha:g}, config.train has "
                    f"lora_rank {pipe.lora.rank} and lora_alpha {pipe.lora.alpha:g}; set those to the file's"
                )
        shardings = jax.tree.map(lambda _: everywhere, trainable)
    trainable = jax.device_put(trainable, shardings)
    opt_shardings = optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, trainable),
        shardings,
        transform_non_params=lambda _: everywhere,
    )
    where = TrainState(shardings, shardings, opt_shardings, everywhere)
    start = lambda p: TrainState(p, jax.tree.map(jnp.copy, p), optimizer.init(p), jnp.int32(0))  # noqa: E731
    return jax.jit(start, out_shardings=where)(trainable), where
