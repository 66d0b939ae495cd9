"""Diagnose a run: apply all checks to its metrics and describe how the reward develops."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from realgen_jax.diagnosis import diversity, objectives, rewards, rewriter, update
from realgen_jax.diagnosis.finding import FINE, NOTE, PROBLEM, Figure, Finding
from realgen_jax.diagnosis.metrics import UNKNOWN, Metrics, NotRecorded, Trend, read_run
from realgen_jax.training.monitor import REWARD

# Causes come before effects. Findings of one severity are listed in this order.
CHECKS: tuple[Callable[[Metrics, dict], Finding | None], ...] = (
    rewards.zero_spread,
    rewards.drowned_reward,
    rewards.reward_noise,
    update.ratio_deviation,
    update.clip_range,
    update.no_gradient,
    update.step_size,
    update.kl_penalty,
    update.gradient_norm,
    update.clip_fraction,
    update.one_sided_clipping,
    objectives.old_policy,
    objectives.matching_error,
    objectives.dropped_pictures,
    objectives.velocity_norm,
    objectives.previews,
    rewards.held_out,
    rewards.held_out_correlation,
    diversity.diversity,
    diversity.group_diversity,
)
# Of runs that train the rewriter, which has no window, velocity or picture to pull at.
REWRITER_CHECKS: tuple[Callable[[Metrics, dict], Finding | None], ...] = (
    rewards.zero_spread,
    rewards.drowned_reward,
    rewards.reward_noise,
    update.ratio_deviation,
    rewriter.signal,
    rewriter.unusable,
    rewriter.flips,
    update.no_gradient,
    update.gradient_norm,
    rewriter.far_away,
    rewriter.lengths,
    rewriter.same_tail,
    rewards.held_out,
    rewards.held_out_correlation,
)


@dataclass(frozen=True)
class Answer:
    """The diagnosis of a run."""

    run: str
    verdict: str
    trend: str  # rises, falls, barely rises, barely falls, flat, unknown
    trends: list[Trend]
    findings: list[Finding]
    not_recorded: list[str]

    def of(self, *severities: str) -> list[Finding]:
        """The findings of these severities."""
        return [finding for finding in self.findings if finding.severity in severities]


def diagnose(run: Path) -> Answer:
    """Run all checks; the findings are sorted by severity, problems first.

    Raises ValueError if `run` is not a run folder or has too few epochs, NotRecorded if it has no
    reward, and KeyError if its config lacks a key.
    """
    metrics, config = read_run(run)

    # Checks that cannot run are listed by the missing value.
    findings: list[Finding] = []
    skipped: dict[str, list[str]] = {}
    for check in REWRITER_CHECKS if config["stage"] == "rewriter" else CHECKS:
        try:
            finding = check(metrics, config)
        except NotRecorded as error:
            skipped.setdefault(str(error), []).append(check.__name__)
            continue
        if finding is not None:
            findings.append(finding)

    # A note can explain why a reward does not rise, but not why it falls.
    explanations = {PROBLEM} if metrics.worsens else {PROBLEM, NOTE}
    explained = any(finding.severity in explanations for finding in findings)
    if metrics.direction != UNKNOWN and not metrics.improves and not explained:
        findings.append(no_cause(metrics, config))

    order = (PROBLEM, NOTE, FINE)
    findings.sort(key=lambda finding: order.index(finding.severity))
    not_recorded = [f"{key} (for {', '.join(checks)})" for key, checks in skipped.items()]
    return Answer(
        run=str(run),
        verdict=verdict(metrics, config),
        trend=metrics.direction,
        trends=metrics.trends,
        findings=findings,
        not_recorded=not_recorded,
    )


def no_cause(metrics: Metrics, config: dict) -> Finding:
    """Return the finding for a goal that does not improve although no check explains why."""
    trend = metrics.trends[0]
    sign = -1 if metrics.lower_is_better else 1
    better = "fall" if metrics.lower_is_better else "rise"
    healthy = f"> {trend.margin:.2g}, the noise"
    figures = [Figure(f"{better} an epoch", sign * trend.slope, healthy, trend.epochs)]

    hidden = max(0.0, sign * trend.slope + trend.margin)
    says = (
        f"No check explains it. A {better} of up to {hidden:.2g} per epoch could hide in the noise "
        f"of {trend.where}."
    )
    calls = 2 * config["sample"]["num_batches_per_epoch"]
    accumulation = 2 * config["train"]["gradient_accumulation_steps"]
    learning_rate = 2 * config["train"]["learning_rate"]
    remedy = (
        f"Use more pictures per step (--config.sample.num_batches_per_epoch={calls} "
        f"--config.train.gradient_accumulation_steps={accumulation}), more epochs, or "
        f"--config.train.learning_rate={learning_rate:g}. Look at RUN/samples to see whether high "
        "scores mean better pictures at all."
    )
    severity = PROBLEM if metrics.worsens else NOTE
    return Finding("no cause found", severity, figures, says, remedy)


def verdict(metrics: Metrics, config: dict) -> str:
    """Describe the trend of the reward, or of what judges the run instead, in a few sentences."""
    goal = "The reward" if metrics.goal == REWARD else metrics.goal
    if metrics.lower_is_better:
        goal += " (lower is better)"
    direction = metrics.direction
    if direction == UNKNOWN:
        sentences = ["Whether the run improves is unknown: too few evaluations of a check."]
    elif direction == "flat" and metrics.goal == REWARD:
        sentences = ["The reward does not rise: any trend is lost in the noise."]
    elif direction == "flat":
        sentences = [f"{goal} does not change: any trend is lost in the noise."]
    elif direction.startswith("barely"):
        sentences = [f"{goal} {direction}, by too little to see in the pictures."]
    else:
        sentences = [f"{goal} {direction}."]

    sentences += [_trend_sentence(metrics, trend) for trend in metrics.trends]
    learned = config["reward"].get("adversarial", {})  # missing in older runs
    if learned:
        sentences.append(
            f"{', '.join(learned)} learned during the run, so the level of this reward says "
            "little; rely on the held-out checks."
        )

    names = [name for name in config["reward"]["fn"] if name not in learned]
    if len(config["reward"]["fn"]) > 1 and names:
        directions = []
        for name in names:
            trend = metrics.trend(f"reward/{name}", metrics.recent(f"reward_std/{name}"))
            directions.append(f"{name} {trend.direction}")
        sentences.append(f"Each reward in training: {', '.join(directions)}.")
    return " ".join(sentences)


def _trend_sentence(metrics: Metrics, trend: Trend) -> str:
    """Describe one trend of the goal in numbers."""
    effect = ""
    if not metrics.lower_is_better:
        where = "within a group" if metrics.goal == REWARD else "over pictures"
        effect = f", which is {abs(trend.effect):.2g} times the spread {where}"
    return (
        f"In {trend.where}, epochs {trend.epochs}: {trend.slope:+.2g} per epoch (standard error "
        f"{trend.error:.1g}), {trend.rise:+.2g} in all{effect}."
    )
