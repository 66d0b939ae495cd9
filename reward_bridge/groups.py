"""Rewards that compare the pictures of a prompt with each other, and where they can run."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from reward_bridge.registry import find_class
from reward_bridge.reward import GroupReward, RewardError
from reward_bridge.rewards import REWARDS


def groupwise(reward: ConfigDict, names: Iterable[str]) -> list[str]:
    """Return which of these rewards compare pictures. reward: config.reward. Nothing is loaded."""
    options = reward.options.to_dict()
    compared = []
    for name in names:
        own = options.get(name, {})
        if name in reward.adversarial or "servers" in own:
            continue
        try:
            made = find_class("reward", name, REWARDS, own)
        except ValueError:  # `missing_rewards` tells
            continue
        if hasattr(made, "score_groups"):
            compared.append(name)
    return compared


def group_problems(reward: ConfigDict, sample: ConfigDict, processes: int = 1) -> list[str]:
    """Return one line for each place where a run's reward would not see whole groups.

    reward: config.reward. sample: config.sample. processes: each scores its own part of a batch.
    """
    problems = []
    compared = groupwise(reward, dict.fromkeys([*reward.fn, *reward.watched]))
    part = sample.train_batch_size // processes
    if compared and part % sample.num_image_per_prompt:
        problems.append(
            f"{', '.join(compared)}: compares the pictures of a prompt, but a call's "
            f"{part} pictures (config.sample.train_batch_size, of each process) are not whole "
            f"groups of {sample.num_image_per_prompt} (config.sample.num_image_per_prompt)"
        )
    previews = sample.scout.previews
    if compared and previews and part % previews:
        problems.append(
            f"{', '.join(compared)}: compares the pictures of a prompt, but a call's {part} "
            f"pictures (config.sample.train_batch_size, of each process) are not all {previews} "
            "previews of one prompt or several (config.sample.scout.previews)"
        )

    compared = groupwise(reward, dict.fromkeys([*reward.fn, *reward.held_out]))
    copies = sample.test_images_per_prompt
    part = sample.test_batch_size // processes
    if compared and (copies < 2 or part % copies):
        problems.append(
            f"{', '.join(compared)}: compares the pictures of a prompt, but "
            f"config.sample.test_images_per_prompt is {copies}; expected 2 or more, dividing the "
            f"{part} pictures of an evaluation's call (config.sample.test_batch_size, of each "
            "process), or the reward only in config.reward.watched"
        )

    return problems


def report_problems(reward: ConfigDict, scores: Sequence[str]) -> list[str]:
    """Return a line if a report is to score with rewards that compare pictures: it has no groups.

    reward: config.reward. scores: config.evaluate.scores.
    """
    compared = groupwise(reward, scores)
    if not compared:
        return []
    return [
        f"config.evaluate.scores has {', '.join(compared)}, which compares the pictures of a "
        "prompt; expected rewards that score each picture alone"
    ]


def check_served(name: str, reward: Any) -> None:
    """Raise ValueError for a reward that a server cannot score, since requests have no groups."""
    if isinstance(reward, GroupReward):
        raise ValueError(
            f"the reward {name!r} compares the pictures of a prompt, which servers do not know; "
            "compute it in the trainer"
        )


def check_groups(name: str, prompts: Sequence[str], size: int) -> None:
    """Raise RewardError unless `prompts` are groups of `size` equal ones, 2 or more each."""
    whole = size > 1 and len(prompts) % size == 0
    if whole:
        firsts = [prompts[number - number % size] for number in range(len(prompts))]
        whole = firsts == list(prompts)
    if not whole:
        raise RewardError(
            f"reward {name!r} compares the pictures of a prompt, and was handed {len(prompts)} "
            f"pictures that are not whole groups of {size}; expected 2 or more in a row per prompt"
        )


def win_rates(outcome: np.ndarray) -> np.ndarray:
    """Return the share of its n - 1 comparisons that each of n pictures has won: [..., n].

    outcome: [..., n, n]; above the diagonal 1 if the row's picture beats the column's, 0 if it
    loses, 0.5 if undecided. The rest is not read. Source: CodeGoat24/Pref-GRPO, which also
    rounds to three decimals.
    """
    outcome = np.asarray(outcome, np.float64)
    count = outcome.shape[-1]
    above = np.triu(np.ones((count, count)), 1)
    wins = outcome * above + np.swapaxes((1.0 - outcome) * above, -1, -2)
    return wins.sum(axis=-1) / (count - 1)
