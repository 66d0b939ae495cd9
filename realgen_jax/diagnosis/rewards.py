"""Checks on rewards: the composition of the advantages, and how held-out metrics change."""

import numpy as np

from realgen_jax.advantages import SCALE_FREE
from realgen_jax.diagnosis.finding import FINE, NOTE, PROBLEM, Figure, Finding
from realgen_jax.diagnosis.metrics import Metrics, NotRecorded, span
from realgen_jax.training.monitor import REWARD

# Groups without spread give no gradient (DAPO, arXiv 2503.14476, section 3.2). If half of the
# groups have none, half of the batch is wasted; if a fifth have none, the gradient's noise has
# grown by a tenth, 1 / sqrt(0.8).
NO_SPREAD = 0.5
NO_SPREAD_NOTE = 0.2

# group_advantages divides by a group's standard deviation plus this.
ADVANTAGE_EPS = 1e-4

# Share of a reward in the advantages. A hundredth is lost in sampling noise, 1 / sqrt(n), for any
# batch under 10,000 pictures. A tenth has an effect, but is never decisive.
DROWNED = 0.01
DROWNED_NOTE = 0.1

# Reliability: the share of a score's variance that comes from the picture, 1 - noise^2 / spread^2.
# Below a half, most of what is learned is noise. Test theory asks for 0.8 if a score is used for
# ranking.
UNRELIABLE = 0.5
UNRELIABLE_NOTE = 0.8

# Fall of a held-out reward, as a fraction of its spread over pictures: again a small effect.
# All evaluations use the same noise.
HELD_OUT_FALL = 0.2
# The absolute fall, if no spread was recorded. The same as in train.py.
HELD_OUT_FALL_PLAIN = 0.02

# Metrics for which lower is better. Evaluations of a run that learns nothing stay within 5 % of
# each other, so 1.2 times the first value is a real change. The best value is the luckiest of many,
# so its limit is higher: the Frechet distance of the demo ends at 1.19 times its best.
OVER_FIRST = 1.2
OVER_BEST = 1.5

# A correlation of 0.1 explains 1 % of the variance.
UNRELATED = 0.1


def zero_spread(metrics: Metrics, config: dict) -> Finding:
    """Find groups in which every picture gets the same reward."""
    sample = config["sample"]
    share = metrics.recent("zero_spread")
    figures = [
        Figure("groups without any spread", share, f"<= {NO_SPREAD_NOTE:g}", metrics.recent_epochs)
    ]
    if share <= NO_SPREAD_NOTE:
        return Finding("zero-spread groups", FINE, figures)

    severity = PROBLEM if share > NO_SPREAD else NOTE
    says = (
        f"In {share:.0%} of the groups all pictures get the same score. Their advantages are zero: "
        "they cost as much as the others and teach nothing."
    )
    remedy = (
        "Use a reward with finer steps, prompts that are neither solved nor hopeless, more "
        "pictures per group "
        f"(--config.sample.num_image_per_prompt={2 * sample['num_image_per_prompt']}) or more "
        f"noise (--config.sample.noise_level={1.2 * sample['noise_level']:.2g})."
    )
    return Finding("zero-spread groups", severity, figures, says, remedy)


def advantages_of(config: dict) -> str:
    """Return config.train.advantages, which older runs lack."""
    return config["train"].get("advantages", "per_reward")


def is_scale_free(config: dict) -> bool:
    """Return whether each reward is normalised on its own before they are added."""
    return advantages_of(config) in SCALE_FREE


def shares(metrics: Metrics, config: dict) -> dict[str, float]:
    """Return each reward's share of the combined advantage; empty if no reward has any spread.

    If each reward is normalised on its own, its share is proportional to its weight times
    std / (std + eps) in the groups where it has some spread, and zero in the others: the scale of
    its scores does not matter. If the rewards are added first, it is proportional to weight times
    std. Empty for `pareto`, which adds nothing.
    """
    if advantages_of(config) == "pareto":
        return {}
    parts = {}
    for name, weight in config["reward"]["fn"].items():
        if not weight:
            continue
        with_spread = 1.0 - metrics.recent(f"zero_spread/{name}")
        std = 0.0
        if with_spread > 0:
            std = metrics.recent(f"reward_std/{name}") / with_spread
        scale = std + ADVANTAGE_EPS if is_scale_free(config) else 1.0
        parts[name] = abs(weight) * with_spread * std / scale

    total = sum(parts.values())
    if total <= 0:
        return {}
    return {name: part / total for name, part in parts.items()}


