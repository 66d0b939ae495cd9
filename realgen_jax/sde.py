"""The noise schedule and the solver's steps. Pure numbers: no model, no state.

Flow matching: x_sigma = (1 - sigma) x0 + sigma eps, the network gives v = eps - x0, sigma falls from 1 to 0. Every
solver here draws x_next ~ N(mean, std^2) with a mean that is linear in x and v, so a step is three numbers:

    mean = step.x * x + step.v * v        x_next = mean + step.std * z,  z ~ N(0, 1)
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


@dataclass(frozen=True)
class SchedulerConfig:
    """FLUX's `scheduler/scheduler_config.json`, under diffusers' names; the defaults are FLUX.1-dev's."""

    use_dynamic_shifting: bool = True
    shift: float = 3.0
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096


def flux_sigmas(num_steps: int, image_tokens: int, config: SchedulerConfig) -> np.ndarray:
    """float32 [num_steps + 1], from 1 down to 0: a uniform grid pushed towards noise, more so for more tokens.

    FLUX.1-dev shifts by e^mu with mu linear in the number of image tokens; schnell (no dynamic shifting) by `shift`.
    """
    grid = np.linspace(1.0, 1.0 / num_steps, num_steps).astype(np.float32).astype(np.float64)
    slope = (config.max_shift - config.base_shift) / (
        config.max_image_seq_len - config.base_image_seq_len
    )
    mu = config.base_shift + slope * (image_tokens - config.base_image_seq_len)
    shift = np.exp(mu) if config.use_dynamic_shifting else config.shift
    return np.append(shift / (shift + 1.0 / grid - 1.0), 0.0).astype(np.float32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Steps:
    """The coefficients of a schedule's steps, each float32 [T]; sigma is where a step starts, dt > 0 its length."""

    x: Array
    v: Array
    std: Array
    sigma: Array
    dt: Array

    def mean(self, x: Array, v: Array) -> Array:
        """Mean of the step's Gaussian for one step's coefficients (scalars, or shaped to broadcast)."""
        return self.x * x + self.v * v


def _steps(sigmas: np.ndarray, x: np.ndarray, v: np.ndarray, std: np.ndarray) -> Steps:
    sigmas = sigmas.astype(np.float64)
    return Steps(*(np.float32(a) for a in (x, v, std, sigmas[:-1], sigmas[:-1] - sigmas[1:])))


def ode_steps(sigmas: np.ndarray) -> Steps:
    """Euler steps of the probability-flow ODE: x + (sigma_next - sigma) v."""
    dt = -np.diff(sigmas.astype(np.float64))
    return _steps(sigmas, np.ones_like(dt), -dt, np.zeros_like(dt))


def sde_steps(sigmas: np.ndarray, noise_level: float) -> Steps:
    """Flow-SDE (Flow-GRPO, arXiv 2505.05470, eq. 9), s = a sqrt(sigma / (1 - sigma)), its marginals those of the ODE:

    mean = x (1 - s^2 dt / (2 sigma)) - v (1 + s^2 (1 - sigma) / (2 sigma)) dt,   std = s sqrt(dt).
    At sigma = 1 the denominator 1 - sigma takes the second sigma instead, as the reference does.
    """
    s64 = sigmas.astype(np.float64)
    sigma, dt = s64[:-1], -np.diff(s64)
    variance = noise_level**2 * sigma / (1.0 - np.where(sigma == 1.0, s64[1], sigma))
    x = 1.0 - variance * dt / (2.0 * sigma)
    v = -(1.0 + variance * (1.0 - sigma) / (2.0 * sigma)) * dt
    return _steps(sigmas, x, v, np.sqrt(variance * dt))


def cps_steps(sigmas: np.ndarray, noise_level: float) -> Steps:
    """Coefficients-preserving sampling (arXiv 2509.05952), std = sigma_next sin(a pi / 2):

    mean = (1 - sigma_next) (x - sigma v) + sqrt(sigma_next^2 - std^2) (x + (1 - sigma) v).
    The last step's std is 0: it can be sampled, but no policy gradient flows through it.
    """
    s64 = sigmas.astype(np.float64)
    sigma, after = s64[:-1], s64[1:]
    std = after * np.sin(noise_level * np.pi / 2.0)
    kept = np.sqrt(after**2 - std**2)
    return _steps(sigmas, (1.0 - after) + kept, kept * (1.0 - sigma) - (1.0 - after) * sigma, std)


STOCHASTIC_STEPS: dict[str, Callable[[np.ndarray, float], Steps]] = {
    "sde": sde_steps,
    "cps": cps_steps,
}


def log_prob(x_next: Array, mean: Array, std: Array) -> Array:
    """Gaussian log-density of x_next, as the mean (not the sum) over a sample's elements: [n, ...] -> float32 [n]."""
    z = (x_next - mean) / std
    return jnp.mean(
        -0.5 * z * z - jnp.log(std) - 0.5 * np.log(2.0 * np.pi), axis=tuple(range(1, z.ndim))
    )
