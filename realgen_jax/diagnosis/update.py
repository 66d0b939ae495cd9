"""Checks on the update: ratio and clipping, gradient, step and KL."""

import numpy as np

from realgen_jax.diagnosis.finding import FINE, NOTE, PROBLEM, Figure, Finding
from realgen_jax.diagnosis.metrics import Metrics, span

RATIO_SHARE = (
    0.1  # of the clip range: what rounding may take of it, the limit that train.py warns at
)
FLOAT32_STEP = 2.0**-23  # from 1 to the next float32; ratios are float32
# Nine in ten ratios outside after one step is usual for ranges as narrow as RealGen's 2e-6, and costs no more than an
# epoch's later steps (the embedded run with all of them clipped, two steps an epoch: half the rise). Ill is a step that
# goes thirty ranges far: clipping cuts gradients after a move, it cannot shorten the move.
ALWAYS_CLIPPED, FAR = 0.9, 30.0
# GRPO-Guard (arXiv 2510.22319): ratios centred below 1 are clipped on one side. One clipped in twenty shows no side.
ONE_SIDED, ONE_SIDED_FROM = 3.0, 0.05

STEP_HIGH = 0.1  # of the weights' norm: ten such steps rewrite the adapters. Usual: 1e-3 (cs231n), 2e-2 in a young LoRA
# All steps laid end to end, over the weights' norm. The embedded run needs 0.18 to raise its reward by 0.8 spreads;
# with 0.018 it rose by a tenth of that, with 0.0015 by a hundredth.
PATH_LOW = 0.05
STEP_USUAL = 5e-3  # what a proposed learning rate aims at
# The KL term's gradient, 2 beta sqrt(KL) for a unit of velocity, over the policy's: advantages have variance 1 and
# average out as 1 / sqrt(pictures of a step). The embedded run stands at 0.02; at 0.6 (beta 1) a tenth of its rise is
# left, at 46 (beta 100) nothing, where the gradient's norm is 90 times as large.
KL_PULL = 0.3
# Adam's step is lr m / (sqrt(v) + eps), where m averages a noisy gradient g down to about a quarter: a step over a
# tenth of lr g / eps says that eps has outgrown sqrt(v).
ALL_EPSILON = 0.1
GRADIENT_HIGH = 10.0  # times max_grad_norm: Adam forgives a constant factor, but not that few batches make up the sum


def ratio_deviation(m: Metrics, config: dict) -> Finding:
    """On unchanged weights every ratio is 1; what is left is the disagreement of sampling and training."""
    epochs, values = m.series("first_ratio_deviation")
    t, worst = config["train"], float(values.max())
    limit = RATIO_SHARE * t["clip_range"]
    figures = [
        Figure("largest |ratio - 1| before any step", worst, f"<= {limit:.1e}", span(epochs))
    ]
    if worst <= limit:
        return Finding("ratio deviation", FINE, figures)
    says = (
        f"Sampling and training disagree: before any weight has moved, a ratio is {worst / t['clip_range']:.2g} clip "
        "ranges away from 1, so clipping answers to rounding."
    )
    remedy = "--config.train.recompute_old=True"
    if t["recompute_old"]:
        remedy = f"--config.pretrained.dtype=float32, or --config.train.clip_range={worst / RATIO_SHARE:.1g}"
    return Finding("ratio deviation", PROBLEM, figures, says, remedy)


def clip_range(m: Metrics, config: dict) -> Finding:
    """The clip range against the grid of float32 numbers around 1: its rounding must not take more than a tenth."""
    value, limit = config["train"]["clip_range"], FLOAT32_STEP / RATIO_SHARE
    figures = [Figure("clip range", value, f">= {limit:.1e}", m.recently)]
    if value >= limit:
        return Finding("clip range", FINE, figures)
    says = (
        f"The clip range is {value / FLOAT32_STEP:.1g} float32 steps wide: what is clipped depends on how ratios are "
        "rounded."
    )
    return Finding(
        "clip range", PROBLEM, figures, says, "--config.train.clip_range=2e-6 (RealGen's), or wider"
    )


