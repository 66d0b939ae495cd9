"""Checks of what only some objectives have: old policies, matching errors, dropped pictures."""

import numpy as np

from realgen_jax.diagnosis.finding import FINE, NOTE, PROBLEM, Figure, Finding
from realgen_jax.diagnosis.metrics import Metrics, span

# Length of the velocity over the base model's. NormGuard (arXiv 2606.27771) saw 1.05 to 1.15 in
# runs whose pictures got worse.
LONG = 1.15
FAR_TOO_LONG = 1.5

# Root of the mean squared distance of the velocity from the old policy's, over the error of the
# clean estimate. The embedded model: 0.04 in the first epoch, then 0.01; with a learning rate ten
# times as high and no KL 0.4, then 0.25, while its reward falls.
OLD_FAR = 0.15

# Matching error over that of the first epoch. The embedded model: 1; where nothing holds pictures
# with a negative advantage, 6 after ten epochs, when two thirds of the reward are left.
GROWN = 1.5

# Pictures that dppo drops after an epoch's first step. Steps in random directions go where the
# advantage points to for half of the pictures; if all are too far, these are dropped. Then the
# others, which moved the wrong way, are all that is learned from.
MOSTLY_DROPPED = 0.5
# Mean divergence over the threshold: the mask does not single out a few pictures any more. The
# golden model: 9 with a share of 0.7 dropped, and it learns.
FAR_BEYOND = 30.0

# Rank correlation of previews and pictures: below it, a preview explains 4 % of the ranks.
UNRELATED_PREVIEWS = 0.2


def velocity_norm(metrics: Metrics, config: dict) -> Finding | None:
    """Check that velocities are not much longer than those of the base model.

    Recorded only if the base model is computed, for the KL or for NormGuard.
    """
    if not metrics.records("velocity_norm"):
        return None
    norm = metrics.recent("velocity_norm")
    figures = [
        Figure("velocity over the base model's", norm, f"<= {LONG:g}", metrics.recent_epochs)
    ]
    if norm <= LONG:
        return Finding("velocity norm", FINE, figures)

    guard = config["train"].get("norm_guard", {"weight": 0.0})  # missing in older runs
    weight = 10 * guard["weight"] or 1.0
    says = (
        f"Velocities are {norm:.2g} times as long as the base model's, which comes with "
        "over-optimised rewards: look at RUN/samples for hard contrasts and textures."
    )
    remedy = (
        f"--config.train.norm_guard.weight={weight:g}, or more KL: "
        f"--config.train.beta={_more_kl(config):g}."
    )
    severity = PROBLEM if norm > FAR_TOO_LONG and not metrics.improves else NOTE
    return Finding("velocity norm", severity, figures, says, remedy)


def old_policy(metrics: Metrics, config: dict) -> Finding | None:
    """Check how far `nft` moves the policy away from the old one, from which it samples."""
    if config["train"]["loss"] != "nft":
        return None
    epochs, distances = metrics.series("old_distance")
    _, errors = metrics.series("loss_pos")
    relative = np.sqrt(distances) / np.maximum(errors, 1e-12)
    recent = float(np.median(relative[-metrics.window :]))
    largest = float(relative.max())
    figures = [
        Figure("distance over error, recent", recent, f"<= {OLD_FAR:g}", metrics.recent_epochs),
        Figure("distance over error, largest", largest, "", span(epochs)),
    ]
    if recent <= OLD_FAR or metrics.improves:
        return Finding("old policy", FINE, figures)

    train = config["train"]
    says = (
        f"In an epoch the velocity moves by {recent:.2g} of the error that it is to mend. NFT "
        "extrapolates from the old policy in both directions, which holds nearby only, so the "
        "policy runs away from what its pictures teach."
    )
    if train["beta"] == 0:
        says += " Nothing holds it: beta is 0."
    remedy = (
        f"Restart with --config.train.learning_rate={train['learning_rate'] / 5:.1g} and "
        f"--config.train.beta={_more_kl(config):g}."
    )
    return Finding("old policy", PROBLEM, figures, says, remedy)


