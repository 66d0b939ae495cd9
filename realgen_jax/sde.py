"""Solver steps for a noise schedule. Pure numerics: no model, no state.

Flow matching: x_sigma = (1 - sigma) x0 + sigma eps; the network gives v = eps - x0; sigma falls
from 1 to 0. The solvers of first order draw x_next ~ N(mean, std^2) with a mean that is linear in x
and v, so that a step is three numbers:

    mean = step.x * x + step.v * v
    x_next = mean + step.std * z,  z ~ N(0, 1)

Those of second order also use the previous step's estimate of the clean latents, x - sigma v.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Noise = float | np.ndarray  # a noise level: of all steps, or float64 [T], one for each


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Steps:
    """The coefficients of a schedule's T steps, each float32 [T].

    sigma is the noise level at the start of a step, and dt > 0 is its length.
    """

    x: Array
    v: Array
    std: Array
    sigma: Array
    dt: Array

    def mean(self, x: Array, v: Array) -> Array:
        """Return the mean of one step; the coefficients are scalars or broadcast to x and v."""
        return self.x * x + self.v * v


def _steps(sigmas: np.ndarray, x: np.ndarray, v: np.ndarray, std: np.ndarray) -> Steps:
    """Build Steps from coefficients that were computed in float64."""
    sigmas = sigmas.astype(np.float64)
    return Steps(
        x=np.float32(x),
        v=np.float32(v),
        std=np.float32(std),
        sigma=np.float32(sigmas[:-1]),
        dt=np.float32(sigmas[:-1] - sigmas[1:]),
    )


def ode_steps(sigmas: np.ndarray) -> Steps:
    """Euler steps of the probability-flow ODE, x + (sigma_next - sigma) v.

    sigmas: float32 [T + 1], falling from 1 to 0; the same holds for the functions below.
    """
    dt = -np.diff(sigmas.astype(np.float64))
    return _steps(sigmas, np.ones_like(dt), -dt, np.zeros_like(dt))


def sde_steps(sigmas: np.ndarray, noise_level: Noise) -> Steps:
    """Flow-SDE (Flow-GRPO, arXiv 2505.05470, eq. 9); its marginals are those of the ODE.

    With s = a sqrt(sigma / (1 - sigma)) and the noise level a:

        mean = x (1 - s^2 dt / (2 sigma)) - v (1 + s^2 (1 - sigma) / (2 sigma)) dt
        std = s sqrt(dt)

    At sigma = 1, the denominator 1 - sigma uses the schedule's second sigma, as in the reference.
    """
    sigmas64 = sigmas.astype(np.float64)
    sigma = sigmas64[:-1]
    variance = noise_level**2 * sigma / (1.0 - np.where(sigma == 1.0, sigmas64[1], sigma))
    return _flow_sde(sigmas, variance)


def dance_steps(sigmas: np.ndarray, noise_level: Noise) -> Steps:
    """DanceGRPO's SDE (arXiv 2505.07818): flow-SDE with the constant s = a.

    Unlike those of flow-SDE and CPS, its last step has as much noise as the others of its length.
    """
    return _flow_sde(sigmas, np.full(len(sigmas) - 1, noise_level**2))


def _flow_sde(sigmas: np.ndarray, variance: np.ndarray) -> Steps:
    """Steps of flow-SDE with the variance s^2, float64 [T], per unit of sigma."""
    sigmas64 = sigmas.astype(np.float64)
    sigma = sigmas64[:-1]
    dt = -np.diff(sigmas64)

    x = 1.0 - variance * dt / (2.0 * sigma)
    v = -(1.0 + variance * (1.0 - sigma) / (2.0 * sigma)) * dt
    return _steps(sigmas, x, v, np.sqrt(variance * dt))


def cps_steps(sigmas: np.ndarray, noise_level: Noise) -> Steps:
    """Coefficients-preserving sampling (arXiv 2509.05952).

    With the noise level a:

        std = sigma_next sin(a pi / 2)
        mean = (1 - sigma_next) (x - sigma v) + sqrt(sigma_next^2 - std^2) (x + (1 - sigma) v)

    The last step's std is 0: it can be sampled, but no policy gradient flows through it.
    """
    sigmas64 = sigmas.astype(np.float64)
    sigma = sigmas64[:-1]
    sigma_next = sigmas64[1:]
    std = sigma_next * np.sin(noise_level * np.pi / 2.0)
    kept = np.sqrt(sigma_next**2 - std**2)

    x = (1.0 - sigma_next) + kept
    v = kept * (1.0 - sigma) - (1.0 - sigma_next) * sigma
    return _steps(sigmas, x, v, std)


STOCHASTIC_STEPS: dict[str, Callable[[np.ndarray, Noise], Steps]] = {
    "sde": sde_steps,
    "cps": cps_steps,
    "dance": dance_steps,
}


def constant_noise(sigmas: np.ndarray, most: float, least: float) -> float:
    """The same noise level in all steps. Raises ValueError if `least` is not 0."""
    if least:
        raise ValueError(
            f"config.sample.noise_least is {least}, which only "
            "config.sample.noise_schedule='cosine' reads, and that is 'constant'; expected 0"
        )
    return most


def cosine_noise(sigmas: np.ndarray, most: float, least: float) -> np.ndarray:
    """Noise levels that fall with sigma, from `most` at 1 to `least` at 0: float64 [T].

    least + (most - least) / 2 (1 + cos(pi (1 - sigma))) at the sigma where each step starts.
    Raises ValueError if `least` is above `most`. Source: HiCoGen (arXiv 2511.19965).
    """
    if least > most:
        raise ValueError(
            f"config.sample.noise_least is {least}; expected at most config.sample.noise_level "
            f"{most}, from which the noise falls"
        )
    sigma = sigmas.astype(np.float64)[:-1]
    return least + (most - least) / 2.0 * (1.0 + np.cos(np.pi * (1.0 - sigma)))


# config.sample.noise_schedule -> (sigmas, noise_level, noise_least) -> noise level
NOISE_SCHEDULES: dict[str, Callable[[np.ndarray, float, float], Noise]] = {
    "constant": constant_noise,
    "cosine": cosine_noise,
}


# -- Second order


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TwoSteps:
    """The coefficients of T steps that use two clean estimates, each float32 [T].

    x, clean and last are the weights of x, of this step's clean estimate and of the previous
    step's. sigma is the noise level at the start of a step.
    """

    x: Array
    clean: Array
    last: Array
    sigma: Array

    def after(self, x: Array, clean: Array, last: Array) -> Array:
        """Return the latents after one step; `clean` is x - sigma v."""
        return self.x * x + self.clean * clean + self.last * last


def dpm2_steps(
    sigmas: np.ndarray, *, first: int = 0, history: bool = True, form: str = "midpoint"
) -> TwoSteps:
    """DPM-Solver++(2M) (arXiv 2211.01095) of the probability-flow ODE.

    From s to s', with lambda = log((1 - s) / s) and h = lambda(s') - lambda(s):

        x' = (s' / s) x + G m0 + c (h / h_last) (m0 - m1),  G = (1 - s') - (1 - s) s' / s

    with the clean estimates m0 of this step and m1 of the last one, c = G / 2 ("midpoint") or
    (1 - s') - G / h ("heun"). Without the last term it is the Euler step. That term is left out in
    the last step, in the first two (lambda(1) is infinite), and before step `first`; without
    `history` also in step `first` itself, which then does not use the step before it.

    Sources: the solver of DiffusionNFT, and MixGRPO's, which starts after a window.
    """
    sigmas64 = sigmas.astype(np.float64)
    s = sigmas64[:-1]
    s_next = sigmas64[1:]
    gain = (1.0 - s_next) - (1.0 - s) * s_next / s

    # The steps of second order, of which lambda and h are finite.
    second = np.arange(len(s)) >= (first if history else first + 1)
    second &= (np.arange(len(s)) >= 1) & (s_next > 0.0)
    second[1:] &= s[:-1] < 1.0

    correction = np.zeros_like(s)
    for i in np.flatnonzero(second):
        start, middle, end = np.log((1.0 - sigmas64[i - 1 : i + 2]) / sigmas64[i - 1 : i + 2])
        h = end - middle
        weight = gain[i] / 2.0 if form == "midpoint" else (1.0 - s_next[i]) - gain[i] / h
        correction[i] = weight * h / (middle - start)

    return TwoSteps(
        x=np.float32(s_next / s),
        clean=np.float32(gain + correction),
        last=np.float32(-correction),
        sigma=np.float32(s),
    )


def shortened(sigmas: np.ndarray, last: int, ratio: float) -> np.ndarray:
    """Replace the steps after step `last` of a schedule by fewer: float32 [steps + 1].

    MixGRPO-Flash spaces int((T - last) ratio) points evenly on the schedule before its shift. For a
    shifted schedule s = k u / (1 + (k - 1) u), u = 1 - i / T, k = s i / ((1 - s) (T - i)) follows
    from each step; between steps, k is interpolated, for schedules where it is not constant.

    Raises ValueError if fewer than 2 points are left: one would end above sigma = 0.
    """
    steps = len(sigmas) - 1
    count = int((steps - last) * ratio)
    if count < 2:
        raise ValueError(
            f"config.sample.sde_window.after is {ratio:g}, which leaves {count} of the "
            f"{steps - last} points behind a window that ends with step {last} of {steps}; "
            "expected 2 or more: raise it, or lower the end of sde_window_range"
        )
    inner = np.arange(1, steps)
    s = sigmas.astype(np.float64)[1:-1]
    shift_of_step = s * inner / ((1.0 - s) * (steps - inner))

    positions = np.linspace(last + 1, steps, count)
    u = 1.0 - positions / steps
    k = np.interp(positions, inner, shift_of_step)
    new = k * u / (1.0 + (k - 1.0) * u)
    return np.concatenate([sigmas[: last + 1], new]).astype(np.float32)


@jax.named_scope("log_prob")
def log_prob(x_next: Array, mean: Array, std: Array) -> Array:
    """Gaussian log-density of x_next [n, ...]: float32 [n].

    As in Flow-GRPO, this is the mean over a sample's elements, not the sum.
    """
    z = (x_next - mean) / std
    density = -0.5 * z * z - jnp.log(std) - 0.5 * np.log(2.0 * np.pi)
    return jnp.mean(density, axis=tuple(range(1, z.ndim)))
