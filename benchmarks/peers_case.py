"""The two sides of benchmarks/peers.py, and their inputs."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch_peer
from peers_sizes import REWARDS, SIZES
from torch_families import TORCH_FAMILIES

from realgen_jax.advantages import group_advantages
from realgen_jax.models.guidance import Guided
from realgen_jax.models.loading import load_model, size_of
from realgen_jax.models.model import Model
from realgen_jax.nn.lora import lora_tensors
from realgen_jax.rollout import draw_latents
from realgen_jax.sharding import make_mesh
from realgen_jax.training.programs import first_state, make_programs, make_recipe
from realgen_jax.update import Batch
from reward_bridge.bridge import RewardBridge
from reward_bridge.rewards import make_reward


@dataclass(frozen=True)
class Case:
    """The inputs of one family and size, and what both sides need to work on them."""

    config: Any
    model: Model
    programs: Any
    plan: Any
    state: Any
    cond: Any  # a row for each slot
    keys: tuple
    latents: np.ndarray
    noise: np.ndarray
    reward: Any
    bridge: RewardBridge

    @property
    def prompts(self) -> list[str]:
        return ["a photo of a cat"] * self.config.sample.train_batch_size

    def adapters(self, state: Any) -> dict[str, np.ndarray]:
        """The LoRA factors of a trained state, by diffusers' names."""
        return lora_tensors(state, self.model.family.table(self.model.config))


def make_case(family: str, size: str, folder: Path) -> Case:
    """Make the inputs of a family and size; `folder` is for its model."""
    config = SIZES[family][size](folder)
    recipe = make_recipe(config)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    model = load_model(config.pretrained, size_of(config.sample), mesh, recipe.trainable)
    layout = recipe.layout
    plan = recipe.objective.make_plan(model.sigmas(config.sample.num_steps))
    plan = plan.draw(jax.random.key(2))

    # LoRA's B starts at zero. Move it, so that the adapters have an effect.
    state = first_state(recipe, model, jax.random.key(0))
    moved = jax.tree.map(
        lambda p: p + 0.02 * jax.random.normal(jax.random.key(1), p.shape), state.trainable
    )

    # Noise and embeddings.
    keys = tuple(jax.random.split(jax.random.key(3)))
    latent_key, noise_key = keys
    latents = draw_latents(latent_key, layout.slots, layout.slots, model.token_shape)
    noise = recipe.objective.draw_noise(noise_key, plan, layout.images, model.token_shape)
    cond = random_cond(config, model, layout.slots)

    reward = make_reward(REWARDS[size], "cpu", {})
    return Case(
        config=config,
        model=model,
        programs=make_programs(recipe, model),
        plan=plan,
        state=replace(state, trainable=moved, ema=jax.tree.map(jnp.copy, moved)),
        cond=cond,
        keys=keys,
        latents=np.asarray(latents),
        noise=np.asarray(noise),
        reward=reward,
        bridge=RewardBridge({"reward": reward}, {"reward": "cpu"}, deadline=600, retries=0),
    )


def random_cond(config: Any, model: Model, slots: int) -> Any:
    """Conditioning with random embeddings and the guidance scale of the config."""
    scale = config.sample.guidance_scale
    shapes = model.abstract_cond(
        slots, config.prompts.max_tokens, jnp.float32, scale, config.train.cfg_gradient
    )
    rng = np.random.default_rng(0)

    # Embeddings are [n, ...]; the scale is [n].
    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.ndim == 1:
            return jnp.full(leaf.shape, scale, leaf.dtype)
        return jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map(fill, shapes)