def drowned_reward(metrics: Metrics, config: dict) -> Finding | None:
    """Check the reward that contributes least to the advantages."""
    weights = config["reward"]["fn"]
    reward_shares = shares(metrics, config)
    if len(reward_shares) < 2:
        return None

    name = min(reward_shares, key=reward_shares.get)
    share = reward_shares[name]
    by_weight = abs(weights[name]) / sum(map(abs, weights.values()))
    std = metrics.recent(f"reward_std/{name}")
    without_spread = metrics.recent(f"zero_spread/{name}")
    recent = metrics.recent_epochs
    figures = [
        Figure(f"{name}: share of the advantages", share, f">= {DROWNED_NOTE:g}", recent),
        Figure(f"{name}: share of the weights", by_weight, "", recent),
        Figure(f"{name}: spread within a group", std, f"far above {ADVANTAGE_EPS:g}", recent),
        Figure(f"{name}: groups without spread", without_spread, f"<= {NO_SPREAD_NOTE:g}", recent),
    ]
    if share >= DROWNED_NOTE:
        return Finding("one reward drowning the others", FINE, figures[:1])

    # Either its weight or its spread is too small.
    says = f"{name} makes up {share:.2%} of the advantages; the other rewards decide alone."
    if not is_scale_free(config):
        says += (
            f" config.train.advantages={advantages_of(config)} adds the rewards as they are, and "
            f"the spread of this one is small ({std:.2g})."
        )
        remedy = "Set --config.train.advantages=per_reward, or raise its weight."
    elif share > 0.5 * by_weight:
        says += " Each reward is divided by its own spread, so the weights are the cause."
        largest = np.copysign(max(map(abs, weights.values())), weights[name])
        remedy = f"Set --config.reward.fn.{name}={largest:g}, the largest weight, or drop it."
    else:
        says += (
            f" Its weight would give it {by_weight:.2%}, but its spread ({std:.2g}; none at all in "
            f"{without_spread:.0%} of the groups) vanishes beside the {ADVANTAGE_EPS:g} that is "
            "added before the division."
        )
        remedy = "Scale its scores up in the reward's code, use a finer reward, or drop it."
        if without_spread == 1:
            remedy = "It is the same for all pictures of a group: check its options, or drop it."
    severity = PROBLEM if share < DROWNED else NOTE
    return Finding("one reward drowning the others", severity, figures, says, remedy)


def reward_noise(metrics: Metrics, config: dict) -> Finding | None:
    """Check the least reliable reward: how much it differs between two scorings of one picture.

    The noise is compared to the spread within a group, which is what the reward has to tell apart.
    """
    reliabilities = {}
    noises = {}
    for name in config["reward"]["fn"]:
        _, values = metrics.series(f"noise/{name}", "eval")
        spread = metrics.recent(f"reward_std/{name}")
        if spread > 0:
            noises[name] = float(np.median(values))
            reliabilities[name] = max(0.0, 1.0 - (noises[name] / spread) ** 2)
    if not reliabilities:
        return None

    name = min(reliabilities, key=reliabilities.get)
    reliability = reliabilities[name]
    noise = noises[name]
    spread = metrics.recent(f"reward_std/{name}")
    evaluations, _ = metrics.series(f"noise/{name}", "eval")
    recent = metrics.recent_epochs
    figures = [
        Figure(f"{name}: reliability", reliability, f">= {UNRELIABLE_NOTE:g}", recent),
        Figure(f"{name}: noise between two scorings", noise, "", span(evaluations)),
        Figure(f"{name}: spread within a group", spread, "", recent),
    ]
    if reliability >= UNRELIABLE_NOTE:
        return Finding("reward noise", FINE, figures[:1])

    severity = PROBLEM if reliability < UNRELIABLE else NOTE
    says = (
        f"{name} gives the same picture different scores: the noise is {noise / spread:.0%} of its "
        "spread within a group. Advantages are divided by that spread, so they are largely noise."
    )
    remedy = (
        "Make the reward deterministic (evaluation mode, no sampling, no dependence on the other "
        "pictures of a batch) or average several scorings. Until then, lower its weight: "
        f"--config.reward.fn.{name}={config['reward']['fn'][name] / 4:g}."
    )
    return Finding("reward noise", severity, figures, says, remedy)


