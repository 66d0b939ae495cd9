"""Everything a run needs before its first epoch: checks, model, rewards, the compiled calls' functions, first state."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from realgen_jax.checkpoint import Checkpoints
from realgen_jax.data import read_prompts
from realgen_jax.hosts import process_count, put
from realgen_jax.models.flux.family import Pipeline, load_pipeline, no_model
from realgen_jax.models.flux.tables import ENCODERS
from realgen_jax.models.flux.transformer import Cond
from realgen_jax.nn.lora import init_lora, load_lora
from realgen_jax.objectives.grpo import TrainState
from realgen_jax.realbench.prompts import read_sets
from realgen_jax.rollout import Plan
from realgen_jax.sharding import batch_devices, make_mesh
from realgen_jax.text_cache import TextCache, ensure_encoded
from realgen_jax.training.learning import make_adversaries
from realgen_jax.training.programs import Recipe, abstract_state, check_mesh, make_recipe
from reward_bridge.adversary import Adversary
from reward_bridge.bridge import RewardBridge, resolve
from reward_bridge.dlpack import check_room, reserve
from reward_bridge.learners import LEARNERS
from reward_bridge.metrics import METRICS, make_metric
from reward_bridge.rewards import REWARDS, make_reward

FILES = {"path", "base", "clip", "tokenizer"}  # options of rewards that name files or folders
INIT = 2  # the stream of the run's root key that draws the first weights; train.py has the others


@dataclass(frozen=True)
class Run:
    """What stays the same from the first epoch to the last."""

    config: ConfigDict
    folder: Path
    recipe: Recipe
    pipe: Pipeline
    plan: Plan
    cache: TextCache
    prompts: list[str]
    test_prompts: list[str]
    bridge: RewardBridge
    adversaries: dict[str, Adversary]  # those of the bridge's rewards that learn
    metrics: dict[str, Callable[[np.ndarray], float]]
    checkpoints: Checkpoints

    def cond(self, prompts: Sequence[str]) -> Cond:
        return self.pipe.cond(self.cache, prompts, self.config.sample.guidance_scale)

    def key(self, stream: int) -> jax.Array:
        return jax.random.fold_in(jax.random.key(self.config.seed), stream)


def set_up(config: ConfigDict, folder: Path, encode: Sequence[str]) -> tuple[Run, TrainState]:
    """Load everything, compile nothing. Returns the run and its first state.

    encode: the command of the program that encodes prompts, as for `ensure_encoded`.
    """
    sample = config.sample
    check(config)
    recipe = make_recipe(config)  # told before gigabytes are loaded
    devices = reward_devices(config.reward)
    metrics_device = resolve(config.reward.device)
    used = {*devices.values()} | ({metrics_device} if config.reward.metrics else set())
    shared = reserve(used, config.reward.share_gpu)
    prompts, test_prompts = read_prompts(config.prompts.train), read_prompts(config.prompts.test)
    # text encoders and rewards come before JAX, which takes what it finds of the memory of its devices
    sets = read_sets(config.evaluate.prompts) if reports(config) else []
    texts = [*prompts, *test_prompts, *(prompt for one in sets for prompt in one.prompts)]
    cache = ensure_encoded(texts, config.pretrained.model, ENCODERS, config.prompts, encode)
    options = config.reward.options.to_dict()
    adversaries = make_adversaries(config, devices, prompts)
    frozen = {
        name: make_reward(name, devices[name], options.get(name, {}))
        for name in devices
        if name not in adversaries
    }
    rewards = {name: adversaries.get(name) or frozen[name] for name in devices}
    metrics = {
        name: make_metric(name, metrics_device, options.get(name, {}))
        for name in config.reward.metrics
    }
    for device in shared:
        check_room(device)
    mesh = make_mesh(**config.mesh, devices=jax.devices())
    check_mesh(recipe, mesh)
    if batch_devices(mesh) % process_count():
        raise ValueError(
            f"the mesh's data x fsdp is {batch_devices(mesh)}, which {process_count()} processes cannot share evenly; "
            "every one must hold pictures of its own: let config.mesh.tensor divide a host's devices"
        )

    pipe = load_pipeline(config.pretrained, sample.resolution, recipe.lora, mesh)
    state = first_state(recipe, pipe, jax.random.fold_in(jax.random.key(config.seed), INIT))
    run = Run(
        config=config,
        folder=folder,
        recipe=recipe,
        pipe=pipe,
        plan=recipe.plan(pipe),
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
        adversaries=adversaries,
        metrics=metrics,
        checkpoints=Checkpoints(folder / "checkpoints", config.num_checkpoint_limit),
    )
    return run, state


def keep_compiled(folder: str) -> None:
    """Take compiled programs from this folder, and add to it; empty: compile anew."""
    if folder:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


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
        missing.append(
            f"{', '.join(sorted(twice))}: trained on and held out at once, in config.reward; choose one"
        )
    for name in reward.adversarial:
        if name not in reward.fn:
            missing.append(
                f"config.reward.adversarial has {name}, which config.reward.fn does not train on"
            )
        if "servers" in reward.options.get(name, {}):
            missing.append(
                f"{name} is behind servers and cannot learn; take it out of config.reward.adversarial"
            )
    missing += missing_rewards(
        reward, names + (list(config.evaluate.scores) if reports(config) else [])
    )
    if unknown := [name for name in reward.metrics if name not in METRICS]:
        missing.append(
            f"there is no metric {', '.join(unknown)}; choose from {', '.join(sorted(METRICS))}"
        )
    if config.pretrained.lora and not config.train.lora:
        missing.append(
            "config.pretrained.lora is set, but config.train.lora=False trains all weights and no adapters"
        )
    if reports(config) and config.evaluate.arena.protocol == "realgen":
        missing.append(
            "config.evaluate.arena.protocol is 'realgen', which compares with photographs, and a run's own report has "
            "none; set config.evaluate.after_training=False, and call scripts/evaluate.py --photographs afterwards"
        )
    if config.save_failure not in ("stop", "continue"):
        missing.append(f"config.save_failure is {config.save_failure!r}; choose stop or continue")
    if config.eval_freq < 1 or config.save_freq < 1:
        missing.append(
            f"eval_freq {config.eval_freq} and save_freq {config.save_freq} must be 1 or more epochs"
        )
    wrong = [
        step
        for step in config.profile.steps
        if type(step) is not int or not 0 < step <= config.num_epochs
    ]
    if wrong:
        missing.append(
            f"config.profile.steps has {', '.join(map(repr, wrong))}; expected epochs of this run, 1 to "
            f"{config.num_epochs} (config.num_epochs): --config.profile.steps=3,5"
        )
    if config.wandb_project and importlib.util.find_spec("wandb") is None:
        missing.append("config.wandb_project is set, but wandb is not installed: pip install wandb")
    if missing:
        raise ValueError("\n".join(missing))


def missing_rewards(reward: ConfigDict, names: Sequence[str]) -> list[str]:
    """What these rewards lack: a line for each weights file that is not there, and for names that no reward has."""
    missing, options = [], reward.options.to_dict()
    local = [
        name for name in dict.fromkeys(names) if "servers" not in options.get(name, {})
    ]  # servers know their own
    for name in local:
        for option, file in sorted(options.get(name, {}).items()):
            if option in FILES and file and not Path(file).expanduser().exists():
                missing.append(
                    f"config.reward.options.{name}.{option} is {file!r}, which does not exist; "
                    "README.md, Rewards, says where the weights come from"
                )
    for kind, wanted, known in (
        ("reward", [name for name in local if name not in reward.adversarial], REWARDS),
        ("reward that learns", [name for name in local if name in reward.adversarial], LEARNERS),
    ):
        if unknown := [name for name in wanted if name not in known]:
            missing.append(
                f"there is no {kind} {', '.join(unknown)}; choose from {', '.join(sorted(known))}"
            )
    return missing


def reports(config: ConfigDict) -> bool:
    """Whether this run ends with RealBench's report."""
    return config.evaluate.after_training and process_count() == 1


