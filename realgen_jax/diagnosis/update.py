"""Checks on the update: ratios and clipping, gradient, step size and KL."""

import numpy as np

from realgen_jax.diagnosis.finding import FINE, NOTE, PROBLEM, Figure, Finding
from realgen_jax.diagnosis.metrics import Metrics, span
from realgen_jax.training.monitor import RATIO_SHARE, ratio_limit

# The objectives that clip ratios with config.train.clip_range. The others ignore that key.
CLIPPING = ("grpo", "guard")
# Distance from 1 to the next float32 number; ratios are float32.
FLOAT32_STEP = 2.0**-23

# With a range as narrow as RealGen's 2e-6, nine in ten ratios are usually outside after one step.
# That only wastes the later steps of the epoch (the embedded run with all ratios clipped, at two
# steps per epoch: half the rise). A step is flagged when it moves 30 clip ranges: clipping removes
# the gradient after a move, but cannot shorten the move itself.
ALWAYS_CLIPPED = 0.9
FAR = 30.0

# GRPO-Guard (arXiv 2510.22319): ratios centred below 1 are clipped on one side only. To tell, at
# least one ratio in twenty must be clipped.
ONE_SIDED = 3.0
ONE_SIDED_FROM = 0.05

# Norm of a step, as a fraction of the weights' norm. Ten steps at 0.1 rewrite the adapters. Typical
# values: 1e-3 (cs231n), 2e-2 early in LoRA training.
STEP_HIGH = 0.1
# Sum of the norms of all steps, as a fraction of the weights' norm. The embedded run needs 0.18 to
# raise its reward by 0.8 spreads; with 0.018 it rose by a tenth of that, with 0.0015 by a
# hundredth.
PATH_LOW = 0.05
# The step size that a proposed learning rate aims at.
STEP_USUAL = 5e-3

# Ratio of the KL term's gradient, 2 beta sqrt(KL) per unit of velocity, to the policy gradient:
# advantages have variance 1 and average out as 1 / sqrt(pictures per step). The embedded run is at
# 0.02. At 0.6 (beta 1) a tenth of its rise is left; at 46 (beta 100) nothing is left, and the
# gradient's norm is 90 times as large.
KL_PULL = 0.3

# Adam's step is lr m / (sqrt(v) + eps). The mean m of a noisy gradient g is about a quarter of g,
# so a step of more than a tenth of lr g / eps shows that eps exceeds sqrt(v).
ALL_EPSILON = 0.1

# Multiple of max_grad_norm. Adam is invariant to a constant factor, but not to a few batches that
# dominate the sum.
GRADIENT_HIGH = 10.0


def ratio_deviation(metrics: Metrics, config: dict) -> Finding | None:
    """Check that ratios are 1 on unchanged weights.

    A deviation is a mismatch between sampling and training.
    """
    train = config["train"]
    if train["loss"] not in (*CLIPPING, "dppo"):
        return None
    limit, key = ratio_limit(config)
    epochs, values = metrics.series("first_ratio_deviation")
    worst = float(values.max())
    figures = [
        Figure("largest |ratio - 1| before any step", worst, f"<= {limit:.1e}", span(epochs))
    ]
    if worst <= limit:
        return Finding("ratio deviation", FINE, figures)

    says = (
        f"Sampling and training disagree: before any weight has changed, a ratio is {worst:.1e} "
        f"away from 1, {worst / limit:.2g} times what config.{key} allows for, so rounding "
        "errors decide what is clipped or dropped."
    )
    if train["recompute_old"]:
        wider = train["clip_range"] * worst / limit
        if key == "dppo.threshold":
            wider = train["dppo"]["threshold"] * (worst / limit) ** 2
        remedy = f"--config.pretrained.dtype=float32, or --config.train.{key}={wider:.1g}"
    else:
        remedy = "--config.train.recompute_old=True"
    return Finding("ratio deviation", PROBLEM, figures, says, remedy)


def clip_range(metrics: Metrics, config: dict) -> Finding | None:
    """Compare the clip range with the spacing of float32 numbers around 1.

    Rounding may take up a tenth of the range.
    """
    if config["train"]["loss"] not in CLIPPING:
        return None
    value = config["train"]["clip_range"]
    limit = FLOAT32_STEP / RATIO_SHARE
    figures = [Figure("clip range", value, f">= {limit:.1e}", metrics.recent_epochs)]
    if value >= limit:
        return Finding("clip range", FINE, figures)

    says = (
        f"The clip range is {value / FLOAT32_STEP:.1g} float32 steps wide, so the rounding of "
        "ratios decides what is clipped."
    )
    remedy = "--config.train.clip_range=2e-6 (RealGen's), or wider"
    return Finding("clip range", PROBLEM, figures, says, remedy)


