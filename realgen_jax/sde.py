"""Solver steps for a noise schedule. Pure numerics: no model, no state.

Flow matching: x_sigma = (1 - sigma) x0 + sigma eps; the network gives v = eps - x0; sigma falls
from 1 to 0. Every solver here draws x_next ~ N(mean, std^2) with a mean that is linear in x and v,
so that a step is three numbers:

    mean = step.x * x + step.v * v
    x_next = mean + step.std * z,  z ~ N(0, 1)
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


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


def sde_steps(sigmas: np.ndarray, noise_level: float) -> Steps:
    """Flow-SDE (Flow-GRPO, arXiv 2505.05470, eq. 9); its marginals are those of the ODE.

    With s = a sqrt(sigma / (1 - sigma)) and the noise level a:

        mean = x (1 - s^2 dt / (2 sigma)) - v (1 + s^2 (1 - sigma) / (2 sigma)) dt
        std = s sqrt(dt)

    At sigma = 1, the denominator 1 - sigma uses the schedule's second sigma, as in the reference.
    """
    sigmas64 = sigmas.astype(np.float64)
    sigma = sigmas64[:-1]
    dt = -np.diff(sigmas64)
    variance = noise_level**2 * sigma / (1.0 - np.where(sigma == 1.0, sigmas64[1], sigma))

    x = 1.0 - variance * dt / (2.0 * sigma)
    v = -(1.0 + variance * (1.0 - sigma) / (2.0 * sigma)) * dt
    return _steps(sigmas, x, v, np.sqrt(variance * dt))


def cps_steps(sigmas: np.ndarray, noise_level: float) -> Steps:
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


STOCHASTIC_STEPS: dict[str, Callable[[np.ndarray, float], Steps]] = {
    "sde": sde_steps,
    "cps": cps_steps,
}


def log_prob(x_next: Array, mean: Array, std: Array) -> Array:
    """Gaussian log-density of x_next [n, ...]: float32 [n].

    As in Flow-GRPO, this is the mean over a sample's elements, not the sum.
    """
    z = (x_next - mean) / std
    density = -0.5 * z * z - jnp.log(std) - 0.5 * np.log(2.0 * np.pi)
    return jnp.mean(density, axis=tuple(range(1, z.ndim)))
