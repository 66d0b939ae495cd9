"""Checks that the pictures of a prompt still differ."""

import contextlib

import numpy as np

from realgen_jax.advantages import DIVERSITY
from realgen_jax.diagnosis.finding import FINE, NOTE, PROBLEM, Figure, Finding
from realgen_jax.diagnosis.metrics import Metrics, NotRecorded, span
from realgen_jax.training.monitor import REWARD

# Fraction of the first spread that is left. The same as in train.py.
COLLAPSE = 0.25

# Fraction of the first distance between the pictures of a prompt that is left. 1 - cos grows with
# the square of an angle, so a quarter is half of the angle. The demo keeps two thirds.
ALIKE = 0.25


def group_diversity(metrics: Metrics, config: dict) -> Finding | None:
    """Check that the pictures of a prompt still differ, by the reward `diversity`.

    It is recorded if the run trains on it or watches it.
    """
    reward = config["reward"]
    if DIVERSITY in reward["fn"]:
        key = f"reward/{DIVERSITY}"
    elif DIVERSITY in reward.get("watched", ()):  # missing in older runs
        key = DIVERSITY
    else:
        return None

    epochs, values = metrics.series(key)
    first = float(values[:2].mean())
    share = metrics.recent(key) / max(first, 1e-12)
    figures = [
        Figure("distance within a group, recent over first", share, f">= {ALIKE:g}", span(epochs)),
        Figure("distance within a group, first", first, "", span(epochs[:2])),
    ]
    if share >= ALIKE:
        return Finding("pictures of a prompt", FINE, figures[:1])

    beta = max(10 * config["train"]["beta"], 1e-3)
    uses_it = config["train"].get("advantages") == "gardo"
    says = (
        f"The pictures of a prompt become copies of each other: the distance of a picture to the "
        f"nearest other one is {share:.0%} of what it was."
    )
    remedy = f"Keep the model closer to the base: --config.train.beta={beta:g}."
    if DIVERSITY in reward["fn"]:
        weight = max(2 * reward["fn"][DIVERSITY], 0.5)
        bonus = f"--config.reward.fn.{DIVERSITY}={weight:g}"
    else:
        bonus = f'"--config.reward.fn={ {**reward["fn"], DIVERSITY: 0.5} }"'
    remedy += f" Or reward pictures that differ: {bonus}"
    remedy += "." if uses_it else ", or --config.train.advantages=gardo."
    return Finding("pictures of a prompt", PROBLEM, figures, says, remedy)


def diversity(metrics: Metrics, config: dict) -> Finding | None:
    """Check that the pictures of a prompt still differ, as far as the reward can tell.

    The spread of a reward that learns changes with it and is left out.
    """
    healthy = f">= {COLLAPSE:g}"
    figures = []

    # Evaluations record the spread of what judges the run, unless that is a metric, and none at all
    # for one picture per prompt (in older runs, zero).
    if metrics.goal and not metrics.lower_is_better:
        with contextlib.suppress(NotRecorded):
            evaluations, tests = metrics.series("prompt_std", "eval")
            if tests[0] > 0:
                share = float(tests[-1] / tests[0])
                what = "test prompts' spread, last over first"
                figures.append(Figure(what, share, healthy, span(evaluations)))

    if metrics.goal == REWARD:
        epochs, groups = metrics.series("reward_std")
        first_groups = np.median(groups[: metrics.window])
        if first_groups > 0:
            share = float(metrics.recent("reward_std") / first_groups)
            what = "groups' spread, recent over first"
            figures.append(Figure(what, share, healthy, span(epochs)))
    if not figures:
        return None
    if all(figure.value >= COLLAPSE for figure in figures):
        return Finding("diversity", FINE, figures)

    beta = max(10 * config["train"]["beta"], 1e-3)
    says = (
        "The scores of a prompt's pictures become more and more alike: either the reward is "
        "exhausted, or the model always draws the same picture."
    )
    remedy = (
        "Look at RUN/samples. If the pictures are alike, keep the model closer to the base: "
        f"--config.train.beta={beta:g}. If the reward is at its maximum, stop here."
    )
    severity = NOTE if metrics.improves else PROBLEM
    return Finding("diversity", severity, figures, says, remedy)
