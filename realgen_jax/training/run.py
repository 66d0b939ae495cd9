"""Everything a run needs before its first epoch: checks, model, rewards, the compiled calls' functions, first state."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from realgen_jax.checkpoint import Checkpoints, newest_good, read_meta
from realgen_jax.data import read_prompts
from realgen_jax.hosts import coordinator_host, process_count, process_index, put, tell
from realgen_jax.models.flux.family import Pipeline, load_pipeline, no_model
from realgen_jax.models.flux.transformer import Cond
from realgen_jax.nn.lora import init_lora, load_lora
from realgen_jax.objectives.grpo import TrainState
from realgen_jax.realbench.prompts import read_sets
from realgen_jax.rollout import Plan
from realgen_jax.sharding import batch_devices, make_mesh
from realgen_jax.text_cache import TextCache, ensure_encoded
from realgen_jax.training.log import changed_keys
from realgen_jax.training.programs import Recipe, abstract_state, check_mesh, make_recipe
from reward_bridge.adversary import Adversary, join
from reward_bridge.bridge import RewardBridge
from reward_bridge.setup import open_rewards, reward_problems

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


def set_up(config: ConfigDict, folder: Path) -> tuple[Run, TrainState]:
    """Load everything, compile nothing. Returns the run and its first state."""
    sample = config.sample
    check(config)
    recipe = make_recipe(config)  # told before gigabytes are loaded
    prompts, test_prompts = read_prompts(config.prompts.train), read_prompts(config.prompts.test)
    # text encoders and rewards come before JAX, which takes what it finds of the memory of its devices
    sets = read_sets(config.evaluate.prompts) if reports(config) else []
    texts = [*prompts, *test_prompts, *(prompt for one in sets for prompt in one.prompts)]
    cache = ensure_encoded(texts, config.pretrained.model, config.prompts)
    meet = None
    if process_count() > 1:
        meet = partial(join, tell, coordinator_host(), process_index(), process_count())
    rewards = open_rewards(
        config.reward,
        prompts=prompts,
        hide_from_jax=partial(jax.config.update, "jax_cuda_visible_devices"),
        jax_platforms=jax.config.jax_platforms,
        meet=meet,
    )
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
        bridge=rewards.bridge,
        adversaries=rewards.learning,
        metrics=rewards.metrics,
        checkpoints=Checkpoints(folder / "checkpoints", config.num_checkpoint_limit),
    )
    return run, state


def keep_compiled(folder: str) -> None:
    """Take compiled programs from this folder, and add to it; empty: compile anew."""
    if folder:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def resume_from(folder: Path, config: ConfigDict, allow_change: bool) -> int | None:
    """The epoch of the checkpoint to go on from, None where the run ended before its first one; says what is new.

    Raises ValueError with the keys in which the run computed something else so far, unless `allow_change`.
    """
    epoch, found = newest_good(folder / "checkpoints")
    for line in found:
        print(f"warning: {line}")
    if epoch is None:
        before = json.loads((folder / "config.json").read_text())
    else:
        before = read_meta(folder / "checkpoints", epoch)["config"]
    free, others = changed_keys(before, config.to_dict())
    if others and not allow_change:
        raise ValueError(
            "\n".join(
                [
                    f"{folder} computed with another config so far; --allow_config_change goes on all the same:",
                    *others,
                ]
            )
        )
    start = "its beginning: there is no checkpoint yet" if epoch is None else f"epoch {epoch}"
    print(
        "\n".join(
            [
                f"resumed from {start}" + (", with another config:" if free or others else ""),
                *free,
                *others,
            ]
        )
    )
    return epoch


def check(config: ConfigDict) -> None:
    """Name everything that is missing at once, before anything is loaded."""
    model, missing = Path(config.pretrained.model), []
    if not (model / "model_index.json").exists():
        missing.append(no_model(model))
    for name in ("train", "test"):
        if not Path(config.prompts[name]).is_file():
            missing.append(
                f"config.prompts.{name} is {config.prompts[name]!r}, which does not exist; expected one prompt a line "
                "(.txt) or .jsonl. RealGen's own files come with its repository, under dataset/realgen"
            )
    missing += reward_problems(config.reward, config.evaluate.scores if reports(config) else ())
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


def reports(config: ConfigDict) -> bool:
    """Whether this run ends with RealBench's report."""
    return config.evaluate.after_training and process_count() == 1


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