def no_gradient(m: Metrics, config: dict) -> Finding:
    """Whether Adam's epsilon outweighs the gradient; a step is then lr x gradient / epsilon, as far as that goes."""
    t, norm = config["train"], m.recent("grad_norm")
    lost = t["learning_rate"] * min(norm, t["max_grad_norm"]) / t["adam_epsilon"]
    share = m.recent("update_norm") / lost if lost > 0 else 1.0
    figures = [
        Figure("step over lr x gradient / epsilon", share, f"< {ALL_EPSILON:g}", m.recently),
        Figure("gradient norm", norm, "> 0", m.recently),
    ]
    if share < ALL_EPSILON:
        return Finding("vanishing gradient", FINE, figures)
    says = "There is next to no gradient: its entries are zero, or below Adam's epsilon, which then shrinks every step."
    usual = 1e-8 if t["adam_epsilon"] > 1e-8 else 1e-15
    remedy = f"See the findings on rewards first; else --config.train.adam_epsilon={usual:g}."
    return Finding("vanishing gradient", PROBLEM, figures, says, remedy)


def step_size(m: Metrics, config: dict) -> Finding:
    """What the learning rate makes of the weights: one step, and all steps of the planned run, against their norm."""
    (epochs, update), (_, weights) = m.series("update_norm"), m.series("param_norm")
    relative, lr, planned = update / weights, config["train"]["learning_rate"], config["num_epochs"]
    recent, largest = float(np.median(relative[-m.window :])), float(relative.max())
    so_far = float(relative.mean()) * m.recent("steps") * len(epochs)
    path = so_far * max(planned / len(epochs), 1.0)
    figures = [
        Figure("largest step over weights", largest, f"< {STEP_HIGH:g}", span(epochs)),
        Figure("recent step over weights", recent, f"< {STEP_HIGH:g}", m.recently),
        Figure("all planned steps over weights", path, f"> {PATH_LOW:g}", f"1-{planned}"),
        Figure("all steps so far over weights", so_far, "", span(epochs)),
    ]
    name, rate = "learning rate", "--config.train.learning_rate={:.1g}"
    if largest > STEP_HIGH and not (m.rises and recent < STEP_HIGH):
        says = f"The learning rate {lr:g} is too high: a step changed the weights by up to {largest:.2g} of their norm."
        remedy = f"{rate.format(lr * STEP_USUAL / largest)}, or lower, from the start: what broke stays broken."
        return Finding(name, PROBLEM, figures, says, remedy)
    if path < PATH_LOW and not m.rises:
        says = (
            f"The weights hardly move: all steps of the planned {planned} epochs, end to end, come to {path:.1g} of "
            "their norm."
        )
        remedy = (
            f"{rate.format(lr * STEP_USUAL / max(recent, 1e-12))} (now {lr:g}), or more epochs."
        )
        if no_gradient(m, config).severity == PROBLEM:
            remedy = "Nothing here: there is no gradient to follow."
        return Finding(name, PROBLEM, figures, says, remedy)
    if so_far < PATH_LOW and not m.rises:
        says = (
            f"It is too early to tell: the steps so far come to {so_far:.1g} of the weights' norm."
        )
        return Finding(
            name,
            NOTE,
            figures,
            says,
            f"Wait for epoch {PATH_LOW / so_far * len(epochs):.0f} or later.",
        )
    return Finding(name, FINE, figures[:3])


def kl_penalty(m: Metrics, config: dict) -> Finding | None:
    """How hard the KL term pulls back against how hard the advantages push.

    For kl=velocity; the other kinds scale the KL, and this by a factor of about three at most.
    """
    t, beta = config["train"], config["train"]["beta"]
    if beta <= 0:
        return None
    kl, pictures = (
        m.recent("kl_loss"),
        config["sample"]["train_batch_size"] * t["gradient_accumulation_steps"],
    )
    pull = 2.0 * beta * (kl * pictures) ** 0.5
    figures = [
        Figure("KL's pull over the rewards' push", pull, f"< {KL_PULL:g}", m.recently),
        Figure("KL loss", kl, "", m.recently),
        Figure("beta x KL loss", beta * kl, "", m.recently),
    ]
    if pull < KL_PULL or m.rises:
        return Finding("KL penalty", FINE, figures)
    says = f"The KL penalty (beta {beta:g}) pulls the weights back about {pull:.2g} times as hard as the rewards push."
    remedy = f"--config.train.beta={0.1 * KL_PULL * beta / pull:.1g}; --config.train.beta=0 shows whether it is that."
    return Finding("KL penalty", PROBLEM, figures, says, remedy)


