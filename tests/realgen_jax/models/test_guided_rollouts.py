"""Guided rollouts of SD3 and Z-Image: the recorded numbers, and replay to the bit."""

import re
from dataclasses import dataclass, replace
from functools import cache, partial
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx

from realgen_jax.models.guidance import GRADIENTS, Guided
from realgen_jax.models.loading import load_model
from realgen_jax.models.model import Model
from realgen_jax.models.sd3 import transformer as sd3
from realgen_jax.models.sd3.family import SD3
from realgen_jax.models.trainable import AllWeights
from realgen_jax.models.zimage import transformer as zimage
from realgen_jax.models.zimage.family import Z_IMAGE
from realgen_jax.nn.convert import abstract, to_torch
from realgen_jax.nn.lora import LoraConfig
from realgen_jax.nn.tokens import pack, unpack
from realgen_jax.nn.vae import Autoencoder, VaeConfig
from realgen_jax.rollout import make_plan, rollout, sample
from realgen_jax.sde import log_prob, ode_steps
from realgen_jax.sharding import batch_sharding, make_mesh, param_sharding
from realgen_jax.update import Batch, EmaConfig, TrainState, make_optimizer, update
from tests.helpers.compiling import QUICK
from tests.helpers.goldens import GOLDENS, golden
from tests.helpers.models import fresh_adapters, one_device, pretrained
from tests.helpers.objectives import grpo

slow = pytest.mark.slow
FOLDERS = {"sd3": "12_sd3", "zimage": "13_zimage"}
FAMILIES = {"sd3": SD3, "zimage": Z_IMAGE}
SIDE = 4  # tokens on a side of the golden pictures


@cache
def golden_pipeline(name):
    """The family's golden pipeline, all weights trainable."""
    folder = GOLDENS / FOLDERS[name] / "pipeline"
    return load_model(pretrained(folder), 64, one_device())


def tokens(latents):
    """[..., c, h, w] -> our tokens [..., s, 4c]."""
    lead = latents.shape[:-3]
    images = rearrange(latents.reshape(-1, *latents.shape[-3:]), "n c h w -> n h w c")
    packed = pack(images)
    return packed.reshape(*lead, *packed.shape[1:])


