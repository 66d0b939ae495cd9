"""Sets up the rewards of a run from its config: checks, devices, loading. Never imports jax.

`reward` is config.reward throughout; realgen_jax/config.py explains its keys.
"""

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from reward_bridge.adversary import Adversary
from reward_bridge.adversary_settings import Settings
from reward_bridge.bridge import RewardBridge
from reward_bridge.devices import check_room, reserve, resolve
from reward_bridge.learners import LEARNERS, make_learner
from reward_bridge.metrics import METRICS, Metric, make_metric
from reward_bridge.references import References
from reward_bridge.registry import CLASS, check_interface, check_packages, find_class
from reward_bridge.rewards import REWARDS, make_reward
from reward_bridge.weights import expand_home

# With this suffix, a name in `reward.held_out` is the frozen copy of a reward that learns.
AT_START = "_at_start"

# Options of rewards that name files or folders.
FILE_OPTIONS = ("base", "clip", "path", "prompts", "tokenizer")

# Columns of a run's records that are not the scores of a single reward.
COLUMNS = ("reward", "prompt_std")


@dataclass(frozen=True)
class Rewards:
    """A run's rewards, loaded."""

    bridge: RewardBridge
    learning: dict[str, Adversary]  # the bridge's rewards that learn
    metrics: dict[str, Metric]


# -- Checks, before anything is loaded


def reward_problems(reward: ConfigDict, extra_names: Sequence[str] = ()) -> list[str]:
    """Everything that is wrong with a training run's rewards, one line per problem.

    extra_names: rewards that the run needs besides those it trains on and holds out.
    """
    names = run_rewards(reward)
    problems = []
    twice = sorted(set(reward.fn) & set(reward.held_out))
    if twice:
        problems.append(
            f"{', '.join(twice)}: both in config.reward.fn (trained on) and in "
            "config.reward.held_out; choose one"
        )
    odd = [name for name in names if name in COLUMNS or not re.fullmatch(r"[\w-]+", name)]
    if odd:
        problems.append(
            f"{', '.join(map(repr, odd))} cannot be the name of a reward; expected letters, "
            f"digits, '-' and '_', and none of {', '.join(COLUMNS)}"
        )
    problems += _learning_problems(reward)
    loaded = [name for name in names if original(name, reward) is None]
    problems += missing_rewards(reward, [*loaded, *extra_names])
    problems += _device_problems(reward)

    unknown_metrics = [name for name in reward.metrics if name not in METRICS]
    if unknown_metrics:
        problems.append(
            f"config.reward.metrics: there is no metric {', '.join(unknown_metrics)}; choose from "
            f"{', '.join(sorted(METRICS))}"
        )
    return problems


def run_rewards(reward: ConfigDict) -> list[str]:
    """All rewards of a training run by name: trained on, watched and held out, each once."""
    return list(dict.fromkeys([*reward.fn, *reward.watched, *reward.held_out]))


def negative_problems(reward: ConfigDict) -> list[str]:
    """A line if trained rewards, by their classes, can score far below 0 (no logarithm)."""
    options = reward.options.to_dict()
    named = []
    for name in reward.fn:
        with contextlib.suppress(ValueError):  # `missing_rewards` tells
            made = find_class("reward", name, REWARDS, options.get(name, {}))
            if getattr(made, "can_be_negative", False):
                named.append(name)
    if not named:
        return []
    return [
        "config.train.advantages is 'paco', which needs scores above -1 with a positive mean, but "
        f"those of {', '.join(named)} can be negative; expected other advantages or rewards"
    ]


def original(name: str, reward: ConfigDict) -> str | None:
    """The trained reward whose frozen copy `name` is, NAME for "NAME_at_start", or None."""
    base = name.removesuffix(AT_START)
    is_copy = base != name and name in reward.held_out and base in reward.fn
    return base if is_copy else None