def no_gradient(metrics: Metrics, config: dict) -> Finding:
    """Check that Adam's epsilon does not outweigh the gradient.

    If it does, a step is close to learning rate x gradient / epsilon.
    """
    train = config["train"]
    norm = metrics.recent("grad_norm")
    clipped_norm = min(norm, train["max_grad_norm"])
    epsilon_step = train["learning_rate"] * clipped_norm / train["adam_epsilon"]
    share = 1.0
    if epsilon_step > 0:
        share = metrics.recent("update_norm") / epsilon_step
    recent = metrics.recent_epochs
    figures = [
        Figure("step over lr x gradient / epsilon", share, f"< {ALL_EPSILON:g}", recent),
        Figure("gradient norm", norm, "> 0", recent),
    ]
    if share < ALL_EPSILON:
        return Finding("vanishing gradient", FINE, figures)

    epsilon = 1e-8 if train["adam_epsilon"] > 1e-8 else 1e-15
    says = (
        "There is next to no gradient: its entries are zero, or smaller than Adam's epsilon, which "
        "then shrinks every step."
    )
    remedy = (
        "Resolve the findings on rewards first. If there are none: "
        f"--config.train.adam_epsilon={epsilon:g}."
    )
    return Finding("vanishing gradient", PROBLEM, figures, says, remedy)


def step_figures(metrics: Metrics, planned: int) -> list[Figure]:
    """Norms of steps relative to the weights: largest, recent, sum of planned, sum so far."""
    epochs, update = metrics.series("update_norm")
    _, weights = metrics.series("param_norm")
    relative = update / weights
    recent = float(np.median(relative[-metrics.window :]))
    largest = float(relative.max())

    # The summed lengths of all steps, so far and by the end of the run.
    so_far = float(relative.mean()) * metrics.recent("steps") * len(epochs)
    path = so_far * max(planned / len(epochs), 1.0)

    return [
        Figure("largest step over weights", largest, f"< {STEP_HIGH:g}", span(epochs)),
        Figure("recent step over weights", recent, f"< {STEP_HIGH:g}", metrics.recent_epochs),
        Figure("all planned steps over weights", path, f"> {PATH_LOW:g}", f"1-{planned}"),
        Figure("all steps so far over weights", so_far, "", span(epochs)),
    ]


def step_size(metrics: Metrics, config: dict) -> Finding:
    """Compare one step, and the sum of all planned steps, with the norm of the weights."""
    planned = config["num_epochs"]
    figures = step_figures(metrics, planned)
    largest, recent, path, so_far = (figure.value for figure in figures)
    learning_rate = config["train"]["learning_rate"]
    option = "--config.train.learning_rate"

    # Too large. A run that has recovered from large first steps is fine.
    if largest > STEP_HIGH and not (recent < STEP_HIGH and metrics.improves):
        says = (
            f"The learning rate {learning_rate:g} is too high: one step changed the weights by up "
            f"to {largest:.2g} of their norm."
        )
        proposed = learning_rate * STEP_USUAL / largest
        remedy = f"Restart with {option}={proposed:.1g}, or lower; damaged weights do not recover."
        return Finding("learning rate", PROBLEM, figures, says, remedy)

    # Too small, even by the end of the run.
    if path < PATH_LOW and not metrics.improves:
        says = (
            f"The weights hardly move: all steps of the planned {planned} epochs together come to "
            f"{path:.1g} of the weights' norm."
        )
        proposed = learning_rate * STEP_USUAL / max(recent, 1e-12)
        remedy = f"{option}={proposed:.1g} (now {learning_rate:g}), or more epochs."
        if no_gradient(metrics, config).severity == PROBLEM:
            remedy = "Nothing here: there is no gradient to follow."
        return Finding("learning rate", PROBLEM, figures, says, remedy)

    # Too small so far.
    if so_far < PATH_LOW and not metrics.improves:
        says = (
            f"It is too early to tell: the steps so far come to {so_far:.1g} of the weights' norm."
        )
        epochs, _ = metrics.series("update_norm")
        enough = PATH_LOW / so_far * len(epochs)
        return Finding(
            "learning rate", NOTE, figures, says, f"Wait until epoch {enough:.0f} or later."
        )

    return Finding("learning rate", FINE, figures[:3])


