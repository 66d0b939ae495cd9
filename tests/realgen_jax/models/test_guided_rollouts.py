"""Guided rollouts of SD3 and Z-Image: the recorded numbers, and replay to the bit."""

import re
from functools import cache, partial
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx

from realgen_jax.models.guidance import GRADIENTS, Guided
from realgen_jax.models.loading import load_model
from realgen_jax.models.sd3 import transformer as sd3
from realgen_jax.models.zimage import transformer as zimage
from realgen_jax.nn.convert import abstract
from realgen_jax.nn.export import to_torch
from realgen_jax.nn.tokens import pack, unpack
from realgen_jax.nn.vae import Autoencoder
from realgen_jax.rollout import make_plan, rollout, sample
from realgen_jax.sde import log_prob, ode_steps
from realgen_jax.sharding import batch_sharding, make_mesh
from tests.helpers.compiling import QUICK
from tests.helpers.goldens import GOLDENS, golden
from tests.helpers.models import one_device, pretrained
from tests.helpers.replays import FAMILIES, Replay, random_cond, random_model

slow = pytest.mark.slow
FOLDERS = {"sd3": "12_sd3", "zimage": "13_zimage"}
SIDE = 4  # tokens on a side of the golden pictures


@cache
def golden_pipeline(name):
    """The family's golden pipeline, all weights trainable."""
    folder = GOLDENS / FOLDERS[name] / "pipeline"
    return load_model(pretrained(folder), (64, 64), one_device())


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
        ("sd3", "cps", "both"),
        pytest.param("sd3", "sde", "bound", marks=slow),
        pytest.param("zimage", "sde", "both", marks=slow),
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


F32, BF16 = jnp.float32, jnp.bfloat16
ONE, MESH = (1, 1, 1), (2, 2, 2)


@pytest.mark.parametrize(
    ("name", "size", "dtype", "gradient", "layout"),
    [
        pytest.param(name, size, dtype, gradient, layout, marks=slow)
        for name in FOLDERS
        for size in ("tiny", "mid")
        for dtype in (F32, BF16)
        for gradient in GRADIENTS
        for layout in (ONE, MESH)
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
@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_an_update_sees_a_ratio_of_exactly_one(name, gradient):
    """And a KL to the base model, which is guided too, without the adapters."""
    _, metrics = Replay(name, "tiny", BF16, gradient, make_mesh(*ONE, jax.devices())).update()
    assert metrics["ratio_deviation"] == 0.0
    assert metrics["kl_loss"] > 0


@cache
def on_mesh(name, layout):
    """Latents, gradient and loss of a guided call in float32."""
    run = Replay(name, "tiny", F32, "both", make_mesh(*layout, jax.devices()))
    state, metrics = run.update()
    gradient = jax.tree.map(np.asarray, state.opt_state[1][0].mu)
    return np.asarray(run.latents), jax.tree.leaves(gradient), float(metrics["loss"])


@pytest.mark.parametrize("name", FOLDERS)
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
@pytest.mark.parametrize("name", FOLDERS)
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
