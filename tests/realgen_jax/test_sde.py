import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realgen_jax.models.flux.family import FluxSchedule
from realgen_jax.sde import (
    NOISE_SCHEDULES,
    STOCHASTIC_STEPS,
    cosine_noise,
    cps_steps,
    dance_steps,
    dpm2_steps,
    log_prob,
    ode_steps,
    sde_steps,
    shortened,
)
from tests.helpers.goldens import golden
from tests.helpers.objective_goldens import case


@pytest.mark.parametrize("size", ["64x64", "512x512", "768x512", "1024x1024"])
@pytest.mark.parametrize("steps", [4, 8, 10, 28])
def test_schedule_matches_the_goldens(size, steps):
    arrays = golden("03_schedule/flux_dynamic.npz")
    height, width = map(int, size.split("x"))
    sigmas = FluxSchedule().sigmas(steps, height * width // 256)
    np.testing.assert_allclose(sigmas, arrays[f"flux_{size}_{steps}/sigmas"], rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(
        1000 * sigmas[:-1], arrays[f"flux_{size}_{steps}/timesteps"], rtol=2e-6, atol=1e-3
    )
    assert sigmas[0] == 1.0
    assert sigmas[-1] == 0.0


def test_schedule_without_dynamic_shift():
    """schnell: sigma' = shift sigma / (1 + (shift - 1) sigma) on 1, 3/4, 1/2, 1/4."""
    sigmas = FluxSchedule(use_dynamic_shifting=False, shift=3.0).sigmas(4, 256)
    np.testing.assert_allclose(sigmas, [1.0, 0.9, 0.75, 0.5, 0.0], rtol=1e-6)


@pytest.mark.parametrize("noise_level", [0.3, 0.7, 0.9])
@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_steps_match_the_goldens(kind, noise_level):
    arrays = golden(f"04_sde_step/realgen_{kind}.npz")
    make = {"sde": sde_steps, "cps": cps_steps}[kind]
    step = jax.tree.map(
        lambda a: a[arrays["step_index"]][:, None, None], make(arrays["sigmas"], noise_level)
    )
    case = {
        key.split("/")[1]: value
        for key, value in arrays.items()
        if key.startswith(f"nl{noise_level}/")
    }
    x, v, new_v = arrays["sample"], arrays["model_output"], case["new_model_output"]
    mean = step.mean(x, v)
    np.testing.assert_allclose(mean, case["old_prev_sample_mean"], rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(
        mean + step.std * arrays["noise"], case["prev_sample"], rtol=1e-4, atol=2e-6
    )
    np.testing.assert_allclose(np.sqrt(step.dt), case["sqrt_dt"], rtol=1e-5)
    per_sqrt_dt = step.std / (np.sqrt(step.dt) if kind == "sde" else 1.0)
    np.testing.assert_allclose(per_sqrt_dt, case["std_dev_t"], rtol=1e-5, atol=1e-7)

    def density(v):
        mean = step.mean(x, v)
        if kind == "cps":  # the reference leaves the variance out of this one
            return -jnp.mean((case["prev_sample"] - mean) ** 2, axis=(1, 2)), mean
        return log_prob(case["prev_sample"], mean, step.std), mean

    new, pullback, new_mean = jax.vjp(density, new_v, has_aux=True)
    np.testing.assert_allclose(new_mean, case["new_prev_sample_mean"], rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(density(v)[0], case["old_log_prob"], rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(new, case["new_log_prob"], rtol=1e-4, atol=2e-5)
    gradient = case["grad_new_model_output"]
    np.testing.assert_allclose(
        pullback(arrays["cotangent"])[0], gradient, atol=1e-4 * np.abs(gradient).max()
    )


def test_noiseless_steps_are_euler_steps():
    arrays = golden("04_sde_step/realgen_sde.npz")
    step = jax.tree.map(
        lambda a: a[arrays["step_index"]][:, None, None], ode_steps(arrays["sigmas"])
    )
    got = step.mean(arrays["sample"], arrays["model_output"])
    np.testing.assert_allclose(got, arrays["nl0/prev_sample"], rtol=1e-5, atol=1e-6)


def test_flow_sde_keeps_the_marginals():
    """With the exact velocity of Gaussian data, N(0, 0.5^2), many small steps must end in that
    data's spread.
    """
    sigmas = FluxSchedule().sigmas(200, 256)
    steps = sde_steps(sigmas, 0.7)
    x = np.random.default_rng(0).standard_normal(200_000)
    for i in range(200):
        sigma, noise = sigmas[i], np.random.default_rng(i + 1).standard_normal(x.shape)
        variance = (1 - sigma) ** 2 * 0.25 + sigma**2
        v = x * (sigma - 0.25 * (1 - sigma)) / variance  # E[eps - x0 | x]
        x = steps.x[i] * x + steps.v[i] * v + steps.std[i] * noise
    assert abs(x.std() - 0.5) < 0.01


def test_cps_keeps_the_coefficients():
    """From x = (1 - sigma) x0 + sigma eps a step must reach (1 - sigma_next) x0 + noise of variance
    sigma_next^2.
    """
    sigmas = FluxSchedule().sigmas(8, 256)
    steps = cps_steps(sigmas, 0.7)
    of_x0 = steps.x * (1 - sigmas[:-1]) - steps.v
    of_eps = steps.x * sigmas[:-1] + steps.v
    np.testing.assert_allclose(of_x0, 1 - sigmas[1:], atol=1e-6)
    np.testing.assert_allclose(of_eps**2 + steps.std**2, sigmas[1:] ** 2, atol=1e-6)


@pytest.mark.parametrize("eta", [0.3, 0.7])
@pytest.mark.parametrize("schedule", ["flux", "static"])
def test_dance_steps_match_the_golden(schedule, eta):
    dance = case("dance")
    x, v, v_new, z, cotangent, sigmas = (
        dance[f"{schedule}/{key}"] for key in ("x", "v", "v_new", "z", "cotangent", "sigmas")
    )
    steps = dance_steps(sigmas, eta)
    name = f"{schedule}/eta{eta}"
    dance.check(f"{name}/coef_x", steps.x)
    dance.check(f"{name}/coef_v", steps.v)
    dance.check(f"{name}/std", steps.std)

    step = jax.tree.map(lambda a: a[:, None, None, None], steps)
    mean = step.mean(x, v)
    x_next = mean + step.std * z
    dance.check(f"{name}/mean", mean)
    dance.check(f"{name}/x_next", x_next)

    def density(v):
        return jax.vmap(log_prob)(x_next, step.mean(x, v), step.std[:, 0])

    logp_new, pullback = jax.vjp(density, jnp.asarray(v_new))
    dance.check(f"{name}/logp", density(v))
    dance.check(f"{name}/logp_new", logp_new)
    dance.check(f"{name}/grad_v_new", pullback(jnp.asarray(cotangent))[0])


@pytest.mark.parametrize("schedule", ["flux", "static"])
def test_second_order_coefficients_match_the_golden(schedule):
    dpm2 = case("dpm2")
    steps = dpm2_steps(dpm2[f"{schedule}/sigmas"])
    dpm2.check(f"{schedule}/coefficients", np.stack([steps.x, steps.clean, steps.last], axis=1))
    assert (steps.last[[0, 1, -1]] == 0).all()
    assert np.isfinite(jax.tree.leaves(steps)).all()


MIX = [key for key in case("mix_dpm").meta if key.startswith("case")]


@pytest.mark.parametrize("name", MIX)
def test_second_order_after_a_window_matches_the_golden(name):
    mix = case("mix_dpm")
    settings = mix.meta[name]
    start, window = settings["window_start"], settings["window"]
    last = start + window - 1
    full = mix[f"{name}/sigmas_full"]
    sigmas = shortened(full, last, settings["compress_ratio"])
    mix.check(f"{name}/sigmas", sigmas)

    euler, noisy = ode_steps(sigmas), sde_steps(full, settings["eta"])
    second = dpm2_steps(
        sigmas, first=last + 1, history=settings["history"], form=settings["solver"]
    )
    x = mix["latents"]
    clean = np.zeros_like(x)
    trajectory, estimates = [x], []
    for i, sigma in enumerate(sigmas[:-1]):
        v = x @ mix["A"].T + sigma * mix["b"]
        before, clean = clean, x - sigma * v
        step = jax.tree.map(lambda a, i=i: a[i], noisy if start <= i <= last else euler)
        if i > last:
            x = jax.tree.map(lambda a, i=i: a[i], second).after(x, clean, before)
        else:
            x = step.mean(x, v)
        if start <= i <= last:
            x = x + step.std * mix[f"{name}/noise"][i - start]
        trajectory.append(x)
        estimates.append(clean)
    mix.check(f"{name}/trajectory", np.stack(trajectory))
    mix.check(f"{name}/clean", np.stack(estimates))


def test_a_schedule_that_would_end_above_zero_is_refused():
    sigmas = case("mix_dpm")["case0/sigmas_full"]
    with pytest.raises(ValueError, match="leaves 1 of the 4 points behind a window"):
        shortened(sigmas, 21, 0.4)


@pytest.mark.parametrize("schedule", ["flux", "static"])
def test_falling_noise_matches_the_golden(schedule):
    hicogen = case("hicogen")
    for least, most in ((0.1, 0.7), (0.3, 0.3), (0, 1)):
        noise = cosine_noise(hicogen[f"{schedule}/sigmas"], most, least)
        hicogen.check(f"{schedule}/eta{least}_{most}", noise)


@pytest.mark.parametrize("kind", STOCHASTIC_STEPS)
def test_each_step_takes_its_own_noise(kind):
    """Step by step, as if its noise level were that of the whole schedule."""
    sigmas = np.linspace(1, 0, 7, dtype=np.float32)
    steps = STOCHASTIC_STEPS[kind](sigmas, NOISE_SCHEDULES["cosine"](sigmas, 0.9, 0.2))
    for i, level in enumerate(cosine_noise(sigmas, 0.9, 0.2)):
        own = STOCHASTIC_STEPS[kind](sigmas, float(level))
        for name in ("x", "v", "std"):
            np.testing.assert_allclose(getattr(steps, name)[i], getattr(own, name)[i], rtol=1e-6)
    assert NOISE_SCHEDULES["constant"](sigmas, 0.9, 0.0) == 0.9