def matching_error(metrics: Metrics, config: dict) -> Finding | None:
    """Check that the matching error of `awm` stays: nothing bounds that of bad pictures."""
    if config["train"]["loss"] != "awm":
        return None
    epochs, errors = metrics.series("matching_error")
    growth = metrics.recent("matching_error") / max(float(errors[0]), 1e-12)
    figures = [
        Figure("matching error, recent over first", growth, f"<= {GROWN:g}", span(epochs)),
        Figure("matching error, first", float(errors[0]), "", span(epochs[:1])),
    ]
    if growth <= GROWN:
        return Finding("matching error", FINE, figures[:1])

    train = config["train"]
    beta_ema = max(2 * train["awm"]["beta_ema"], 1.0)
    says = (
        f"The matching error is {growth:.2g} times what it was. A picture with a negative "
        "advantage raises it without bound, and only the KL to the old policy and the clips hold "
        "that: the model unlearns how to draw."
    )
    remedy = (
        f"Restart with --config.train.awm.beta_ema={beta_ema:g} and "
        f"--config.train.learning_rate={train['learning_rate'] / 5:.1g}."
    )
    if train["awm"]["advantage_max"] > 1:
        remedy += " Or with --config.train.awm.advantage_max=1."
    severity = NOTE if metrics.improves else PROBLEM
    return Finding("matching error", severity, figures, says, remedy)


def dropped_pictures(metrics: Metrics, config: dict) -> Finding | None:
    """Check how many pictures `dppo` drops after an epoch's first step, which drops none."""
    train = config["train"]
    if train["loss"] != "dppo":
        return None
    steps = metrics.recent("steps")
    later = steps / max(steps - 1, 1)
    dropped = min(1.0, (1.0 - metrics.recent("kept_share")) * later)
    distance = metrics.recent("divergence") * later / train["dppo"]["threshold"]
    recent = metrics.recent_epochs
    figures = [
        Figure(
            "dropped pictures after an epoch's first step", dropped, f"< {MOSTLY_DROPPED:g}", recent
        ),
        Figure("mean divergence over the threshold", distance, f"< {FAR_BEYOND:g}", recent),
    ]
    if dropped < MOSTLY_DROPPED or distance < FAR_BEYOND:
        return Finding("dropped pictures", FINE, figures)

    threshold = train["dppo"]["threshold"] * distance / 3
    says = (
        f"Nearly every picture is beyond the threshold after one step, by {distance:.2g} times, so "
        f"that {dropped:.0%} are dropped, all that moved as they should. The later steps of the "
        "epoch learn only from pictures that moved the wrong way."
    )
    remedy = f"--config.train.dppo.threshold={threshold:.1g}, or a smaller learning rate."
    severity = NOTE if metrics.improves else PROBLEM
    return Finding("dropped pictures", severity, figures, says, remedy)


def previews(metrics: Metrics, config: dict) -> Finding | None:
    """Check that previews, where they choose the pictures, rank them as the rewards do later."""
    if not metrics.records("scout/rank_correlation"):
        return None
    correlation = metrics.recent("scout/rank_correlation")
    figures = [
        Figure(
            "rank correlation of previews and pictures",
            correlation,
            f">= {UNRELATED_PREVIEWS:g}",
            metrics.recent_epochs,
        )
    ]
    if correlation >= UNRELATED_PREVIEWS:
        return Finding("previews", FINE, figures)
    says = (
        "The scores of the previews say next to nothing about the pictures that are made from "
        "them, so the pictures that are trained on are chosen at random."
    )
    remedy = "Use more steps for the previews, or train without them."
    return Finding("previews", NOTE, figures, says, remedy)


def _more_kl(config: dict) -> float:
    """A larger weight of the KL."""
    return max(10 * config["train"]["beta"], 1e-3)