def reward_devices(reward: ConfigDict, names: Sequence[str] | None = None) -> dict[str, str]:
    """The torch device of each of these rewards (default: the run's): its own in `reward.devices`, else the CPU for
    what servers score, else `reward.device`.
    """
    run = (*reward.fn, *reward.held_out)
    names = run if names is None else names
    remote = {name: "cpu" for name in reward.options if "servers" in reward.options[name]}
    own = remote | reward.devices.to_dict()
    if unknown := set(reward.devices) - {*run, *names}:
        raise ValueError(
            f"config.reward.devices names {', '.join(sorted(unknown))}, which is no reward of this run"
        )
    return {name: resolve(own.get(name, reward.device)) for name in names}


def first_state(recipe: Recipe, pipe: Pipeline, key: jax.Array) -> TrainState:
    """The state before any step, on the mesh."""
    where = jax.tree.map(lambda a: a.sharding, abstract_state(recipe, pipe))
    if pipe.lora is None:
        trainable = jax.tree.map(lambda p: p.astype(jnp.float32), pipe.params)
    else:
        trainable = init_lora(pipe.model, pipe.lora, key)
        if file := recipe.config.pretrained.lora:
            found, trainable = load_lora(file, pipe.model)
            if (found.rank, found.alpha) != (pipe.lora.rank, pipe.lora.alpha):
                raise ValueError(
                    f"{file} has rank {found.rank} and alpha {found.alpha:g}, config.train has lora_rank "
                    f"{pipe.lora.rank} and lora_alpha {pipe.lora.alpha:g}; set those to the file's"
                )
    if pipe.lora is not None:  # the same on every host
        trainable = jax.tree.map(
            lambda a, sharding: put(np.asarray(a), sharding), trainable, where.trainable
        )

    def start(p):
        return TrainState(p, jax.tree.map(jnp.copy, p), recipe.optimizer.init(p), jnp.int32(0))

    return jax.jit(start, out_shardings=where)(trainable)
