import dataclasses
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from realgen_jax.models.flux.family import FluxSchedule
from realgen_jax.models.flux.transformer import Cond
from realgen_jax.nn.convert import abstract
from realgen_jax.nn.tokens import unpack
from realgen_jax.nn.vae import Autoencoder
from realgen_jax.rollout import (
    SOLVERS,
    compiler_options,
    draw_latents,
    hybrid,
    make_noiseless_plan,
    make_plan,
    rollout,
    sample,
)
from realgen_jax.sde import ode_steps, sde_steps
from realgen_jax.windows import Moves
from tests.helpers.goldens import golden
from tests.helpers.models import one_device
from tests.helpers.objective_goldens import case
from tests.helpers.objectives import grpo

SIGMAS = FluxSchedule().sigmas(8, 16)


def cond_of(case):
    n = len(case["prompt_embeds"])
    return Cond(
        jnp.asarray(case["prompt_embeds"]),
        jnp.asarray(case["pooled_prompt_embeds"]),
        jnp.full(n, 3.5),
    )


def pictures(tiny, latents):
    vae = nnx.merge(abstract(Autoencoder, tiny.vae)[0], tiny.vae_params)
    return np.clip(np.asarray(vae.decode(unpack(latents, 4, 4))) / 2 + 0.5, 0, 1).transpose(
        0, 3, 1, 2
    )


def test_ode_sampling_matches_the_golden(tiny):
    case = golden("05_rollout/ode.npz")
    velocity = partial(tiny.velocity, None)
    got = sample(velocity, cond_of(case), case["init_latents"], ode_steps(SIGMAS))
    np.testing.assert_allclose(pictures(tiny, got), case["image"], atol=1e-4)


@pytest.mark.parametrize(
    ("name", "kind", "start", "window", "branches", "noise_level"),
    [
        ("realgen_v1_start2_len3", "sde", 2, 3, 3, 0.9),
        ("realgen_v1_start0_len2", "sde", 0, 2, 2, 0.7),
        ("realgen_v2_sde_start1_len3", "sde", 1, 3, 1, 0.9),
        ("realgen_v2_cps_start0_len3", "cps", 0, 3, 1, 0.7),
    ],
)
def test_windowed_rollouts_match_the_goldens(
    tiny, name, kind, start, window, branches, noise_level
):
    case = golden(f"05_rollout/{name}.npz")
    bounds = (start, start + window)
    plan = make_plan(
        SIGMAS, kind=kind, noise_level=noise_level, window=window, bounds=bounds, branches=branches
    )
    run = jax.jit(partial(rollout, partial(tiny.velocity, None)))
    latents, t = run(cond_of(case), case["init_latents"], case["window_noise"], plan)
    np.testing.assert_allclose(t.latents.swapaxes(0, 1), case["latents"], atol=1e-4)
    np.testing.assert_allclose(t.mean.swapaxes(0, 1), case["prev_sample_mean"], atol=1e-4)
    logp = t.logp.T
    if kind == "cps":  # the reference leaves the variance out
        logp = -np.mean((t.latents[1:] - t.mean) ** 2, axis=(2, 3)).T
    np.testing.assert_allclose(logp, case["log_probs"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        1000 * t.steps.sigma, case["timesteps"].reshape(-1, window)[0], rtol=1e-5
    )
    np.testing.assert_allclose(pictures(tiny, latents), case["image"], atol=1e-4)


def toy_velocity(x, sigma, cond):
    return 0.5 * x * sigma[:, None, None] + cond[:, None, None]


def test_one_program_serves_every_start():
    traces = []

    @jax.jit
    def run(cond, latents, noise, plan):
        traces.append(1)
        return rollout(toy_velocity, cond, latents, noise, plan)

    cond, seen = jnp.arange(2.0), set()
    base = make_plan(SIGMAS, kind="sde", noise_level=0.9, window=3, bounds=(0, 7), branches=2)
    for i in range(40):
        plan = base.draw(jax.random.key(i))
        latents = draw_latents(jax.random.key(i), 2, 2, (4, 8))
        noise = jax.random.normal(jax.random.key(-i), (3, 4, 4, 8))
        x, t = run(cond, latents, noise, plan)
        seen.add(int(plan.start))
        by_hand = latents
        noisy, ode = sde_steps(SIGMAS, 0.9), ode_steps(SIGMAS)
        for j in range(8):
            if j == plan.start:
                by_hand, c = jnp.repeat(by_hand, 2, axis=0), jnp.repeat(cond, 2)
                np.testing.assert_allclose(t.latents[0], by_hand, rtol=1e-5, atol=1e-5)
            c = c if j >= plan.start else cond
            inside = plan.start <= j < plan.start + 3
            step = jax.tree.map(lambda a, j=j: a[j], noisy if inside else ode)
            v = toy_velocity(by_hand, jnp.full(len(by_hand), step.sigma), c)
            by_hand = step.mean(by_hand, v) + (step.std * noise[j - plan.start] if inside else 0)
        np.testing.assert_allclose(x, by_hand, rtol=1e-4, atol=1e-5)
    assert len(traces) == 1
    assert seen == {0, 1, 2, 3, 4}  # [lo, hi - window], both ends


def test_same_latent_shares_the_start_and_nothing_else():
    latents = draw_latents(jax.random.key(0), 6, 2, (4, 8))
    objective = grpo(window=2, bounds=(0, 8), branches=3)
    plan = objective.make_plan(SIGMAS)
    noise = objective.draw_noise(jax.random.key(1), plan, 18, (4, 8))
    assert len({a.tobytes() for a in np.asarray(latents)}) == 2
    np.testing.assert_array_equal(latents[0], latents[2])
    assert noise.shape == (2, 18, 4, 8)
    assert len({a.tobytes() for a in np.asarray(noise).reshape(36, -1)}) == 36


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 9}, r"config.sample.sde_window_size 9 does not fit sde_window_range \(0, 8\)"),
        ({"bounds": (0, 9)}, r"hi <= 8 \(8 steps\)"),
        ({"kind": "cps"}, "the last of which has no noise"),
        ({"noise_level": 0.0}, "noise_level is 0.0"),
        (
            {"noise_least": 0.1},
            "noise_least is 0.1, which only config.sample.noise_schedule='cosine'",
        ),
        ({"noise_schedule": "cosine", "noise_least": 1.0}, "at most config.sample.noise_level 0.9"),
        ({"trained": 4}, "trained_steps is 4; expected at most sde_window_size 3"),
        ({"kind": "cps", "noise_level": 1.5, "bounds": (0, 7)}, "up to 1 with sde_type cps"),
    ],
)
def test_bad_windows_are_named(change, message):
    good = {"kind": "sde", "noise_level": 0.9, "window": 3, "bounds": (0, 8), "branches": 1}
    with pytest.raises(ValueError, match=message):
        make_plan(SIGMAS, **{**good, **change})


