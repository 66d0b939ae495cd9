"""Which prompts a run's rewards cannot score, before anything is loaded."""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from reward_bridge.registry import find_class
from reward_bridge.rewards import REWARDS


def prompt_problems(
    reward: ConfigDict, names: Iterable[str], prompts: Mapping[str, Sequence[str]]
) -> list[str]:
    """Return one line for each reward and source with a prompt that the reward cannot score.

    A reward says so with a static method `check_prompt(prompt, options)`, which raises ValueError;
    options are those of the config. Those that learn or are computed by servers are not asked.

    reward: config.reward. prompts: {where they come from: the prompts that are scored}.
    """
    options = reward.options.to_dict()
    problems = []
    for name in dict.fromkeys(names):
        own = options.get(name, {})
        if name in reward.adversarial or "servers" in own:
            continue
        check = None
        with contextlib.suppress(ValueError):  # `missing_rewards` tells
            check = getattr(find_class("reward", name, REWARDS, own), "check_prompt", None)
        if check is None:
            continue

        for source, texts in prompts.items():
            reasons = _reasons(check, texts, own)
            if reasons:
                problems.append(
                    f"{source}: {len(reasons)} of {len(texts)} prompts cannot be scored by "
                    f"{name!r}; {reasons[0]}"
                )
    return problems


def _reasons(
    check: Callable[[str, Mapping[str, Any]], None],
    texts: Sequence[str],
    options: Mapping[str, Any],
) -> list[str]:
    """Why texts cannot be scored, one for each of those."""
    reasons = []
    for text in texts:
        try:
            check(text, options)
        except ValueError as error:
            reasons.append(str(error))
    return reasons
