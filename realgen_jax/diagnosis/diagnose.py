"""Why does my reward not rise? Reads a run's metrics and answers in words, with the figures behind each finding.

    python scripts/diagnose.py runs/NAME             for people
    python scripts/diagnose.py runs/NAME --json      the same for programs

Reads RUN/config.json and RUN/metrics.jsonl, also while the run goes on; loads neither JAX nor PyTorch. Exit status: 0
for healthy or notes only, 1 for problems, 2 if RUN cannot be judged. The checks and their thresholds are in diagnosis/.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from realgen_jax.diagnosis import rewards, update
from realgen_jax.diagnosis.finding import FINE, NOTE, PROBLEM, Figure, Finding
from realgen_jax.diagnosis.metrics import Metrics, NotRecorded, Trend, read_run

# Causes before effects: within a severity, this is the order of the answer.
CHECKS: tuple[Callable[[Metrics, dict], Finding | None], ...] = (
    rewards.zero_spread, rewards.drowned_reward, rewards.reward_noise, update.ratio_deviation, update.clip_range,
    update.no_gradient, update.step_size, update.kl_penalty, update.gradient_norm, update.clip_fraction,
    update.one_sided_clipping, rewards.held_out, rewards.held_out_correlation, rewards.diversity,
)  # fmt: skip
STYLES = {PROBLEM: "bold red", NOTE: "bold yellow", FINE: "green"}


@dataclass(frozen=True)
class Answer:
    run: str
    verdict: str
    trend: str  # rises, falls, barely rises, barely falls, flat
    trends: list[Trend]
    findings: list[Finding]
    not_recorded: list[str]

    def of(self, *severities: str) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity in severities]


def diagnose(run: Path) -> Answer:
    """All findings, problems first. Raises ValueError for a folder that cannot be judged."""
    m, config = read_run(run)
    findings, missing = [], {}
    for check in CHECKS:
        try:
            findings.append(check(m, config))
        except NotRecorded as error:
            missing.setdefault(str(error), []).append(check.__name__)
    findings = [finding for finding in findings if finding]
    explains = (PROBLEM,) if m.word == "falls" else (PROBLEM, NOTE)
    if not m.rises and not any(finding.severity in explains for finding in findings):
        findings.append(no_cause(m, config))
    findings.sort(key=lambda finding: (PROBLEM, NOTE, FINE).index(finding.severity))
    gone = [f"{key} (for {', '.join(names)})" for key, names in missing.items()]
    return Answer(str(run), verdict(m, config), m.word, m.trends, findings, gone)


def no_cause(m: Metrics, config: dict) -> Finding:
    """For a reward that does not rise although no check finds a problem."""
    trend, s, t = m.trends[0], config["sample"], config["train"]
    most = max(0.0, trend.slope + trend.margin)
    figures = [
        Figure("rise an epoch", trend.slope, f"> {trend.margin:.2g}, the noise", trend.epochs)
    ]
    says = f"None of the checks says why. A rise of up to {most:.2g} an epoch could hide in the noise of training."
    remedy = (
        f"More pictures a step: --config.sample.num_batches_per_epoch={2 * s['num_batches_per_epoch']} "
        f"--config.train.gradient_accumulation_steps={2 * t['gradient_accumulation_steps']}; more epochs; "
        f"--config.train.learning_rate={2 * t['learning_rate']:g}. Look in RUN/samples whether high scores mean better "
        "pictures at all."
    )
    return Finding("no cause found", PROBLEM if m.word == "falls" else NOTE, figures, says, remedy)


def verdict(m: Metrics, config: dict) -> str:
    lead = f"The reward {m.word}" + ", by too little to see" * m.word.startswith("barely")
    text = [
        "The reward does not rise: its trend is lost in the noise."
        if m.word == "flat"
        else f"{lead}."
    ]
    for t in m.trends:
        text.append(
            f"In {t.where}, epochs {t.epochs}: {t.slope:+.2g} an epoch (standard error {t.error:.1g}), {t.rise:+.2g} "
            f"in all, {abs(t.effect):.2g} of the spread within a group."
        )
    if learning := config["reward"].get(
        "adversarial"
    ):  # runs from before there were such have no key
        text.append(
            f"{', '.join(learning)} learnt meanwhile, so that the level of this reward says little; what is held out "
            "says more."
        )
    if len(names := config["reward"]["fn"]) > 1:
        each = (f"{n} {m.trend(f'reward/{n}', m.recent(f'reward_std/{n}')).word}" for n in names)
        text.append(f"One by one, in training: {', '.join(each)}.")
    return " ".join(text)


def show(answer: Answer, console: Console) -> None:
    def say(text: str, style: str = "", indent: str = "") -> None:
        text = textwrap.fill(
            text,
            console.width,
            initial_indent=indent,
            subsequent_indent=indent,
            break_on_hyphens=False,
        )
        console.print(escape(text), style=style or None, soft_wrap=True)

    say(answer.verdict, "bold")
    if not answer.of(PROBLEM, NOTE):
        say("Healthy: nothing was found.", STYLES[FINE])
    for finding in answer.of(PROBLEM, NOTE):
        say("")
        say(f"{finding.severity}: {finding.name}", STYLES[finding.severity])
        for text in (finding.says, *map(in_words, finding.figures), f"To do: {finding.remedy}"):
            say(text, indent="  ")
    if fine := answer.of(FINE):
        say("")
        say("fine:", STYLES[FINE])
    for finding in fine:
        short = (
            f"{f.what} {f.value:.3g}" + f" ({f.healthy})" * bool(f.healthy) for f in finding.figures
        )
        say(f"{finding.name}: {'; '.join(short)}", indent="  ")
    if answer.not_recorded:
        say("")
        say(f"not recorded: {'; '.join(answer.not_recorded)}")


def in_words(f: Figure) -> str:
    return (
        f"{f.what}: {f.value:.3g}"
        + f", healthy {f.healthy}" * bool(f.healthy)
        + f" (epochs {f.epochs})"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run's folder, runs/NAME")
    parser.add_argument("--json", action="store_true", help="print JSON")
    words = parser.parse_args()
    try:
        answer = diagnose(words.run)
    except NotRecorded as error:
        print(
            f"error: {words.run} does not hold {error}; expected the metrics of train.py",
            file=sys.stderr,
        )
        return 2
    except KeyError as error:
        print(
            f"error: {words.run} has no key {error} in config.json or metrics.jsonl; expected train.py's",
            file=sys.stderr,
        )
        return 2
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if words.json:
        print(json.dumps(asdict(answer), indent=2))
    else:
        show(answer, Console(highlight=False))
    return 1 if answer.of(PROBLEM) else 0


if __name__ == "__main__":
    sys.exit(main())
