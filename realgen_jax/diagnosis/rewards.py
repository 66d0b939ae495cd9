"""Checks on rewards and on what is looked at beside them: what the advantages are made of, and what they lead to."""

import numpy as np

from realgen_jax.diagnosis.finding import FINE, NOTE, PROBLEM, Figure, Finding
from realgen_jax.diagnosis.metrics import Metrics, NotRecorded, span

# Groups without spread give no gradient (DAPO, arXiv 2503.14476, 3.2): at a half, the batch costs twice what
# it teaches; at a fifth, the gradient's noise has grown by a tenth, 1 / sqrt(0.8).
NO_SPREAD, NO_SPREAD_NOTE = 0.5, 0.2
ADVANTAGE_EPS = 1e-4  # group_advantages divides by a group's std plus this
# A hundredth of the advantages is lost in their sampling noise, 1 / sqrt(n), for any batch under 10,000 pictures; a
# tenth is heard, but decides nowhere.
DROWNED, DROWNED_NOTE = 0.01, 0.1
# Reliability, the share of a score's variance that comes from the picture: 1 - noise^2 / spread^2. Below a half, most
# of what is learnt from is noise; 0.8 is what test theory asks of a measurement that ranks.
UNRELIABLE, UNRELIABLE_NOTE = 0.5, 0.8

HELD_OUT_FALL = (
    0.2  # of the spread over pictures: a small effect again; evaluations share their noise
)
HELD_OUT_FALL_PLAIN = 0.02  # where no spread was recorded: train.py's
# Lower is better here. Evaluations of a run that learns nothing lie within 5 % of each other, so 1.2 is real; against
# the best, which is the luckiest of many, more is asked: the demo's Frechet distance ends at 1.19 of its best.
OVER_FIRST, OVER_BEST = 1.2, 1.5
UNRELATED = 0.1  # a correlation that explains 1 % of the variance
COLLAPSE = 0.25  # of the first spread, as in train.py


def zero_spread(m: Metrics, config: dict) -> Finding:
    """Groups in which no reward tells the pictures apart."""
    share, sample = m.recent("zero_spread"), config["sample"]
    figures = [Figure("groups without any spread", share, f"<= {NO_SPREAD_NOTE:g}", m.recently)]
    if share <= NO_SPREAD_NOTE:
        return Finding("zero-spread groups", FINE, figures)
    says = (
        f"In {share:.0%} of the groups all pictures score the same. Their advantages are zero: they cost as much as "
        "the others and teach nothing."
    )
    remedy = (
        "A reward with finer steps, prompts that are neither solved nor hopeless, more pictures a group: "
        f"--config.sample.num_image_per_prompt={2 * sample['num_image_per_prompt']}, or more noise: "
        f"--config.sample.noise_level={1.2 * sample['noise_level']:.2g}."
    )
    return Finding(
        "zero-spread groups", PROBLEM if share > NO_SPREAD else NOTE, figures, says, remedy
    )


def shares(m: Metrics, config: dict) -> dict[str, float]:
    """Each reward's share of the combined advantage; empty where no reward has any.

    Rewards are normalised one by one, so a reward's part is its weight, times std / (std + eps) in the groups where it
    has any spread and zero in the others. The size of its scores plays no part.
    """
    parts = {}
    for name, weight in config["reward"]["fn"].items():
        if not weight:
            continue
        some = 1.0 - m.recent(f"zero_spread/{name}")
        std = m.recent(f"reward_std/{name}") / some if some > 0 else 0.0
        parts[name] = abs(weight) * some * std / (std + ADVANTAGE_EPS)
    total = sum(parts.values())
    return {name: part / total for name, part in parts.items()} if total > 0 else {}


def drowned_reward(m: Metrics, config: dict) -> Finding | None:
    """The trained reward with the least say in the advantages."""
    weights, found = config["reward"]["fn"], shares(m, config)
    if len(found) < 2:
        return None
    name = min(found, key=found.get)
    share, by_weight = found[name], abs(weights[name]) / sum(map(abs, weights.values()))
    std, none = m.recent(f"reward_std/{name}"), m.recent(f"zero_spread/{name}")
    figures = [
        Figure(f"{name}: share of the advantages", share, f">= {DROWNED_NOTE:g}", m.recently),
        Figure(f"{name}: share of the weights", by_weight, "", m.recently),
        Figure(f"{name}: spread within a group", std, f"far above {ADVANTAGE_EPS:g}", m.recently),
        Figure(f"{name}: groups without spread", none, f"<= {NO_SPREAD_NOTE:g}", m.recently),
    ]
    if share >= DROWNED_NOTE:
        return Finding("one reward drowning the others", FINE, figures[:1])
    says = f"{name} makes up {share:.2%} of the advantages; the other rewards decide alone."
    if share > 0.5 * by_weight:
        says += " Each reward is divided by its own spread, so it is the weights that do this."
        remedy = f"--config.reward.fn.{name}={max(weights.values()):g}, as the largest, or drop it."
    else:
        says += (
            f" Its weight would give it {by_weight:.2%}, but its spread ({std:.2g}; none at all in {none:.0%} of the "
            f"groups) vanishes beside the {ADVANTAGE_EPS:g} that is added to it before the division."
        )
        remedy = "Scale its scores up in the reward's own file, use a finer reward, or drop it."
    return Finding(
        "one reward drowning the others",
        PROBLEM if share < DROWNED else NOTE,
        figures,
        says,
        remedy,
    )


