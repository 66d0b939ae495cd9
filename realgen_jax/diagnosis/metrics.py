"""A run's metrics as diagnose.py reads them: series, recent medians, and the reward's trend."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

MIN_EPOCHS = (
    4  # a line through two points has no uncertainty, one through three hardly any evidence
)
QUANTILE = 0.975  # of Student's t: a slope counts when significant at 5 %, two-sided
SMALL_EFFECT = (
    0.2  # of the spread within a group: Cohen's "small" effect; less cannot be seen in the pictures
)


class NotRecorded(LookupError):
    """A figure that the run's metrics do not hold."""


@dataclass(frozen=True)
class Trend:
    """A least-squares line over epochs. `rise` is over the whole span, `effect` the same over the spread in a group."""

    where: str
    epochs: str
    slope: float
    error: float  # the slope's standard error
    margin: float  # half of its 95 % interval
    rise: float
    effect: float

    @property
    def word(self) -> str:
        if abs(self.slope) <= self.margin:
            return "flat"
        grows = "rises" if self.slope > 0 else "falls"
        return grows if abs(self.effect) >= SMALL_EFFECT else f"barely {grows}"


class Metrics:
    """The rows of metrics.jsonl. "Recent" is the median over the last third of the epochs."""

    def __init__(self, rows: list[dict[str, Any]]):
        self.rows = {
            kind: [row for row in rows if row["kind"] == kind] for kind in ("train", "eval")
        }

    def series(self, key: str, kind: str = "train") -> tuple[np.ndarray, np.ndarray]:
        """(epochs, values) of the rows that hold a finite value. Raises NotRecorded where none does."""
        found = [
            (row["epoch"], row[key]) for row in self.rows[kind] if np.isfinite(row.get(key, np.nan))
        ]
        if not found:
            raise NotRecorded(f"{kind} {key}")
        epochs, values = np.array(found, np.float64).T
        return epochs, values

    @property
    def window(self) -> int:
        return max(2, len(self.rows["train"]) // 3)

    @property
    def recently(self) -> str:
        return span([row["epoch"] for row in self.rows["train"][-self.window :]])

    def recent(self, key: str) -> float:
        return float(np.median(self.series(key)[1][-self.window :]))

    def trend(self, key: str, spread: float, kind: str = "train") -> Trend:
        """Raises NotRecorded where there are fewer than three values."""
        epochs, values = self.series(key, kind)
        if len(epochs) < 3:
            raise NotRecorded(f"three rows of {kind} {key}")
        x, y = epochs - epochs.mean(), values - values.mean()
        slope, free = float(x @ y / (x @ x)), len(x) - 2
        error = float(np.sqrt(np.sum((y - slope * x) ** 2) / free / (x @ x)))
        rise = slope * float(np.ptp(epochs))
        where = "training" if kind == "train" else "evaluations"
        return Trend(
            where,
            span(epochs),
            slope,
            error,
            float(stdtrit(free, QUANTILE)) * error,
            rise,
            rise / max(spread, 1e-12),
        )

    @cached_property
    def trends(self) -> list[Trend]:
        """The reward's, in training and, where there are three or more, in evaluations: same prompts, same noise."""
        spread = float(np.median(self.series("reward_std")[1]))
        found = [self.trend("reward", spread)]
        try:
            return [*found, self.trend("reward", spread, "eval")]
        except NotRecorded:
            return found

    @cached_property
    def word(self) -> str:
        """rises, falls, barely rises, barely falls or flat: what either trend shows, a fall first."""
        words = [trend.word for trend in self.trends]
        return next(
            (w for w in ("falls", "rises", "barely falls", "barely rises") if w in words), "flat"
        )

    @property
    def rises(self) -> bool:
        return self.word == "rises"


def span(epochs: Any) -> str:
    return f"{int(min(epochs))}-{int(max(epochs))}"


def read_run(run: Path) -> tuple[Metrics, dict]:
    """(metrics, config). Raises ValueError for what is no run folder, or too young a run."""
    for name in ("config.json", "metrics.jsonl"):
        if not (run / name).is_file():
            raise ValueError(
                f"{run} is no run folder: it has no {name}; expected what train.py leaves, runs/NAME"
            )
    rows = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # still being written, or cut off by a kill
            break
    metrics = Metrics(rows)
    if (found := len(metrics.rows["train"])) < MIN_EPOCHS:
        raise ValueError(
            f"{run} holds {found} finished epochs; expected {MIN_EPOCHS} or more (a run that ended earlier because "
            "values were not finite needs a lower --config.train.learning_rate)"
        )
    return metrics, json.loads((run / "config.json").read_text())