class Ours:
    """The trainer's compiled programs on one case."""

    def __init__(self, case: Case):
        self.case = case
        self.state = jax.tree.map(jnp.copy, case.state)  # updates consume it

    def sampling(self) -> Any:
        case = self.case
        n = case.config.sample.train_batch_size
        cond = jax.tree.map(lambda a: jnp.repeat(a, n // len(a), axis=0), case.cond)
        ids = np.arange(n, dtype=np.int32)
        return case.programs.evaluate(case.model, self.state.trainable, cond, case.keys[0], ids)

    def rollout(self) -> Any:
        case = self.case
        return case.programs.sample(
            case.model, self.state.trainable, case.cond, case.keys, case.plan
        )

    def update(self, record: Any, advantages: np.ndarray) -> Any:
        return self._update(record, advantages, self.case.cond)

    def update_bound(self, record: Any, advantages: np.ndarray) -> Any:
        cond = replace(self.case.cond, gradient="bound")
        return self._update(record, advantages, cond)

    def _update(self, record: Any, advantages: np.ndarray, cond: Any) -> Any:
        batch = Batch(record, cond, jnp.asarray(advantages))
        batch = jax.tree.map(lambda a: a[None], batch)
        self.state, metrics = self.case.programs.update(self.case.model, self.state, batch)
        return metrics

    def iteration(self) -> Any:
        images, record, _ = self.rollout()
        scores = self.case.bridge.submit(images, self.case.prompts).result()
        return self.update(record, advantages_of(self.case, scores.rewards["reward"]))


class Theirs:
    """The PyTorch programs on the same case."""

    def __init__(self, case: Case, compiled: bool):
        self.case = case
        config = case.config
        self.adapters = case.adapters(case.state.trainable)
        self.model = torch_peer.load(
            TORCH_FAMILIES[case.model.family.pipeline],
            Path(config.pretrained.model),
            self.adapters,
            config.train.lora_rank,
            config.train.lora_alpha,
            case.model.height,
            compiled,
        )
        self.restart()

        # The same inputs.
        self.sigmas = torch.from_numpy(case.model.sigmas(config.sample.num_steps))
        self.cond = torch_cond(case.cond)
        self.latents = self.from_tokens(case.latents)
        self.noise = self.from_tokens(case.noise)
        self.start = int(case.plan.start)

        # The noise that our sampler draws.
        def draw(i):
            key = jax.random.fold_in(case.keys[0], i)
            return jax.random.normal(key, case.model.token_shape)

        images = np.arange(config.sample.train_batch_size, dtype=np.int32)
        self.sampling_latents = self.from_tokens(jax.vmap(draw)(images))

    def restart(self) -> None:
        """Go back to the case's adapters, with a new optimizer."""
        torch_peer.set_adapters(self.model, self.adapters)
        self.optimizer = torch_peer.make_optimizer(self.model, self.case.config.train)
        self.ema = [p.detach().clone() for p in torch_peer.trained(self.model)]

    def from_tokens(self, tokens: Any) -> torch.Tensor:
        """Our tokens in the form of diffusers' transformer."""
        return torch_peer.from_tokens(self.model, torch.from_numpy(np.array(tokens)))

    def sampling(self) -> torch.Tensor:
        x = self.sampling_latents
        cond = self.cond.repeat(len(x) // len(self.latents))
        return torch_peer.sample(self.model, x, self.sigmas, cond)

    def rollout(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return torch_peer.rollout(
            self.model,
            self.latents,
            self.noise,
            self.sigmas,
            self.cond,
            self.start,
            self.case.config.sample,
        )

    def update(self, record: dict, advantages: np.ndarray) -> dict[str, float]:
        return self._update(record, advantages, self.cond)

    def update_bound(self, record: dict, advantages: np.ndarray) -> dict[str, float]:
        return self._update(record, advantages, replace(self.cond, detached=True))

    def _update(
        self, record: dict, advantages: np.ndarray, cond: torch_peer.TorchCond
    ) -> dict[str, float]:
        return torch_peer.update(
            self.model,
            self.optimizer,
            self.ema,
            record,
            self.sigmas,
            cond,
            self.start,
            torch.from_numpy(advantages),
            self.case.config,
        )

    def iteration(self) -> dict[str, float]:
        images, record = self.rollout()
        scores = np.asarray(self.case.reward(images, self.case.prompts), np.float32)
        return self.update(record, advantages_of(self.case, scores))


def torch_cond(cond: Any) -> torch_peer.TorchCond:
    """Our conditioning for PyTorch. The rows of the negative prompt come before the prompts'."""
    if isinstance(cond, Guided):
        rows = jax.tree.map(lambda *halves: np.concatenate(halves), cond.negative, cond.prompt)
        scale = float(cond.scale[0])
    else:
        rows = cond
        scale = None
    leaves = tuple(torch.from_numpy(np.array(leaf)) for leaf in jax.tree.leaves(rows))
    return torch_peer.TorchCond(leaves, scale)


def advantages_of(case: Case, scores: np.ndarray) -> np.ndarray:
    """Advantages of scores [images], float [images]."""
    groups = {"reward": scores.reshape(-1, case.config.sample.num_image_per_prompt)}
    return group_advantages(
        groups, {"reward": 1.0}, global_std=case.config.sample.global_std
    ).ravel()
