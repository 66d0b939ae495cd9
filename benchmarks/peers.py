"""Ours against PyTorch, side by side on a CPU: the same weights, the same work, the same two threads.

    python benchmarks/peers.py                     both sizes, about a quarter of an hour on 2 cores
    python benchmarks/peers.py --sizes tiny        the embedded model alone, 5 minutes

Prints a table and writes benchmarks/results/peers_<machine>.json. PyTorch is diffusers and peft used as RealGen's code
uses them (torch_peer.py), eager and under torch.compile where that runs; ours are the very programs of
scripts/train.py. Everything is float32.

sampling   ODE sampling of one batch, decoded to uint8 pictures
rollout    one rollout call with its SDE window, means and log-probs, decoded
update     one optimizer step on that call: LoRA, GRPO-Guard with the KL to the base model, AdamW, EMA
iteration  rollout, reward, advantages, update

First the results are compared, then timed in turns (ours, eager, compiled, ours, ...), medians of 15: with 7, a slow
minute of the machine moves a ratio by a tenth. The update drifts as it learns, which costs neither side anything.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch_peer  # noqa: E402
from measure import alternate, print_table, save  # noqa: E402

from configs.flux_grpo import get_config  # noqa: E402
from realgen_jax.models.flux.family import load_pipeline  # noqa: E402
from realgen_jax.models.flux.transformer import Cond  # noqa: E402
from realgen_jax.nn.lora import lora_tensors  # noqa: E402
from realgen_jax.objectives.grpo import Batch, group_advantages  # noqa: E402
from realgen_jax.rollout import draw_noise  # noqa: E402
from realgen_jax.sharding import make_mesh  # noqa: E402
from realgen_jax.training.programs import make_programs, make_recipe  # noqa: E402
from realgen_jax.training.run import first_state  # noqa: E402
from reward_bridge.bridge import RewardBridge  # noqa: E402
from reward_bridge.rewards import make_reward  # noqa: E402

THREADS = 2
GOALS = {
    "sampling": (2.0, 1.7),
    "rollout": (2.0, 1.7),
    "update": (1.5, 1.5),
    "iteration": (1.6, 1.6),
}
REWARDS = {"tiny": "embedded_detector", "mid": "jpeg_compressibility"}
PEERS = ("eager", "compiled")


def tiny(_: Path) -> Any:
    """The demo's rollout call: 2.4 M parameters, 64 pictures of 16 + 16 tokens, 10 steps, a window of 3."""
    return get_config()


def mid(folder: Path) -> Any:
    """RealGen's call of one prompt and 3 branches: 61 M random parameters, 256 + 64 tokens, 4 steps, a window of 2."""
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
    (folder / "model_index.json").write_text("{}")
    config = get_config().unlock()
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
    """One size's inputs, ours and as torch tensors, and what either side needs to work on them."""

    config: Any
    pipe: Any
    programs: Any
    plan: Any
    state: Any
    cond: Cond  # a row a slot
    keys: tuple
    latents: np.ndarray
    noise: np.ndarray
    reward: Any
    bridge: RewardBridge

    @property
    def prompts(self) -> list[str]:
        return ["a photo of a cat"] * self.config.sample.train_batch_size