def reward_noise(m: Metrics, config: dict) -> Finding | None:
    """The trained reward that differs most between two scorings of one picture, against what it is to tell apart."""
    found = {}
    for name in config["reward"]["fn"]:
        epochs, values = m.series(f"noise/{name}", "eval")
        noise, spread = float(np.median(values)), m.recent(f"reward_std/{name}")
        if spread > 0:
            found[name] = (max(0.0, 1.0 - (noise / spread) ** 2), noise, spread, span(epochs))
    if not found:
        return None
    name = min(found, key=lambda n: found[n][0])
    reliability, noise, spread, when = found[name]
    figures = [
        Figure(f"{name}: reliability", reliability, f">= {UNRELIABLE_NOTE:g}", m.recently),
        Figure(f"{name}: noise between two scorings", noise, "", when),
        Figure(f"{name}: spread within a group", spread, "", m.recently),
    ]
    if reliability >= UNRELIABLE_NOTE:
        return Finding("reward noise", FINE, figures[:1])
    says = (
        f"{name} gives one picture different scores: the noise is {noise / spread:.0%} of its spread within a group, "
        "and dividing by that spread makes full advantages of it."
    )
    remedy = (
        "Make the reward repeatable (evaluation mode, no sampling, no dependence on the other pictures of a batch) or "
        f"average several scorings; until then give it less weight: --config.reward.fn.{name}="
        f"{config['reward']['fn'][name] / 4:g}."
    )
    return Finding(
        "reward noise", PROBLEM if reliability < UNRELIABLE else NOTE, figures, says, remedy
    )


def fall_limit(m: Metrics, name: str) -> float:
    try:
        return HELD_OUT_FALL * float(m.series(f"std/{name}", "eval")[1].max())
    except NotRecorded:
        return HELD_OUT_FALL_PLAIN


def held_out(m: Metrics, config: dict) -> Finding:
    """What the run looks at and does not train on: the last evaluation against the best and, for metrics, the first."""
    reward, t, figures, worse = config["reward"], config["train"], [], []
    if not [*reward["held_out"], *reward["metrics"]]:
        raise NotRecorded("a check: config.reward.held_out and config.reward.metrics are empty")
    for name in [*reward["held_out"], *reward["metrics"]]:
        epochs, values = m.series(name, "eval")
        if lower := name in reward["metrics"]:
            best, limit = values.min(), min(OVER_FIRST * values[0], OVER_BEST * values.min())
        else:
            best, limit = values.max(), values.max() - fall_limit(m, name)
        healthy = f"{'<=' if lower else '>='} {limit:.3g}, best {best:.3g}, first {values[0]:.3g}"
        figures.append(Figure(name, float(values[-1]), healthy, span(epochs)))
        if (values[-1] > limit) if lower else (values[-1] < limit):
            worse.append(name)
    if not worse:
        return Finding("held-out checks", FINE, figures)
    says = f"{', '.join(worse)} got worse, and nothing trains on that. "
    if m.rises:
        says += "The reward rises meanwhile: the model learns the reward's weaknesses (arXiv 2210.10760)."
        remedy = f"Use a checkpoint from before, and more KL: --config.train.beta={max(10 * t['beta'], 1e-3):g}."
    else:
        says += "The reward does not rise either: training damages the pictures."
        remedy = f"If nothing above explains it: --config.train.learning_rate={t['learning_rate'] / 10:g}."
    return Finding("held-out checks", PROBLEM, figures, says, remedy)


def held_out_correlation(m: Metrics, config: dict) -> Finding | None:
    """Whether a held-out reward and the trained one agree on which pictures are better."""
    figures, unrelated = [], []
    for name in config["reward"]["held_out"]:
        if m.series(f"std/{name}", "eval")[1][-1] == 0:
            continue  # one score for all pictures correlates with nothing
        epochs, values = m.series(f"correlation/{name}", "eval")
        healthy = f">= {UNRELATED:g}, first {values[0]:.2g}"
        figures.append(Figure(f"{name} with the reward", float(values[-1]), healthy, span(epochs)))
        if values[-1] < UNRELATED:
            unrelated.append(name)
    if not unrelated:
        return Finding("correlation", FINE, figures) if figures else None
    says = f"{', '.join(unrelated)} prefers other pictures than the trained reward: by that check a rise is no progress."
    remedy = "Train on a reward of the check's kind as well (--config.reward.fn.NAME=1.0), or drop a check that is moot."
    return Finding("correlation", NOTE, figures, says, remedy)


def diversity(m: Metrics, config: dict) -> Finding:
    """Whether the pictures of a prompt have become alike, as far as the reward can tell."""
    (epochs, groups), (evals, tests) = m.series("reward_std"), m.series("prompt_std", "eval")
    limit, figures = f">= {COLLAPSE:g}", []
    for what, first, last, when in (
        ("test prompts' spread, last over first", tests[0], tests[-1], evals),
        (
            "groups' spread, recent over first",
            np.median(groups[: m.window]),
            m.recent("reward_std"),
            epochs,
        ),
    ):
        if first > 0:  # a single picture a test prompt has no spread
            figures.append(Figure(what, float(last / first), limit, span(when)))
    if all(figure.value >= COLLAPSE for figure in figures):
        return Finding("diversity", FINE, figures)
    says = "The pictures of a prompt score more and more alike: the reward is exhausted, or the model draws one picture."
    remedy = (
        "Look at RUN/samples. If they are alike, hold the model closer: "
        f"--config.train.beta={max(10 * config['train']['beta'], 1e-3):g}; if the reward is at its best, stop here."
    )
    return Finding("diversity", NOTE if m.rises else PROBLEM, figures, says, remedy)