def missing_rewards(reward: ConfigDict, names: Sequence[str]) -> list[str]:
    """What these rewards lack, one line per problem: weight files, and classes for their names."""
    options = reward.options.to_dict()
    problems = []
    unknown_rewards = []
    unknown_learners = []
    for name in dict.fromkeys(names):
        reward_options = options.get(name, {})
        if "servers" in reward_options:  # checked by its servers
            continue
        problems += _missing_files(name, reward_options)

        if name in reward.adversarial:
            own_options = learner_options(reward, name)
            if CLASS in own_options:
                problems += _class_problems("learner", name, own_options)
            elif name not in LEARNERS:
                unknown_learners.append(name)
        elif CLASS in reward_options or name in REWARDS:
            problems += _class_problems("reward", name, reward_options)
        else:
            unknown_rewards.append(name)

    if unknown_rewards:
        problems.append(
            f"there is no reward {', '.join(unknown_rewards)}; choose from "
            f"{', '.join(sorted(REWARDS))}, or name a class of your own: "
            f"config.reward.options.NAME = {{'{CLASS}': 'package.module:Class'}}"
        )
    if unknown_learners:
        problems.append(
            f"config.reward.adversarial: there is no learner {', '.join(unknown_learners)}; choose "
            f"from {', '.join(sorted(LEARNERS))}"
        )
    return problems


def _learning_problems(reward: ConfigDict) -> list[str]:
    """What is wrong with config.reward.adversarial."""
    problems = []
    for name, settings in reward.adversarial.items():
        if name not in reward.fn:
            problems.append(
                f"config.reward.adversarial has {name}, which is not trained on (config.reward.fn)"
            )
        if "servers" in reward.options.get(name, {}):
            problems.append(
                f"{name} is computed by servers and cannot learn; remove it from "
                "config.reward.adversarial, or its servers from config.reward.options"
            )
        try:
            rests = Settings.read(name, settings.to_dict()).always_rests()
        except ValueError as error:
            problems.append(str(error))
            continue
        if rests:
            problems.append(
                f"config.reward.adversarial.{name}: it learns in every epoch (learn_epochs "
                f"{settings.learn_epochs}, cycle {settings.cycle}), and with skip_generator the "
                "generator would never be trained; expected learn_epochs below cycle"
            )

    for name in reward.held_out:
        base = original(name, reward)
        if base is not None and base not in reward.adversarial:
            problems.append(
                f"config.reward.held_out has {name}, the frozen copy of a reward that learns, but "
                f"{base} does not learn (config.reward.adversarial)"
            )
    return problems


def _device_problems(reward: ConfigDict) -> list[str]:
    """Why the rewards cannot run on the devices in the config, if so."""
    try:
        reward_devices(reward)
        resolve(reward.device)
    except ValueError as error:
        return [str(error)]
    return []


def encoder_problems(device: str, reward: ConfigDict) -> list[str]:
    """Why resident text encoders cannot run on `device` (config.prompts.device), if so.

    On a GPU without rewards they would meet JAX, which claims most of its memory.
    """
    used = {resolve(reward.device), *reward_devices(reward).values()}
    wanted = resolve(device)
    if not wanted.startswith("cuda") or wanted in used or reward.share_gpu:
        return []
    return [
        f"config.prompts.device is {device!r}, a GPU that trains; expected that of a reward "
        f"({', '.join(sorted(used))}), where the text encoders stay during the run, or "
        "config.reward.share_gpu=True"
    ]


def _missing_files(name: str, options: Mapping[str, Any]) -> list[str]:
    problems = []
    for option in FILE_OPTIONS:
        file = options.get(option)
        if file and not expand_home(file).exists():
            problems.append(
                f"config.reward.options.{name}.{option} is {file!r}, which does not exist; "
                "docs/rewards.md says where the weights come from"
            )
    return problems


def _class_problems(kind: str, name: str, options: Mapping[str, Any]) -> list[str]:
    """Why the class of a reward or learner cannot be used, if so."""
    try:
        made = find_class(kind, name, REWARDS, options)
        if CLASS in options:
            check_interface(made, kind, name)
        check_packages(made, name)
    except ValueError as error:
        return [str(error)]
    return []


# -- Devices


def reward_devices(reward: ConfigDict, names: Sequence[str] | None = None) -> dict[str, str]:
    """The torch device of each of these rewards (default: those of the run).

    A reward runs on its device in `reward.devices`, else on `reward.device`; a frozen copy runs
    where its original does. The default for a remote reward is the CPU. Raises ValueError for a
    device that does not exist, and for a name in `reward.devices` that is not among the rewards.
    """
    run_names = run_rewards(reward)
    if names is None:
        names = run_names
    unknown = sorted(set(reward.devices) - {*run_names, *names})
    if unknown:
        raise ValueError(
            f"config.reward.devices has {', '.join(unknown)}, not among this run's rewards "
            f"({', '.join(dict.fromkeys([*run_names, *names]))})"
        )

    devices = {}
    for name in names:
        name_of_device = original(name, reward) or name
        is_remote = "servers" in reward.options.get(name, {})
        default = "cpu" if is_remote else reward.device
        devices[name] = resolve(reward.devices.get(name_of_device, default))
    return devices


