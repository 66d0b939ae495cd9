"""Noise levels with a static shift, of the families whose shift does not depend on the size."""

import numpy as np

# Entries of scheduler_config.json that would make another schedule or another sampler.
SCHEDULE_ENTRIES = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "time_shift_type": "exponential",
    "shift_terminal": None,
    "invert_sigmas": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "stochastic_sampling": False,
}

# Without dynamic shifting, the other four entries have no effect; these are diffusers' defaults.
STATIC_ENTRIES = {
    **SCHEDULE_ENTRIES,
    "use_dynamic_shifting": False,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


def shifted(sigma: np.ndarray | float, shift: float) -> np.ndarray:
    """Shift noise levels in [0, 1] towards 1: f(y) = shift y / (1 + (shift - 1) y)."""
    return shift * np.float64(sigma) / (1.0 + (shift - 1.0) * np.float64(sigma))


def static_sigmas(steps: int, shift: float, last: float) -> np.ndarray:
    """Return float32 [steps + 1] from 1 to 0: a shifted uniform grid from 1 to `last`, then 0."""
    # Round the grid to float32, as diffusers does.
    grid = np.linspace(1.0, last, steps).astype(np.float32)
    return np.append(shifted(grid, shift), 0.0).astype(np.float32)
