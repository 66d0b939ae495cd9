"""Every key of a config has a range; values outside are refused in one line."""

import copy
import math

import pytest
from ml_collections import ConfigDict

from realgen_configs import (
    flux_grpo,
    flux_objectives,
    sd3_grpo,
    serve_rewards,
    small_cards,
    zimage_grpo,
)
from realgen_jax.config import adversary, base
from realgen_jax.config_ranges import ADVERSARY, RANGES, SERVER_RANGES, wrong_values
from realgen_jax.nn.lora import INITS
from realgen_jax.nn.stack import REMAT_POLICIES
from realgen_jax.objectives.awm import KL_WEIGHTS, WEIGHTINGS
from realgen_jax.objectives.decoupled import DRAWS
from realgen_jax.objectives.grpo import KLS
from realgen_jax.objectives.nft import ADVANTAGES
from realgen_jax.rollout import SOLVERS
from realgen_jax.sde import NOISE_SCHEDULES, STOCHASTIC_STEPS
from realgen_jax.selection import SELECTIONS
from realgen_jax.windows import STAYS


def keys(config, prefix=""):
    """The keys of a config; "*" stands for the names in mappings that have none yet."""
    found = set()
    for name, value in config.items():
        if not isinstance(value, ConfigDict):
            found.add(prefix + name)
        elif prefix + name == "reward.adversarial":
            found |= keys(adversary(), f"{prefix}{name}.*.")
        elif len(value):
            found |= keys(value, f"{prefix}{name}.")
        elif name == "options" and prefix.endswith("*."):
            found.add(prefix + name)
        else:
            found.add(f"{prefix}{name}.*")
    return found


def test_every_key_has_a_range():
    assert keys(base()) == set(RANGES)
    assert keys(serve_rewards.base()) == set(SERVER_RANGES)


@pytest.mark.parametrize("module", [flux_grpo, flux_objectives, sd3_grpo, small_cards, zimage_grpo])
def test_shipped_configs_are_in_range(module):
    for name in module.PRESETS:
        assert wrong_values(module.get_config(name)) == [], name


@pytest.mark.parametrize("name", serve_rewards.PRESETS)
def test_shipped_servers_are_in_range(name):
    assert wrong_values(serve_rewards.get_config(name), SERVER_RANGES) == []


BASE = base().to_dict()
BASE["reward"]["adversarial"] = {"x": adversary().to_dict()}


def config_with(key, value):
    """`base()` with any value at a key; for "*", with one reward or prompt set."""
    config = copy.deepcopy(BASE)
    *parents, name = key.replace("*", "x").split(".")
    section = config
    for parent in parents:
        section = section[parent]
    section[name] = value
    return ConfigDict(config)


# Values of a wrong type, and numbers that are out of place everywhere.
ODD = (None, "no such choice / ", True, 2.5, -7, 10**12, math.nan, math.inf, (), (1.5, 2), {"a": 1})


@pytest.mark.parametrize("key", RANGES)
def test_a_refusal_names_key_value_and_what_is_allowed(key):
    refused = 0
    for value in ODD:
        problems = wrong_values(config_with(key, value))
        if problems:
            name = f"config.{key.replace('*', 'x')}"
            assert problems == [f"{name} is {value!r}; expected {RANGES[key].words}"]
            refused += 1
    assert refused >= 5


@pytest.mark.parametrize("key", [key for key in RANGES if "options" not in key])
def test_nan_infinity_and_none_are_never_allowed(key):
    for value in (None, math.nan, math.inf, -math.inf, (math.nan,)):
        assert not RANGES[key].holds(value)