@pytest.mark.parametrize("schedule", ["flux", "static"])
def test_noiseless_rollouts_match_the_golden(schedule):
    dpm2 = case("dpm2")
    sigmas = dpm2[f"{schedule}/sigmas"]

    def velocity(x, sigma, cond):
        return x @ dpm2["A"].T + sigma[:, None, None] * dpm2["b"]

    def final(solver):
        plan = make_noiseless_plan(sigmas, solver, sigmas[:-1]).draw(jax.random.key(0))
        return jax.jit(lambda plan, x: plan.sample(velocity, None, x))(plan, dpm2["latents"])

    dpm2.check(f"{schedule}/euler_final", final("euler"))
    entry = dpm2.entry
    np.testing.assert_allclose(
        final("dpm2"), dpm2[f"{schedule}/trajectory"][-1], rtol=entry["rtol"], atol=entry["atol"]
    )


def test_hybrid_inference_matches_the_golden():
    """The tuned model takes the first steps, the base model the others, with any solver."""
    own = case("hybrid")
    sigmas = own["sigmas"]

    def of(name):
        return lambda x, sigma, cond: (
            x @ own[f"A_{name}"].T + sigma[:, None, None] * own[f"b_{name}"]
        )

    def final(velocity, solver):
        kind = SOLVERS[solver]
        return jax.jit(lambda x: kind.sample(velocity, None, x, kind.steps(sigmas)))(own["latents"])

    finals = [name for name in own.arrays if name.endswith("/final")]
    for name in finals:
        steps = int(name.removeprefix("first").partition("/")[0])
        if steps:
            velocity = hybrid(of("tuned"), of("base"), sigmas, steps)
            own.check(name, final(velocity, "euler"))
    assert len(finals) > 2

    # The second-order solver's history goes on across the change.
    steps = len(sigmas) - 2
    mixed = final(hybrid(of("tuned"), of("base"), sigmas, steps), "dpm2")
    assert not np.allclose(mixed, final(of("tuned"), "dpm2"))
    assert not np.allclose(mixed, final(of("base"), "dpm2"))
    assert hybrid(of, None, sigmas, len(sigmas) - 1) is of