# -- Loading


def open_rewards(
    reward: ConfigDict,
    names: Sequence[str] | None = None,
    *,
    prompts: Sequence[str] = (),
    hide_from_jax: Callable[[str], None],
    jax_platforms: str | None,
    meet: Callable[[Sequence[str]], Mapping[str, Any]] | None = None,
    load: bool = True,
) -> Rewards:
    """Load rewards and start their bridge. Call this before JAX starts.

    JAX claims its share of the memory when it starts, so the rewards are loaded first, and JAX is
    kept off their GPUs.

    names: the rewards to load, frozen. None: those of a training run, which are `run_rewards`
        and `reward.metrics`. The ones in `reward.adversarial` learn.
    prompts: the training prompts, for the reference pictures of rewards that learn.
    hide_from_jax: called with the GPUs that JAX may see ("0,1,2") if it may not see all of them.
        It sets jax_cuda_visible_devices.
    jax_platforms: jax.config.jax_platforms.
    meet: for multi-process training. `meet(names)` returns the torch.distributed group of each
        reward that learns; see `join` in reward_bridge/adversary.py.
    load: False only keeps JAX off the GPUs, for processes that leave the scoring to another one.

    Raises ValueError or OSError for what the user can correct.
    """
    training = names is None
    devices = reward_devices(reward, names)
    metrics_device = resolve(reward.device)

    # Divide the GPUs between JAX and the rewards.
    used = set(devices.values())
    if training and reward.metrics:
        used.add(metrics_device)
    allotment = reserve(used, jax_platforms, reward.share_gpu)
    if allotment.visible is not None:
        hide_from_jax(allotment.visible)

    # Load the learning rewards, the frozen rewards and the metrics.
    learning: dict[str, Adversary] = {}
    rewards: dict[str, Any] = {}
    metrics: dict[str, Metric] = {}
    if load:
        if training:
            learning = _make_adversaries(reward, devices, prompts, meet)
        rewards = _make_rewards(reward, devices, learning)
    if load and training:
        metrics = _make_metrics(reward, metrics_device)

    # Check that JAX will find the memory that it claims when it starts.
    for device in sorted(allotment.shared):
        check_room(device)

    bridge = RewardBridge(
        rewards,
        devices,
        deadline=reward.deadline,
        retries=reward.retries,
        batch_size=reward.batch_size,
    )
    return Rewards(bridge, learning, metrics)


def _make_adversaries(
    reward: ConfigDict,
    devices: Mapping[str, str],
    prompts: Sequence[str],
    meet: Callable[[Sequence[str]], Mapping[str, Any]] | None,
) -> dict[str, Adversary]:
    """Build the rewards in `reward.adversarial`. Multi-process runs average gradients."""
    if not reward.adversarial:
        return {}

    # Settings and pictures are checked before weights are loaded.
    settings = {}
    for name, values in reward.adversarial.to_dict().items():
        settings[name] = Settings.read(name, values)
    references = References(reward.references.path, reward.references.root, prompts)

    groups = meet(list(settings)) if meet is not None else {}
    adversaries = {}
    for name in settings:
        learner = make_learner(name, devices[name], learner_options(reward, name))
        adversaries[name] = Adversary(
            name, learner, settings[name], references, devices[name], groups.get(name)
        )
    return adversaries


def _make_rewards(
    reward: ConfigDict, devices: Mapping[str, str], learning: Mapping[str, Adversary]
) -> dict[str, Any]:
    """All rewards by name, in the order of `devices`; the frozen ones are loaded here."""
    options = reward.options.to_dict()
    rewards = {}
    for name, device in devices.items():
        base = original(name, reward)
        if name in learning:
            rewards[name] = learning[name]
        elif base is not None:
            rewards[name] = learning[base].frozen_copy()
        else:
            rewards[name] = make_reward(name, device, options.get(name, {}))
    return rewards


def _make_metrics(reward: ConfigDict, device: str) -> dict[str, Metric]:
    options = reward.options.to_dict()
    return {name: make_metric(name, device, options.get(name, {})) for name in reward.metrics}


def learner_options(reward: ConfigDict, name: str) -> dict[str, Any]:
    """The options of a reward that learns: the frozen reward's, overridden by its own."""
    options = reward.options.to_dict().get(name, {})
    return {**options, **reward.adversarial.to_dict()[name].get("options", {})}