def cond_of(name, case, scale, gradient):
    """The recorded prompts and negative prompt as a guided conditioning."""
    n = len(case["cap_feats"] if name == "zimage" else case["prompt_embeds"])
    if name == "sd3":
        repeated = [
            np.repeat(case[f"negative_{key}"], n, axis=0)
            for key in ("prompt_embeds", "pooled_prompt_embeds")
        ]
        prompt = sd3.Cond(case["prompt_embeds"], case["pooled_prompt_embeds"])
        negative = sd3.Cond(*repeated)
    else:
        # A static length: a multiple of 32 that holds every caption.
        length = -(-case["cap_feats"].shape[1] // 32) * 32

        def padded(captions):
            width = length - captions.shape[1]
            return np.pad(captions, ((0, 0), (0, width), (0, 0)))

        prompt = zimage.Cond(padded(case["cap_feats"]), case["cap_lens"].astype(np.int32))
        empty = case["negative_cap_feats"][None]
        negative = zimage.Cond(
            np.repeat(padded(empty), n, axis=0), np.full(n, empty.shape[1], np.int32)
        )
    offset = FAMILIES[name].guidance_offset
    return Guided(prompt, negative, np.full(n, scale + offset, np.float32), gradient)


def decoded(model, x):
    """Pictures in [0, 1], [n, 3, h, w]."""
    vae = nnx.merge(abstract(Autoencoder, model.vae)[0], model.vae_params)
    images = np.asarray(vae.decode(unpack(x, SIDE, SIDE)))
    return np.clip(images / 2 + 0.5, 0, 1).transpose(0, 3, 1, 2)


# Each family's recorded guidance scale, and tolerances of latents after sampling.
SCALES = {"sd3": 4.5, "zimage": 4.0}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_whole_pipeline_samples_as_diffusers_does(name):
    case = golden(f"{FOLDERS[name]}/ode.npz")
    model = golden_pipeline(name)
    cond = cond_of(name, case, SCALES[name], "both")
    steps = len(case["timesteps"])
    np.testing.assert_allclose(model.sigmas(steps), case["sigmas"], atol=1e-6)

    run = jax.jit(partial(sample, partial(model.velocity, None)))
    x = run(cond, tokens(case["init_latents"]), ode_steps(model.sigmas(steps)))
    np.testing.assert_allclose(x, tokens(case["final_latents"]), rtol=1e-4, atol=4e-4)
    np.testing.assert_allclose(decoded(model, x), case["image"], atol=2e-4)


ROLLOUTS = {
    ("sd3", "sde"): {"noise_level": 0.9, "start": 2, "window": 3, "branches": 3},
    ("sd3", "cps"): {"noise_level": 0.8, "start": 0, "window": 2, "branches": 1},
    ("zimage", "sde"): {"noise_level": 0.9, "start": 1, "window": 3, "branches": 1},
    ("zimage", "cps"): {"noise_level": 0.7, "start": 0, "window": 2, "branches": 1},
}


def recorded_plan(case, kind, noise_level, start, window, branches):
    """The plan on the recorded noise levels; a second 0 at the end is no step."""
    sigmas = case["sigmas"]
    if sigmas[-2] == 0:
        sigmas = sigmas[:-1]
    return make_plan(
        sigmas,
        kind=kind,
        noise_level=noise_level,
        window=window,
        bounds=(start, start + window),
        branches=branches,
    )


@pytest.mark.parametrize(("name", "kind"), ROLLOUTS)
def test_guided_rollouts_are_the_recorded_ones(name, kind):
    case = golden(f"{FOLDERS[name]}/rollout_{kind}.npz")
    model = golden_pipeline(name)
    plan = recorded_plan(case, kind, **ROLLOUTS[name, kind])
    cond = cond_of(name, case, SCALES[name], "both")
    noise = tokens(case["window_noise"])
    run = jax.jit(partial(rollout, partial(model.velocity, None)))
    x, record = run(cond, tokens(case["init_latents"]), noise, plan)

    def close(ours, recorded):
        np.testing.assert_allclose(ours, recorded, rtol=1e-4, atol=2e-4)

    close(record.latents.swapaxes(0, 1), tokens(case["latents"]))
    close(record.mean.swapaxes(0, 1), tokens(case["prev_sample_mean"]))
    close(x, tokens(case["final_latents"]))
    logp = record.logp.T
    if kind == "cps":  # recorded without the variance
        logp = -np.mean((record.latents[1:] - record.mean) ** 2, axis=(2, 3)).T
    close(logp, case["log_probs"])


@pytest.mark.parametrize(
    ("name", "kind", "gradient"),
    [
        ("sd3", "sde", "bound"),
        ("sd3", "cps", "both"),
        ("zimage", "sde", "both"),
        pytest.param("sd3", "sde", "both", marks=slow),
        pytest.param("sd3", "cps", "bound", marks=slow),
        pytest.param("zimage", "cps", "both", marks=slow),
    ],
)
def test_gradients_of_the_replay_are_the_recorded_ones(name, kind, gradient):
    case = golden(f"{FOLDERS[name]}/rollout_{kind}.npz")
    model = golden_pipeline(name)
    plan = recorded_plan(case, kind, **ROLLOUTS[name, kind])
    cond = cond_of(name, case, SCALES[name], gradient)
    cond = jax.tree.map(lambda leaf: np.repeat(leaf, plan.branches, axis=0), cond)
    latents = tokens(case["latents"]).swapaxes(0, 1)

    def score(trainable):
        total = 0.0
        for number in range(plan.window):
            step = jax.tree.map(itemgetter(plan.start + number), plan.noisy)
            x = latents[number]
            sigma = jnp.full(len(x), step.sigma)
            mean = step.mean(x, model.velocity(trainable, x, sigma, cond))
            logp = log_prob(latents[number + 1], mean, step.std)
            if kind == "cps":  # recorded without the variance
                logp = -jnp.mean((latents[number + 1] - mean) ** 2, axis=(1, 2))
            total += jnp.sum(case["cotangent"] * logp) / plan.window
        return total

    trainable = model.trainable.init(model, jax.random.key(0))
    grads = jax.jit(jax.grad(score), compiler_options=QUICK)(trainable)
    ours = dict(to_torch(grads, model.family.table(model.config)))
    label = "replay/grad/" if gradient == "both" else "replay/grad_detached/"
    recorded = {key: case[key] for key in case if key.startswith(label)}
    assert recorded
    for key, expected in recorded.items():
        got = ours[key.removeprefix(label)]
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


# -- Replay to the bit, on random weights


@dataclass(frozen=True)
class Size:
    """A transformer and its inputs: side of the pictures and text tokens."""

    config: Any
    side: int
    text: int


# With fewer than 64 channels and 8 rows, XLA's CPU compiler makes another kind of loop of a product
# in each of the two programs, and the last bit differs.
SIZES = {
    ("sd3", "tiny"): Size(
        sd3.SD3Config(
            num_layers=4,
            dual_attention_layers=(0, 1),
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=48,
            caption_projection_dim=64,
            pooled_projection_dim=40,
            pos_embed_max_size=8,
            image_size=(4, 4),
        ),
        side=4,
        text=21,
    ),
    ("sd3", "mid"): Size(
        sd3.SD3Config(
            num_layers=5,
            dual_attention_layers=(0, 1),
            attention_head_dim=64,
            num_attention_heads=8,
            joint_attention_dim=128,
            caption_projection_dim=512,
            pooled_projection_dim=64,
            pos_embed_max_size=24,
            image_size=(16, 16),
        ),
        side=16,
        text=45,
    ),
    ("zimage", "tiny"): Size(
        zimage.ZImageConfig(
            dim=96, n_layers=2, n_refiner_layers=1, n_heads=4, n_kv_heads=4, cap_feat_dim=24,
            axes_dims=(8, 8, 8),
        ),
        side=4,
        text=64,
    ),
    ("zimage", "mid"): Size(
        zimage.ZImageConfig(
            dim=384, n_layers=4, n_refiner_layers=1, n_heads=6, n_kv_heads=6, cap_feat_dim=96,
            axes_dims=(16, 24, 24),
        ),
        side=16,
        text=64,
    ),
}  # fmt: skip


def random_model(name, size, dtype, mesh):
    """A model with random weights and adapters that are not zero."""
    chosen = SIZES[name, size]
    family = FAMILIES[name]
    config = replace(chosen.config, dtype=dtype, param_dtype=dtype)
    params = nnx.state(family.Module(config, nnx.Rngs(0)))
    sharding = param_sharding(mesh, family.rules)
    placed = []
    for path, variable in nnx.to_flat_state(params):
        where = sharding(".".join(map(str, path)), variable.shape)
        placed.append((path, variable.replace(jax.device_put(variable.get_value(), where))))
    base = Model(
        params=nnx.from_flat_state(placed),
        vae_params=None,
        family=family,
        config=config,
        vae=VaeConfig(),
        schedule=family.Schedule(),
        trainable=AllWeights(),
        height=chosen.side,
        width=chosen.side,
        mesh=mesh,
    )
    model, adapters = fresh_adapters(base, LoraConfig(rank=4, alpha=8.0), jax.random.key(1))

    def moved(a):
        return a + 0.02 * jax.random.normal(jax.random.key(a.size), a.shape)

    return model, jax.jit(lambda tree: jax.tree.map(moved, tree))(adapters)


def random_cond(name, model, size, slots, gradient):
    """Random embeddings; the negative prompt's are the same in every row."""
    text = SIZES[name, size].text
    max_tokens = text - 77 if name == "sd3" else text
    shapes = model.family.cond_shapes(model.config, slots, max_tokens, model.config.dtype)
    if name == "sd3":
        width = model.config.joint_attention_dim
        shapes = replace(shapes, text=jax.ShapeDtypeStruct((slots, text, width), shapes.text.dtype))
    rng = np.random.default_rng(0)

    def draw(leaf, rows):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return np.broadcast_to(rng.integers(5, text, (rows, *leaf.shape[1:])), leaf.shape)
        values = rng.normal(size=(rows, *leaf.shape[1:]))
        return np.broadcast_to(values, leaf.shape)

    def tree(rows):
        return jax.tree.map(lambda leaf: jnp.asarray(draw(leaf, rows), leaf.dtype), shapes)

    return Guided(tree(slots), tree(1), jnp.full(slots, 4.5), gradient)


F32, BF16 = jnp.float32, jnp.bfloat16
ONE, MESH = (1, 1, 1), (2, 2, 2)


def marks(name, size, dtype, layout, gradient):
    """All of these are slow, and one is known to fail."""
    if (name, size, dtype, layout, gradient) != ("sd3", "mid", BF16, ONE, "both"):
        return slow
    reason = "with 16 rows on one CPU device, the means differ by up to 3e-3; the cause is open"
    return (slow, pytest.mark.xfail(strict=True, reason=reason))


@pytest.mark.parametrize(
    ("name", "size", "dtype", "gradient", "layout"),
    [
        ("sd3", "tiny", BF16, "both", ONE),
        *(
            pytest.param(
                name,
                size,
                dtype,
                gradient,
                layout,
                marks=marks(name, size, dtype, layout, gradient),
            )
            for name in FAMILIES
            for size in ("tiny", "mid")
            for dtype in (F32, BF16)
            for gradient in GRADIENTS
            for layout in (ONE, MESH)
        ),
    ],
)
def test_replay_is_the_guided_rollout_bit_for_bit(name, size, dtype, gradient, layout):
    """On unchanged weights the update sees exactly the means that were sampled."""
    mesh = make_mesh(*layout, jax.devices())
    run = Replay(name, size, dtype, gradient, mesh)
    replayed = run.recompute(run.adapters, run.batch)
    np.testing.assert_array_equal(replayed.record.mean, run.batch.record.mean)

    # The check can fail.
    changed = run.recompute(jax.tree.map(lambda a: a * 1.01, run.adapters), run.batch)
    assert np.abs(changed.record.mean - run.batch.record.mean).max() > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_an_update_sees_a_ratio_of_exactly_one(name, gradient):
    """And a KL to the base model, which is guided too, without the adapters."""
    _, metrics = Replay(name, "tiny", BF16, gradient, make_mesh(*ONE, jax.devices())).update()
    assert metrics["ratio_deviation"] == 0.0
    assert metrics["kl_loss"] > 0


class Replay:
    """One call of 8 images that was sampled on a mesh, and the programs that replay it."""

    def __init__(self, name, size, dtype, gradient, mesh):
        self.model, self.adapters = random_model(name, size, dtype, mesh)
        rows = batch_sharding(mesh)
        n = 8
        cond = jax.device_put(random_cond(name, self.model, size, n, gradient), rows)
        self.objective = grpo(beta=0.1, window=2, bounds=(0, 4), sde_type="cps", noise_level=0.8)
        keys = jax.random.split(jax.random.key(2), 3)
        plan = self.objective.make_plan(self.model.sigmas(6)).draw(keys[0])
        shape = self.model.token_shape
        latents = jax.device_put(jax.random.normal(keys[1], (n, *shape)), rows)
        noise = self.objective.draw_noise(keys[2], plan, n, shape)
        noise = jax.device_put(noise, batch_sharding(mesh, axis=1))
        collect = jax.jit(partial(self.objective.collect, self.model.velocity))
        self.latents, record = collect(self.adapters, cond, latents, noise, plan)
        advantages = jax.device_put(jnp.linspace(-1, 1, n), rows)
        self.batch = jax.tree.map(lambda a: a[None], Batch(record, cond, advantages))
        self.recompute = jax.jit(partial(self.objective.recompute_means, self.model.velocity))

    def update(self):
        """(state, metrics) after one update; its first moment is the gradient times 0.1."""
        optimizer = make_optimizer(1e-3, 0.9, 0.999, 1e-8, 1e-4, 1e9)
        opt_state = optimizer.init(self.adapters)
        state = TrainState(self.adapters, self.adapters, opt_state, jnp.int32(0))
        ema = EmaConfig(0.9, 1)
        step = jax.jit(partial(update, self.objective, optimizer, ema, self.model.velocity))
        return step(state, self.batch)


@cache
def on_mesh(name, layout):
    """Latents, gradient and loss of a guided call in float32."""
    run = Replay(name, "tiny", F32, "both", make_mesh(*layout, jax.devices()))
    state, metrics = run.update()
    gradient = jax.tree.map(np.asarray, state.opt_state[1][0].mu)
    return np.asarray(run.latents), jax.tree.leaves(gradient), float(metrics["loss"])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param((8, 1, 1), marks=slow),
        pytest.param((1, 8, 1), marks=slow),
        pytest.param((1, 1, 2), marks=slow),
        pytest.param((2, 2, 2), marks=slow),
    ],
)
def test_rollout_and_update_are_the_same_on_every_mesh(name, layout):
    """As for FLUX: within 1e-5 of an array's largest entry, since sums are in another order."""
    latents, gradient, loss = on_mesh(name, ONE)
    latents_again, gradient_again, loss_again = on_mesh(name, layout)
    scale = np.abs(latents).max()
    np.testing.assert_allclose(latents_again, latents, rtol=0, atol=1e-5 * scale)
    assert loss_again == pytest.approx(loss, rel=1e-4)
    for again, alone in zip(gradient_again, gradient, strict=True):
        scale = np.abs(alone).max()
        np.testing.assert_allclose(again, alone, rtol=0, atol=1e-4 * scale + 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_guidance_moves_nothing_between_devices(name, gradient):
    """The rows of an image stay on its device: with split rows there is no collective."""
    mesh = make_mesh(8, 1, 1, jax.devices())
    model, adapters = random_model(name, "tiny", F32, mesh)
    rows = batch_sharding(mesh)
    cond = jax.device_put(random_cond(name, model, "tiny", 8, gradient), rows)
    x = jax.device_put(jnp.zeros((8, *model.token_shape)), rows)
    sigma = jax.device_put(jnp.ones(8), rows)
    text = jax.jit(model.velocity).lower(adapters, x, sigma, cond).compile(QUICK).as_text()
    moves = re.findall(r"all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute", text)
    assert moves == []