def test_a_moving_window_is_a_function_of_the_epoch():
    plan = make_plan(
        SIGMAS,
        kind="sde",
        noise_level=0.9,
        window=3,
        bounds=(1, 7),
        branches=1,
        moves=Moves("progressive", epochs=2),
    )
    keys = [jax.random.key(i) for i in range(12)]
    starts = [int(plan.draw(key, epoch).start) for epoch, key in enumerate(keys)]
    assert starts == [1, 1, 2, 2, 3, 3, 4, 4, 1, 1, 2, 2]  # the window fits from 1 to 4


def test_trained_steps_are_drawn_among_those_of_the_window():
    make = partial(make_plan, SIGMAS, kind="sde", noise_level=0.9, window=4, bounds=(0, 8))
    plan = make(branches=1, trained=2)
    drawn = [tuple(plan.draw(jax.random.key(i)).trained.tolist()) for i in range(100)]
    assert set(drawn) == {(a, b) for a in range(4) for b in range(4) if a < b}
    assert plan.draw(jax.random.key(0)).start == make(branches=1).draw(jax.random.key(0)).start
    assert make(branches=1, trained=4).trained is None


AFTER = ("case0", "case1", "case2", "case5")  # of the midpoint form, with the window in the history


@pytest.mark.parametrize("name", AFTER)
def test_fewer_steps_after_the_window_match_the_golden(name):
    mix = case("mix_dpm")
    settings = mix.meta[name]
    start, window = settings["window_start"], settings["window"]
    plan = make_plan(
        mix[f"{name}/sigmas_full"],
        kind="sde",
        noise_level=settings["eta"],
        window=window,
        bounds=(0, start + window),
        branches=1,
        after=settings["compress_ratio"],
    )
    plan = dataclasses.replace(plan, start=np.int32(start))

    def velocity(x, sigma, cond):
        return x @ mix["A"].T + sigma[:, None, None] * mix["b"]

    run = jax.jit(partial(rollout, velocity))
    final, trajectory = run(None, mix["latents"], mix[f"{name}/noise"], plan)
    want = mix[f"{name}/trajectory"]
    tolerance = {"rtol": mix.entry["rtol"], "atol": mix.entry["atol"]}
    np.testing.assert_allclose(final, want[-1], **tolerance)
    np.testing.assert_allclose(trajectory.latents, want[start : start + window + 1], **tolerance)
    steps = start + window + plan.after.count[start]
    assert steps == settings["forwards"] == len(want) - 1


def test_a_window_with_too_few_points_behind_it_is_refused():
    plan = partial(make_plan, SIGMAS, kind="sde", noise_level=0.9, window=3, branches=1, after=0.5)
    assert plan(bounds=(0, 5)).after.count.tolist() == [2, 1, 1]
    assert plan(bounds=(0, 5)).mean_steps == (5 + 5 + 6) / 3
    with pytest.raises(ValueError, match="leaves 1 of the 3 points behind a window that ends"):
        plan(bounds=(0, 6))


@pytest.mark.parametrize(
    ("dtype", "jaxlib", "alone"),
    [(jnp.bfloat16, "0.10.2", True), (jnp.float32, "0.10.2", False), (jnp.bfloat16, "0.13", False)],
)
def test_products_in_bfloat16_are_computed_alone_on_cpus(monkeypatch, dtype, jaxlib, alone):
    """The compiler takes the option. A jaxlib that may not know it keeps its default."""
    monkeypatch.setattr("importlib.metadata.version", lambda package: jaxlib)
    options = compiler_options(dtype, one_device())
    assert bool(options) == alone
    x = jnp.ones((2, 2), dtype)
    assert jax.jit(lambda a: a @ a, compiler_options=options)(x)[0, 0] == 2


def test_gpus_take_deterministic_kernels():
    """Else cuDNN's attention may add in another order each time in its backward pass."""
    device = SimpleNamespace(platform="gpu")
    mesh = SimpleNamespace(devices=np.array([device], object))
    assert compiler_options(jnp.bfloat16, mesh) == {"xla_gpu_exclude_nondeterministic_ops": True}
