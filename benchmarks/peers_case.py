"""The two sides of benchmarks/peers.py, and their inputs."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch_peer

from realgen_configs import flux_grpo
from realgen_jax.advantages import group_advantages
from realgen_jax.models.flux.transformer import Cond
from realgen_jax.models.loading import load_model
from realgen_jax.models.model import Model
from realgen_jax.nn.lora import lora_tensors
from realgen_jax.rollout import draw_latents
from realgen_jax.sharding import make_mesh
from realgen_jax.training.programs import first_state, make_programs, make_recipe
from realgen_jax.update import Batch
from reward_bridge.bridge import RewardBridge
from reward_bridge.rewards import make_reward

REWARDS = {"tiny": "embedded_detector", "mid": "jpeg_compressibility"}


def tiny(_: Path) -> Any:
    """The demo's rollout call.

    2.4 M parameters, 64 pictures of 16 + 16 tokens, 10 steps, a window of 3.
    """
    return flux_grpo.tiny()


def mid(folder: Path) -> Any:
    """A call of one prompt and 3 branches, as RealGen's.

    61 M random parameters, 256 + 64 tokens, 4 steps, a window of 2.
    """
    # Write the model.
    torch.manual_seed(0)
    torch_peer.diffusers.FluxTransformer2DModel(
        in_channels=64,
        num_layers=3,
        num_single_layers=8,
        attention_head_dim=64,
        num_attention_heads=8,
        joint_attention_dim=256,
        pooled_projection_dim=128,
        guidance_embeds=True,
        axes_dims_rope=(8, 28, 28),
    ).save_pretrained(folder / "transformer")
    torch_peer.diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    ).save_pretrained(folder / "vae")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')

    config = flux_grpo.tiny()
    config.pretrained.model = str(folder)
    config.prompts.max_tokens = 64
    config.sample.update(
        resolution=256,
        num_steps=4,
        eval_num_steps=4,
        train_batch_size=3,
        num_image_per_prompt=3,
        branches=3,
        num_batches_per_epoch=1,
        sde_window_size=2,
        sde_window_range=(0, 4),
        test_batch_size=3,
    )
    return config


SIZES = {"tiny": tiny, "mid": mid}


@dataclass(frozen=True)
class Case:
    """The inputs of one size, and what both sides need to work on them."""

    config: Any
    model: Model
    programs: Any
    plan: Any
    state: Any
    cond: Cond  # a row for each slot
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


def make_case(name: str, folder: Path) -> Case:
    """Make the inputs of one size; `folder` is for its model."""
    config = SIZES[name](folder)
    recipe = make_recipe(config)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    model = load_model(config.pretrained, config.sample.resolution, mesh, recipe.trainable)
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
    rng = np.random.default_rng(0)
    t5_shape = (layout.slots, config.prompts.max_tokens, model.config.joint_attention_dim)
    clip_shape = (layout.slots, model.config.pooled_projection_dim)
    cond = Cond(
        jnp.float32(rng.standard_normal(t5_shape)),
        jnp.float32(rng.standard_normal(clip_shape)),
        jnp.full(layout.slots, config.sample.guidance_scale),
    )

    reward = make_reward(REWARDS[name], "cpu", {})
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
        batch = Batch(record, self.case.cond, jnp.asarray(advantages))
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
        self.model = torch_peer.load(
            Path(config.pretrained.model),
            case.adapters(case.state.trainable),
            config.train.lora_rank,
            config.train.lora_alpha,
            case.model.height,
            compiled,
        )
        self.optimizer = torch_peer.make_optimizer(self.model, config.train)
        self.ema = [p.detach().clone() for p in torch_peer.trained(self.model)]

        # The same inputs.
        self.sigmas = torch.from_numpy(case.model.sigmas(config.sample.num_steps))
        cond = (case.cond.t5, case.cond.clip, case.cond.guidance)
        self.cond = tuple(torch.from_numpy(np.array(a)) for a in cond)
        self.latents = torch.from_numpy(case.latents.copy())
        self.noise = torch.from_numpy(case.noise.copy())
        self.start = int(case.plan.start)

        # The noise that our sampler draws.
        def draw(i):
            key = jax.random.fold_in(case.keys[0], i)
            return jax.random.normal(key, case.model.token_shape)

        images = np.arange(config.sample.train_batch_size, dtype=np.int32)
        self.sampling_latents = torch.from_numpy(np.array(jax.vmap(draw)(images)))

    def sampling(self) -> torch.Tensor:
        x = self.sampling_latents
        cond = tuple(a.repeat_interleave(len(x) // len(a), dim=0) for a in self.cond)
        return torch_peer.sample(self.model, x, self.sigmas, cond)

    def rollout(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        sample = self.case.config.sample
        return torch_peer.rollout(
            self.model,
            self.latents,
            self.noise,
            self.sigmas,
            self.cond,
            self.start,
            sample.branches,
            sample.noise_level,
        )

    def update(self, record: dict, advantages: np.ndarray) -> dict[str, float]:
        return torch_peer.update(
            self.model,
            self.optimizer,
            self.ema,
            record,
            self.sigmas,
            self.cond,
            self.start,
            self.case.config.sample.noise_level,
            torch.from_numpy(advantages),
            self.case.config.train,
        )

    def iteration(self) -> dict[str, float]:
        images, record = self.rollout()
        scores = np.asarray(self.case.reward(images, self.case.prompts), np.float32)
        return self.update(record, advantages_of(self.case, scores))


def advantages_of(case: Case, scores: np.ndarray) -> np.ndarray:
    """Advantages of scores [images], float [images]."""
    groups = {"reward": scores.reshape(-1, case.config.sample.num_image_per_prompt)}
    return group_advantages(groups, {"reward": 1.0}, global_std=False).ravel()