def gradient_norm(m: Metrics, config: dict) -> Finding:
    """The gradient's norm before it is clipped, against max_grad_norm."""
    t, (_, norms) = config["train"], m.series("grad_norm")
    norm, limit = m.recent("grad_norm"), t["max_grad_norm"]
    figures = [Figure("gradient norm", norm, f"<= {limit:g}", m.recently)]
    if norms[-m.window :].min() <= limit:
        return Finding("gradient norm", FINE, figures)
    says = (
        f"Every step is clipped, from a norm of {norm:.2g} to {limit:g}. Adam does not mind the scale, but clipping no "
        "longer singles out the batches that exploded."
    )
    remedy = (
        f"--config.train.max_grad_norm={2 * norm:.1g}; if the norm goes on growing, half the learning rate: "
        f"--config.train.learning_rate={t['learning_rate'] / 2:g}."
    )
    ill = norm > GRADIENT_HIGH * limit and not m.rises
    return Finding("gradient norm", PROBLEM if ill else NOTE, figures, says, remedy)


def clip_fraction(m: Metrics, config: dict) -> Finding | None:
    """Clipped ratios after an epoch's first step, which is taken at ratio 1 and clips none."""
    steps, t = m.recent("steps"), config["train"]
    if steps < 2:
        return None
    share = min(1.0, m.recent("clipfrac") * steps / (steps - 1))
    far = m.recent("ratio_deviation") / t["clip_range"]
    figures = [
        Figure(
            "clipped ratios after an epoch's first step", share, f"< {ALWAYS_CLIPPED:g}", m.recently
        ),
        Figure("largest |ratio - 1| over the clip range", far, f"< {FAR:g}", m.recently),
    ]
    if share < ALWAYS_CLIPPED or m.rises:
        return Finding("clip fraction", FINE, figures)
    says = (
        f"One step takes {share:.0%} of the ratios out of the clip range {t['clip_range']:g}, up to {far:.2g} ranges "
        "far. The epoch's later steps learn only from ratios that moved the wrong way."
    )
    remedy = f"--config.train.clip_range={far * t['clip_range'] / 3:.1g}"
    if far > 3:
        remedy += f", or --config.train.learning_rate={t['learning_rate'] * 3 / far:.1g}"
    return Finding("clip fraction", PROBLEM if far > FAR else NOTE, figures, says, f"{remedy}.")


def one_sided_clipping(m: Metrics, config: dict) -> Finding | None:
    """Ratios clipped on one side: over-confident updates on the other are not bounded."""
    above, below, t = m.recent("clipfrac_gt_one"), m.recent("clipfrac_lt_one"), config["train"]
    figures = [
        Figure(
            "ratios clipped above 1", above, f"within {ONE_SIDED:g}x of those below", m.recently
        ),
        Figure("ratios clipped below 1", below, "", m.recently),
    ]
    if above + below < ONE_SIDED_FROM or max(above, below) < ONE_SIDED * min(above, below):
        return Finding("sides of clipping", FINE, figures)
    says = (
        f"Clipping acts {'above' if above > below else 'below'} 1 almost alone. Updates that move ratios the other way "
        "are not bounded, and the model can over-optimise its reward."
    )
    remedy = "--config.train.loss=guard --config.train.guard_bias=sample"
    if (t["loss"], t["guard_bias"]) == ("guard", "sample"):
        remedy = f"--config.train.learning_rate={t['learning_rate'] / 2:g}"
    return Finding("sides of clipping", NOTE, figures, says, remedy)
