"""Keys that ask for something which the chosen objective does not do.

Such a key is recognised by its value: one that the objective does not read must have the default of
`base()`. Keys that every preset sets for GRPO, such as config.train.clip_range, are the exception:
they are ignored where they are not read.
"""

from typing import Any

# The sections that only one objective reads, each named after it.
SECTIONS = ("dppo", "nft", "awm")

# What shapes a window of noisy steps, or its replay.
OF_COUPLED = (
    "sample.sde_type",
    "sample.noise_level",
    "sample.noise_schedule",
    "sample.noise_least",
    "sample.sde_window_size",
    "sample.sde_window_range",
    "sample.sde_window",
    "sample.branches",
    "train.kl",
    "train.guard_bias",
    "train.recompute_old",
)

# What makes a rollout differ from the steps that an update can replay: {key: reason}.
OF_DECOUPLED = {
    "sample.solver": (
        "replays the steps that were sampled, and the ratio of two policies is known only for "
        "steps of first order"
    ),
    "sample.cached_steps": (
        "replays the steps that were sampled, and a predicted velocity is not the policy's"
    ),
}


def check_keys(coupled: bool, train: Any, sample: Any) -> None:
    """Raise ValueError with a line for each key that contradicts `config.train.loss`.

    coupled: whether the objective replays the sampled steps.
    """
    loss = train.loss
    reasons = {
        f"train.{section}": f"which config.train.loss {section!r} reads, but not {loss!r}"
        for section in SECTIONS
        if section != loss
    }
    if coupled:
        reasons |= {key: f"but {loss!r} {reason}" for key, reason in OF_DECOUPLED.items()}
    else:
        reason = f"but {loss!r} samples without noise and has no window"
        reasons |= dict.fromkeys(OF_COUPLED, reason)

    problems = []
    if sample.same_latent and not coupled:
        problems.append(
            f"config.sample.same_latent is True, but {loss!r} samples without noise, so that all "
            "pictures of a prompt would be the same"
        )
    # Imported here: benchmarks/flux_gpu.py runs where ml_collections is not installed.
    from realgen_jax.config import base

    config = {"train": train, "sample": sample}
    defaults = base()
    for key, reason in reasons.items():
        problems += _unexpected(key, _value(config, key), _value(defaults, key), reason)
    if problems:
        raise ValueError("\n".join(problems))


def _value(config: Any, key: str) -> Any:
    """The value of a key such as "train.nft.mix"."""
    for name in key.split("."):
        config = config[name]
    return config


def _unexpected(key: str, value: Any, default: Any, reason: str) -> list[str]:
    """Lines about a key, or about the keys of a section, that do not have their defaults."""
    if hasattr(default, "items"):
        lines = []
        for name in default:
            lines += _unexpected(f"{key}.{name}", value[name], default[name], reason)
        return lines
    if value == default or (isinstance(default, tuple) and tuple(value) == default):
        return []
    return [f"config.{key} is {value!r}, {reason}; expected {default!r}"]