def make_case(name: str, folder: Path) -> Case:
    config = SIZES[name](folder)
    recipe = make_recipe(config)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    pipe = load_pipeline(config.pretrained, config.sample.resolution, recipe.lora, mesh)
    layout, plan = recipe.layout, recipe.plan(pipe).draw(jax.random.key(2))
    state = first_state(recipe, pipe, jax.random.key(0))
    # B starts at zero: move it, so that the adapters count in what is compared
    moved = jax.tree.map(
        lambda p: p + 0.02 * jax.random.normal(jax.random.key(1), p.shape), state.trainable
    )
    keys = tuple(jax.random.split(jax.random.key(3)))
    latents, noise = draw_noise(*keys, plan, layout.slots, layout.slots, pipe.token_shape)
    rng = np.random.default_rng(0)
    m = pipe.model
    cond = Cond(
        jnp.float32(
            rng.standard_normal((layout.slots, config.prompts.max_tokens, m.joint_attention_dim))
        ),
        jnp.float32(rng.standard_normal((layout.slots, m.pooled_projection_dim))),
        jnp.full(layout.slots, config.sample.guidance_scale),
    )
    reward = make_reward(REWARDS[name], "cpu", {})
    return Case(
        config=config,
        pipe=pipe,
        programs=make_programs(recipe, pipe),
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
        self.case, self.state = case, jax.tree.map(jnp.copy, case.state)  # which updates consume

    def sampling(self) -> Any:
        n = self.case.config.sample.train_batch_size
        cond = jax.tree.map(lambda a: jnp.repeat(a, n // len(a), axis=0), self.case.cond)
        return self.case.programs.evaluate(
            self.state.trainable, cond, self.case.keys[0], np.arange(n, dtype=np.int32)
        )

    def rollout(self) -> Any:
        case = self.case
        return case.programs.sample(
            case.pipe.params,
            case.pipe.vae_params,
            self.state.trainable,
            case.cond,
            case.keys,
            case.plan,
        )

    def update(self, record: Any, advantages: np.ndarray) -> Any:
        batch = jax.tree.map(
            lambda a: a[None], Batch(record, self.case.cond, jnp.asarray(advantages))
        )
        self.state, metrics = self.case.programs.update(self.case.pipe.params, self.state, batch)
        return metrics

    def iteration(self) -> Any:
        images, record, _ = self.rollout()
        scores = self.case.bridge.submit(images, self.case.prompts).result().rewards["reward"]
        return self.update(record, advantages_of(self.case, scores))


class Theirs:
    """torch_peer on the same case."""

    def __init__(self, case: Case, compiled: bool):
        self.case, config = case, case.config
        adapters, t = lora_tensors(case.state.trainable), config.train
        self.model = torch_peer.load(
            Path(config.pretrained.model),
            adapters,
            t.lora_rank,
            t.lora_alpha,
            case.pipe.height,
            compiled,
        )
        self.sigmas = torch.from_numpy(case.pipe.sigmas(config.sample.num_steps))
        self.optimizer = torch_peer.make_optimizer(self.model, t)
        self.ema = [p.detach().clone() for p in torch_peer.trained(self.model)]
        self.cond = tuple(
            torch.from_numpy(np.array(a))
            for a in (case.cond.t5, case.cond.clip, case.cond.guidance)
        )
        self.latents, self.noise = (
            torch.from_numpy(case.latents.copy()),
            torch.from_numpy(case.noise.copy()),
        )
        self.start = int(case.plan.start)
        draw = jax.vmap(
            lambda i: jax.random.normal(jax.random.fold_in(case.keys[0], i), case.pipe.token_shape)
        )
        images = np.arange(config.sample.train_batch_size, dtype=np.int32)
        self.sampling_latents = torch.from_numpy(np.array(draw(images)))  # those of our sampler

    def sampling(self) -> torch.Tensor:
        x = self.sampling_latents
        cond = tuple(a.repeat_interleave(len(x) // len(a), dim=0) for a in self.cond)
        return torch_peer.sample(self.model, x, self.sigmas, cond)

    def rollout(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        s = self.case.config.sample
        return torch_peer.rollout(
            self.model,
            self.latents,
            self.noise,
            self.sigmas,
            self.cond,
            self.start,
            s.branches,
            s.noise_level,
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
    groups = {"reward": scores.reshape(-1, case.config.sample.num_image_per_prompt)}
    return group_advantages(groups, {"reward": 1.0}, global_std=False).ravel()


def compare(ours: Ours, theirs: Theirs, advantages: np.ndarray) -> dict[str, float]:
    """Largest differences of what both sides compute, each part on the same inputs; raises where they are too large."""
    (images, record, _), (their_images, their_record) = ours.rollout(), theirs.rollout()
    pixels = lambda a, b: float(np.abs(np.asarray(a).astype(int) - b.numpy().astype(int)).max())  # noqa: E731
    found = {
        "sampling_levels": pixels(ours.sampling(), theirs.sampling()),
        "rollout_levels": pixels(images, their_images),
        "mean": float(np.abs(record.mean - their_record["mean"].numpy()).max()),
        "logp": float(np.abs(record.logp - their_record["logp"].numpy()).max()),
    }
    trajectory = {
        "x": record.latents[:-1],
        "x_next": record.latents[1:],
        "mean": record.mean,
        "logp": record.logp,
    }
    same = {name: torch.from_numpy(np.array(a)) for name, a in trajectory.items()}
    metrics, their_metrics = ours.update(record, advantages), theirs.update(same, advantages)
    for (
        name,
        value,
    ) in their_metrics.items():  # the policy's loss itself cancels to nearly nothing at ratio 1
        found[name] = abs(float(metrics[name]) - value) / (1.0 if name == "policy_loss" else value)
    adapters = [
        torch_peer.peft.get_peft_model_state_dict(theirs.model.transformer),
        lora_tensors(ours.state.trainable),
    ]
    found["adapters"] = max(
        float(
            np.abs(
                a.numpy()
                - adapters[1][name.removeprefix("base_model.model.").removesuffix(".weight")]
            ).max()
        )
        for name, a in adapters[0].items()
    )
    limits = {
        "sampling_levels": 2,
        "rollout_levels": 2,
        "mean": 1e-3,
        "logp": 1e-3,
        "adapters": 1e-3,
    }
    if wrong := [name for name, value in found.items() if not value <= limits.get(name, 1e-2)]:
        raise ValueError(
            f"both sides should agree, but differ in {', '.join(wrong)}: {json.dumps(found)}"
        )
    return found


def measure_size(name: str, repeats: int, peers: tuple[str, ...]) -> dict[str, Any]:
    torch._dynamo.reset()  # its limit of recompilations counts for both sizes together,
    torch._dynamo.config.fail_on_recompile_limit_hit = (
        True  # and beyond it torch.compile would go on uncompiled
    )
    with tempfile.TemporaryDirectory() as folder:
        case = make_case(name, Path(folder))
        advantages = advantages_of(
            case, np.random.default_rng(1).standard_normal(case.config.sample.train_batch_size)
        )
        sides: dict[str, Any] = {"ours": Ours(case)}
        differences, failed = {}, {}
        for peer in peers:
            try:
                theirs = Theirs(case, peer == "compiled")
                differences[peer] = compare(Ours(case), theirs, advantages)
                sides[peer] = theirs
            except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
                failed[peer] = str(error).splitlines()[0]
        seconds = {}
        for part in GOALS:
            calls: dict[str, Callable] = {side: getattr(it, part) for side, it in sides.items()}
            if part == "update":
                records = {side: it.rollout()[1] for side, it in sides.items()}
                calls = {
                    side: lambda call=call, record=records[side]: call(record, advantages)
                    for side, call in calls.items()
                }
            seconds[part] = alternate(calls, repeats)
            medians = {
                side: round(1000 * statistics.median(taken))
                for side, taken in seconds[part].items()
            }
            print(f"  {name} {part}: {medians} ms", flush=True)
        case.bridge.close()
    return {"differences": differences, "failed": failed, "seconds": seconds}


def table_rows(name: str, found: dict[str, Any]) -> list[list[str]]:
    table = []
    for part, goals in GOALS.items():
        medians = {side: statistics.median(taken) for side, taken in found["seconds"][part].items()}
        ours = medians["ours"]
        cells = [
            name,
            part,
            *(f"{1000 * medians[s]:.0f}" if s in medians else "-" for s in ("ours", *PEERS)),
        ]
        cells += [f"{medians[peer] / ours:.2f}" if peer in medians else "-" for peer in PEERS]
        cells.append(f"{goals[name == 'mid']:.1f}")
        table.append(cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="tiny,mid", help="which of tiny and mid, by comma")
    parser.add_argument(
        "--peers", default="eager,compiled", help="which of eager and compiled, by comma"
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--no_save", action="store_true", help="print only")
    args = parser.parse_args()
    for name, known in (("sizes", tuple(SIZES)), ("peers", PEERS)):
        setattr(args, name, tuple(filter(None, getattr(args, name).split(","))))
        if unknown := set(getattr(args, name)) - set(known):
            parser.error(
                f"--{name} names {', '.join(sorted(unknown))}; expected some of {', '.join(known)}"
            )
    if hasattr(
        os, "sched_setaffinity"
    ):  # XLA takes as many threads as it finds cores, when it first computes
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    torch.set_num_threads(THREADS)
    found = {}
    for name in args.sizes:
        found[name] = measure_size(name, args.repeats, args.peers)
    header = [
        "size",
        "part",
        "ours ms",
        "eager ms",
        "compiled ms",
        "x eager",
        "x compiled",
        "goal (eager)",
    ]
    print_table(header, [row for name, one in found.items() for row in table_rows(name, one)])
    if not args.no_save:
        print(f"written to {save('peers', found)}")


if __name__ == "__main__":
    main()