def fall_limit(metrics: Metrics, name: str) -> float:
    """Return how far a held-out reward may fall below its best value, in units of the reward."""
    try:
        _, spreads = metrics.series(f"std/{name}", "eval")
    except NotRecorded:
        return HELD_OUT_FALL_PLAIN
    return HELD_OUT_FALL * float(spreads.max())


def held_out(metrics: Metrics, config: dict) -> Finding:
    """Check held-out rewards and metrics: the last value against the best and the first."""
    reward = config["reward"]
    names = [*reward["held_out"], *reward["metrics"]]
    if not names:
        raise NotRecorded("a check: config.reward.held_out and config.reward.metrics are empty")

    figures = []
    worse = []
    for name in names:
        epochs, values = metrics.series(name, "eval")
        first = values[0]
        last = values[-1]
        if name in reward["metrics"]:  # lower is better
            best = values.min()
            limit = min(OVER_FIRST * first, OVER_BEST * best)
            healthy = f"<= {limit:.3g}"
            is_worse = last > limit
        else:
            best = values.max()
            limit = best - fall_limit(metrics, name)
            healthy = f">= {limit:.3g}"
            is_worse = last < limit
        healthy = f"{healthy}, best {best:.3g}, first {first:.3g}"
        figures.append(Figure(name, float(last), healthy, span(epochs)))
        if is_worse:
            worse.append(name)
    if not worse:
        return Finding("held-out checks", FINE, figures)
    return Finding("held-out checks", PROBLEM, figures, *_worse_checks(metrics, config, worse))


def _worse_checks(metrics: Metrics, config: dict, worse: list[str]) -> tuple[str, str]:
    """Return what is wrong if these checks got worse, and what to do about it."""
    says = f"{', '.join(worse)} got worse, and nothing is trained on that. "
    if metrics.goal != REWARD:
        learning_rate = config["train"]["learning_rate"] / 2
        says += "Rewards that learn should have prevented that; they do not keep up."
        remedy = (
            "Use an earlier checkpoint, let them learn more (config.reward.adversarial), or slow "
            f"the generator down: --config.train.learning_rate={learning_rate:g}."
        )
    elif metrics.improves:
        beta = max(10 * config["train"]["beta"], 1e-3)
        says += (
            "The reward rises, so the model exploits the reward's weaknesses (arXiv 2210.10760)."
        )
        remedy = f"Use an earlier checkpoint, and more KL: --config.train.beta={beta:g}."
    else:
        learning_rate = config["train"]["learning_rate"] / 10
        says += "The reward does not rise either: training damages the pictures."
        remedy = (
            "If no finding above explains it, lower the learning rate: "
            f"--config.train.learning_rate={learning_rate:g}."
        )
    return says, remedy


def held_out_correlation(metrics: Metrics, config: dict) -> Finding | None:
    """Check that the held-out rewards and the trained one agree on which pictures are better."""
    figures = []
    unrelated = []
    for name in config["reward"]["held_out"]:
        # A reward that gives every picture the same score has no correlation.
        _, spreads = metrics.series(f"std/{name}", "eval")
        if spreads[-1] == 0:
            continue

        epochs, values = metrics.series(f"correlation/{name}", "eval")
        healthy = f">= {UNRELATED:g}, first {values[0]:.2g}"
        figures.append(Figure(f"{name} with the reward", float(values[-1]), healthy, span(epochs)))
        if values[-1] < UNRELATED:
            unrelated.append(name)

    if not figures:
        return None
    if not unrelated:
        return Finding("correlation", FINE, figures)
    says = (
        f"{', '.join(unrelated)} prefers other pictures than the trained reward. By that check, a "
        "rising reward is no progress."
    )
    remedy = (
        "Also train on a reward of the same kind as the check (--config.reward.fn.NAME=1.0), or "
        "remove the check if it is not meaningful."
    )
    return Finding("correlation", NOTE, figures, says, remedy)
