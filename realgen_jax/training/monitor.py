"""What judges a run: the figure that `best/`, the alarms and the early stop go by.

The trained reward does that as long as it stays the same. A reward that learns does not: it falls
as it gets better at its task, and rises as the generator does. Such a run is judged by held-out
rewards and metrics, which nothing changes.

Also how exact the ratios of a run must be. Needs neither JAX nor PyTorch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

AUTO = "auto"
REWARD = "reward"  # the weighted mean of the trained rewards, in evaluations

RATIO_SHARE = 0.1  # of a clip range, which rounding may take up


def monitored(reward: Mapping[str, Any], metrics: Sequence[str]) -> str:
    """Return the figure's name: `reward`, or that of a held-out reward or a metric.

    With `monitor` at auto, a run whose rewards learn goes by its first held-out reward, or else by
    its first metric. reward: config.reward; metrics: those of `reward.metrics` that are computed.
    """
    if reward["monitor"] != AUTO:
        return reward["monitor"]
    fixed = [*reward["held_out"], *metrics]
    return fixed[0] if reward["adversarial"] and fixed else REWARD


def is_better(name: str, value: float, best: float, reward: Mapping[str, Any]) -> bool:
    """Return whether a value is better than the best so far; a metric is better if it is lower."""
    return value < best if name in reward["metrics"] else value > best


def monitor_problems(reward: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the keys about monitoring, one line per problem."""
    problems = []
    choices = [AUTO, REWARD, *reward["held_out"], *reward["metrics"]]
    if reward["monitor"] not in choices:
        problems.append(
            f"config.reward.monitor is {reward['monitor']!r}; choose auto, reward, or a name in "
            f"config.reward.held_out or config.reward.metrics: {', '.join(choices)}"
        )
    by_metric = monitored(reward, reward["metrics"]) in reward["metrics"]
    if reward["stop_patience"] > 0 and not reward["held_out"] and not by_metric:
        problems.append(
            f"config.reward.stop_patience is {reward['stop_patience']}, but there is nothing to "
            "stop by: config.reward.held_out is empty, and config.reward.monitor is no metric"
        )
    return problems


def ratio_limit(config: Mapping[str, Any]) -> tuple[float, str]:
    """Return how far ratios may be from 1 before any step, and the key of the config it is from.

    Rounding may take up a tenth of what clips ratios, or drops pictures. config: of a run with an
    objective that has ratios.
    """
    train = config["train"]
    if config["stage"] == "rewriter":
        return RATIO_SHARE * config["rewriter"]["clip_range"][0], "rewriter.clip_range"
    if train["loss"] == "dppo":
        # A ratio r takes a divergence of at least (r - 1)^2 / 2, by the Cauchy-Schwarz inequality.
        limit = (2.0 * RATIO_SHARE * train["dppo"]["threshold"]) ** 0.5
        return limit, "train.dppo.threshold"
    return RATIO_SHARE * train["clip_range"], "train.clip_range"


def warn_of_deviation(log: Any, steps: Sequence[Mapping[str, Any]], config: Any) -> None:
    """Warn if replay on unchanged weights is inexact because the hardware picks other kernels.

    steps: the metrics of the first optimizer steps.
    """
    if not steps or "ratio_deviation" not in steps[0]:
        return
    deviation = float(steps[0]["ratio_deviation"])
    limit, key = ratio_limit(config)
    if deviation > limit:
        log.warn(
            f"on unchanged weights a ratio is {deviation:.1e} away from 1, but config.{key} "
            f"allows for {limit:.1e}: set --config.train.recompute_old=True"
        )