# {key: (values that are allowed, values that are not)}
EDGES = {
    "preset": (["mine", "a-b_c.d"], ["", "a/b"]),
    "run_name": (
        ["", "exp[lora]", "two words", "ü"],
        ["../x", "a/b", ".", "..", " x", "a\nb", "x" * 201],
    ),
    "run_root": (["runs"], [""]),
    "seed": ([0, 2**32 - 1], [-1, 2**32, 1.0]),
    "num_epochs": ([0, 1], [-1]),
    "num_checkpoint_limit": ([1], [0, -1]),
    "save_freq": ([1], [0]),
    "eval_freq": ([1], [0]),
    "preemption_grace": ([0, 25.0], [-1.0]),
    "profile.steps": ([(), (3, 5)], [(0,), (2.0,), 3, ("3",)]),
    "mesh.data": ([-1, 1, 8], [0, -2]),
    "preflight.mfu": ([0.4, 1], [0.0, 1.1]),
    "prompts.cache": (["x"], [""]),
    "prompts.device": (["auto", "cpu", "cuda", "cuda:3"], ["gpu", "cuda:", "cuda:-1"]),
    "sample.num_image_per_prompt": ([2], [1, 0]),
    "sample.test_images_per_prompt": ([1], [0]),
    "sample.noise_level": ([0.1], [0, -0.5]),
    "sample.noise_least": ([0, 0.1], [-0.1]),
    "sample.guidance_scale": ([0, 3.5], [-1]),
    "evaluate.sample.guidance_scale": ([0, 3.5], [-1]),
    "evaluate.sample.width": ([1024], [0, 512.0]),
    "evaluate.sample.num_steps": ([1], [0]),
    "sample.buckets": (
        [(), ((512, 512), (768, 512)), [[64, 64]]],
        [(64, 64), ((64,),), ((0, 64),), 64],
    ),
    "evaluate.sample.tuned_share": ([0.5, 1], [0, 1.1]),
    "train.cfg_gradient": (["", "both", "bound"], ["none"]),
    "sample.sde_window_range": ([(0, 1), [2, 5]], [(1, 1), (3, 1), (-1, 2), (0,), (0, 1, 2)]),
    "sample.sde_window.stride": ([0, 1], [-1]),
    "sample.sde_window.epochs": ([1], [0]),
    "sample.sde_window.trained_steps": ([0, 3], [-1]),
    "sample.sde_window.after": ([0, 0.4, 1], [-0.1, 1.1]),
    "train.dppo.threshold": ([1e-7], [0.0]),
    "train.nft.mix": ([0.1], [0.0, -1.0]),
    "train.nft.sigmas": ([1], [0]),
    "train.nft.fraction": ([0.5, 1], [0, 1.5]),
    "train.nft.least_sigma": ([0, 0.3], [1, -0.1]),
    "train.nft.old_most": ([0, 0.999], [1.0]),
    "train.awm.beta_ema": ([0, 1.0], [-0.1]),
    "train.awm.old_rate": ([0, 0.001], [-0.001]),
    "train.lora_rank": ([1], [0]),
    "train.lora_alpha": ([0.5], [0.0]),
    "train.learning_rate": ([1e-9], [0.0, -1e-4]),
    "train.max_grad_norm": ([1.0], [0.0]),
    "train.clip_range": ([1e-6], [0.0]),
    "train.adv_clip_max": ([5], [0.0]),
    "train.beta": ([0, 0.1], [-0.1]),
    "train.norm_guard.weight": ([0, 0.1], [-0.1]),
    "train.norm_guard.limit": ([1], [0.0]),
    "train.kl_gate.share": ([0.1, 1], [0, 1.1]),
    "train.ema_decay": ([0, 0.99], [1, 1.0, -0.1]),
    "train.adam_beta2": ([0.999], [1.0]),
    "train.num_inner_epochs": ([1], [0]),
    "reward.fn.*": ([1, 0.5, -2.0], [0, 0.0, "1"]),
    "reward.held_out": ([(), ("a", "b"), ["a"]], [("a", "a"), "a", (1,), ("",)]),
    "reward.options.*": ([{}, {"path": "x", "n": {"m": (1, 2.0)}}], [1, {"a": {"b": (math.nan,)}}]),
    "reward.batch_size": ([0], [-1]),
    "reward.retries": ([0], [-1]),
    "reward.deadline": ([0.1], [0]),
    "reward.adversarial.*.betas": ([(0, 0.9), [0.5, 0.999]], [(0.9,), (0.9, 1.0)]),
    "reward.adversarial.*.quality": ([95], [0, 96]),
    "reward.adversarial.*.target_accuracy": ([0, 1.1], [-0.1]),
    "evaluate.confidence": ([0.95], [0, 1.0, 95]),
    "evaluate.arena.port": ([0, 65535], [-1, 65536]),
}


@pytest.mark.parametrize("key", EDGES)
def test_the_edges_of_a_range(key):
    allowed, refused = EDGES[key]
    assert [value for value in allowed if wrong_values(config_with(key, value))] == []
    assert [value for value in refused if not wrong_values(config_with(key, value))] == []


def test_sections_and_missing_keys_are_named():
    assert wrong_values(config_with("train", 3)) == [
        "config.train is 3; expected a mapping, such as {'clip_score': 1.0}"
    ]
    config = base().unlock()
    del config.train.beta
    assert wrong_values(config) == [
        "config.train.beta is missing; expected a finite number, 0 or more"
    ]
    problems = wrong_values(config_with("reward.adversarial.*", {}))
    assert [line.split(" is missing")[0].split(".")[-1] for line in problems] == list(ADVERSARY)


@pytest.mark.parametrize(
    ("key", "table"),
    [
        ("sample.sde_type", STOCHASTIC_STEPS),
        ("sample.noise_schedule", NOISE_SCHEDULES),
        ("sample.solver", SOLVERS),
        ("sample.scout.solver", SOLVERS),
        ("sample.scout.select", SELECTIONS),
        ("evaluate.sample.solver", SOLVERS),
        ("sample.sde_window.strategy", ["random", *STAYS]),
        ("train.nft.advantages", ADVANTAGES),
        ("train.nft.draw", DRAWS),
        ("train.awm.draw", DRAWS),
        ("train.awm.weighting", WEIGHTINGS),
        ("train.awm.kl_weight", KL_WEIGHTS),
        ("train.kl", KLS),
        ("train.lora_init", INITS),
        ("pretrained.remat", REMAT_POLICIES),
    ],
)
def test_choices_are_those_that_are_looked_up(key, table):
    assert all(RANGES[key].holds(name) for name in table)
    assert RANGES[key].words == f"one of {', '.join(table)}"


def test_choices_of_rewards_that_learn():
    pytest.importorskip("torch")
    from reward_bridge.adversary_settings import OPTIMIZERS, SCHEDULES

    assert ADVERSARY["schedule"].words == f"one of {', '.join(SCHEDULES)}"
    assert ADVERSARY["optimizer"].words == f"one of {', '.join(OPTIMIZERS)}"