def kl_penalty(metrics: Metrics, config: dict) -> Finding | None:
    """Compare the pull of the KL term with the push of the advantages.

    Exact for kl=velocity. The other kinds scale the KL, which changes this figure by a factor of
    about three at most.
    """
    train = config["train"]
    beta = train["beta"]
    if beta <= 0:
        return None

    kl = metrics.recent("kl_loss")
    pictures = config["sample"]["train_batch_size"] * train["gradient_accumulation_steps"]
    pull = 2.0 * beta * (kl * pictures) ** 0.5
    recent = metrics.recent_epochs
    figures = [
        Figure("KL's pull over the rewards' push", pull, f"< {KL_PULL:g}", recent),
        Figure("KL loss", kl, "", recent),
        Figure("beta x KL loss", beta * kl, "", recent),
    ]
    if pull < KL_PULL or metrics.improves:
        return Finding("KL penalty", FINE, figures)

    says = (
        f"The KL penalty (beta {beta:g}) pulls the weights back about {pull:.2g} times as hard as "
        "the rewards push."
    )
    proposed = 0.1 * KL_PULL * beta / pull
    remedy = (
        f"--config.train.beta={proposed:.1g}. To test whether this is the cause: "
        "--config.train.beta=0."
    )
    return Finding("KL penalty", PROBLEM, figures, says, remedy)


def gradient_norm(metrics: Metrics, config: dict) -> Finding:
    """Compare the gradient's norm before clipping with max_grad_norm."""
    train = config["train"]
    limit = train["max_grad_norm"]
    norm = metrics.recent("grad_norm")
    _, norms = metrics.series("grad_norm")
    figures = [Figure("gradient norm", norm, f"<= {limit:g}", metrics.recent_epochs)]
    if norms[-metrics.window :].min() <= limit:
        return Finding("gradient norm", FINE, figures)

    severity = NOTE
    if norm > GRADIENT_HIGH * limit and not metrics.improves:
        severity = PROBLEM
    says = (
        f"Every gradient is clipped, from a norm of {norm:.2g} to {limit:g}. Adam is insensitive "
        "to the scale, but clipping no longer singles out the batches that exploded."
    )
    remedy = (
        f"--config.train.max_grad_norm={2 * norm:.1g}. If the norm keeps growing, halve the "
        f"learning rate: --config.train.learning_rate={train['learning_rate'] / 2:g}."
    )
    return Finding("gradient norm", severity, figures, says, remedy)


def clip_fraction(metrics: Metrics, config: dict) -> Finding | None:
    """Check the fraction of clipped ratios after an epoch's first step.

    The first step of an epoch is taken at ratio 1 and clips nothing, so the mean over steps is
    scaled up.
    """
    train = config["train"]
    steps = metrics.recent("steps")
    if train["loss"] not in CLIPPING or steps < 2:
        return None

    share = min(1.0, metrics.recent("clipfrac") * steps / (steps - 1))
    distance = metrics.recent("ratio_deviation") / train["clip_range"]
    recent = metrics.recent_epochs
    figures = [
        Figure(
            "clipped ratios after an epoch's first step", share, f"< {ALWAYS_CLIPPED:g}", recent
        ),
        Figure("largest |ratio - 1| over the clip range", distance, f"< {FAR:g}", recent),
    ]
    if share < ALWAYS_CLIPPED or metrics.improves:
        return Finding("clip fraction", FINE, figures)

    severity = PROBLEM if distance > FAR else NOTE
    says = (
        f"One step moves {share:.0%} of the ratios outside the clip range {train['clip_range']:g}, "
        f"by up to {distance:.2g} ranges. The later steps of the epoch learn only from ratios that "
        "moved in the wrong direction."
    )
    remedy = f"--config.train.clip_range={distance * train['clip_range'] / 3:.1g}"
    if distance > 3:
        learning_rate = train["learning_rate"] * 3 / distance
        remedy += f", or --config.train.learning_rate={learning_rate:.1g}"
    return Finding("clip fraction", severity, figures, says, f"{remedy}.")


def one_sided_clipping(metrics: Metrics, config: dict) -> Finding | None:
    """Check that ratios are clipped on both sides.

    If they are not, over-confident updates on the other side are unbounded.
    """
    train = config["train"]
    if train["loss"] not in CLIPPING:
        return None
    above = metrics.recent("clipfrac_gt_one")
    below = metrics.recent("clipfrac_lt_one")
    recent = metrics.recent_epochs
    figures = [
        Figure("ratios clipped above 1", above, f"within {ONE_SIDED:g}x of those below", recent),
        Figure("ratios clipped below 1", below, "", recent),
    ]
    few = above + below < ONE_SIDED_FROM
    balanced = max(above, below) < ONE_SIDED * min(above, below)
    if few or balanced:
        return Finding("sides of clipping", FINE, figures)

    side = "above" if above > below else "below"
    says = (
        f"Nearly all clipped ratios are {side} 1. Updates that move ratios to the other side are "
        "not bounded, so the model can over-optimise its reward."
    )
    if (train["loss"], train["guard_bias"]) == ("guard", "sample"):
        remedy = f"--config.train.learning_rate={train['learning_rate'] / 2:g}"
    else:
        remedy = "--config.train.loss=guard --config.train.guard_bias=sample"
    return Finding("sides of clipping", NOTE, figures, says, remedy)
