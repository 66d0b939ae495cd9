"""Read a run's metrics: time series, recent medians and the trend of the reward."""

import contextlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from realgen_jax.training.monitor import AUTO, REWARD, monitored

# With two points the slope has no uncertainty, and with three it is hardly evidence.
MIN_EPOCHS = 4
# Quantile of Student's t: a slope counts if it is significant at 5 %, two-sided.
QUANTILE = 0.975
# As a fraction of the spread within a group. This is Cohen's "small" effect; smaller changes are
# not visible in the pictures.
SMALL_EFFECT = 0.2
# A metric of a whole set has no spread over pictures. Evaluations of a run that learns nothing stay
# within this fraction of each other.
METRIC_NOISE = 0.05
UNKNOWN = "unknown"  # a direction


class NotRecorded(LookupError):
    """The run's metrics lack a value. The message names it, such as "train update_norm"."""


@dataclass(frozen=True)
class Trend:
    """A least-squares line through a metric's values over epochs."""

    where: str  # "training" or "evaluations"
    epochs: str
    slope: float  # per epoch
    error: float  # standard error of the slope
    margin: float  # half the width of the slope's 95 % confidence interval
    rise: float  # over all epochs
    effect: float  # the rise divided by the reward's spread within a group, or over pictures

    @property
    def direction(self) -> str:
        """One of "rises", "falls", "barely rises", "barely falls" and "flat"."""
        if abs(self.slope) <= self.margin:
            return "flat"
        direction = "rises" if self.slope > 0 else "falls"
        if abs(self.effect) < SMALL_EFFECT:
            return f"barely {direction}"
        return direction


class Metrics:
    """The rows of metrics.jsonl. "Recent" means the last third of the epochs, and at least two.

    goal: the figure that judges the run: "reward", or a held-out reward or a metric if the rewards
        learn; "" if there is none of these.
    lower_is_better: whether the goal is a metric.
    """

    def __init__(
        self, rows: list[dict[str, Any]], goal: str = REWARD, lower_is_better: bool = False
    ):
        self.goal = goal
        self.lower_is_better = lower_is_better
        self.rows: dict[str, list[dict[str, Any]]] = {"train": [], "eval": []}
        for row in rows:
            if row["kind"] in self.rows:
                self.rows[row["kind"]].append(row)

    def series(self, key: str, kind: str = "train") -> tuple[np.ndarray, np.ndarray]:
        """The epochs and finite values of a metric, float64 [n] each.

        Raises NotRecorded if there is no finite value.
        """
        epochs = []
        values = []
        for row in self.rows[kind]:
            value = row.get(key, np.nan)
            if np.isfinite(value):
                epochs.append(row["epoch"])
                values.append(value)

        if not values:
            raise NotRecorded(f"{kind} {key}")
        return np.array(epochs, np.float64), np.array(values, np.float64)

    def records(self, key: str) -> bool:
        """Whether a training metric is recorded at all: only some runs have it."""
        return any(key in row for row in self.rows["train"])

    @property
    def window(self) -> int:
        """The number of recent epochs."""
        return max(2, len(self.rows["train"]) // 3)

    @property
    def recent_epochs(self) -> str:
        return span(row["epoch"] for row in self.rows["train"][-self.window :])

    def recent(self, key: str) -> float:
        """The median of a training metric over the recent epochs. Raises as `series` does."""
        _, values = self.series(key)
        return float(np.median(values[-self.window :]))

    def trend(self, key: str, spread: float, kind: str = "train") -> Trend:
        """The trend of a metric; `spread` is the reward's standard deviation within a group.

        Raises NotRecorded if there are fewer than three values.
        """
        epochs, values = self.series(key, kind)
        if len(epochs) < 3:
            raise NotRecorded(f"three rows of {kind} {key}")

        # linregress gives no standard error for values that are all the same.
        slope = 0.0
        error = 0.0
        if np.ptp(values) > 0:
            line = stats.linregress(epochs, values)
            slope = float(line.slope)
            error = float(line.stderr)
        rise = slope * float(np.ptp(epochs))
        return Trend(
            where="training" if kind == "train" else "evaluations",
            epochs=span(epochs),
            slope=slope,
            error=error,
            margin=float(stats.t.ppf(QUANTILE, len(epochs) - 2)) * error,
            rise=rise,
            effect=rise / max(spread, 1e-12),
        )

    @cached_property
    def trends(self) -> list[Trend]:
        """The goal's trend in training and, if there are three or more, in evaluations.

        Evaluations use the same prompts and the same noise each time, so their trend is less noisy.
        A goal other than the reward is only evaluated.
        """
        trends = []
        if self.goal == REWARD:
            _, spreads = self.series("reward_std")
            spread = float(np.median(spreads))
            trends.append(self.trend(REWARD, spread))
        with contextlib.suppress(NotRecorded):
            if self.goal != REWARD:
                spread = self._spread_of_goal()
            trends.append(self.trend(self.goal, spread, "eval"))
        return trends

    def _spread_of_goal(self) -> float:
        """The goal's standard deviation over pictures, or for a metric what compares with it."""
        if self.lower_is_better:
            _, values = self.series(self.goal, "eval")
            return METRIC_NOISE / SMALL_EFFECT * float(values[0])
        _, spreads = self.series(f"std/{self.goal}", "eval")
        return float(np.median(spreads))

    @cached_property
    def direction(self) -> str:
        """The goal's direction, by the clearer of the trends; a fall takes precedence.

        UNKNOWN without a trend.
        """
        directions = {trend.direction for trend in self.trends}
        for direction in ("falls", "rises", "barely falls", "barely rises"):
            if direction in directions:
                return direction
        return "flat" if directions else UNKNOWN

    @property
    def improves(self) -> bool:
        """Whether the run gets better by its goal. Raises NotRecorded if that is unknown."""
        if self.direction == UNKNOWN:
            goal = self.goal or "a held-out reward or a metric"
            raise NotRecorded(f"three rows of eval {goal}")
        return self.direction == ("falls" if self.lower_is_better else "rises")

    @property
    def worsens(self) -> bool:
        """Whether the run gets worse by its goal."""
        return self.direction == ("rises" if self.lower_is_better else "falls")


def span(epochs: Iterable[float]) -> str:
    """The first and the last epoch, such as "9-12"."""
    epochs = list(epochs)
    return f"{int(min(epochs))}-{int(max(epochs))}"


def read_run(run: Path) -> tuple[Metrics, dict]:
    """Read metrics.jsonl and config.json of a run.

    Raises ValueError if `run` is not a run folder or has fewer than MIN_EPOCHS finished epochs.
    """
    for name in ("config.json", "metrics.jsonl"):
        if not (run / name).is_file():
            raise ValueError(
                f"{run} is not a run's folder: it has no {name}; expected a folder written by "
                "train.py, such as runs/NAME"
            )

    rows = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # still being written, or cut off when the run was killed
            break

    config = json.loads((run / "config.json").read_text())
    config.setdefault("stage", "diffusion")  # missing in older runs
    metrics = Metrics(rows, *_goal(config["reward"]))
    finished = len(metrics.rows["train"])
    if finished < MIN_EPOCHS:
        raise ValueError(
            f"{run} has {finished} finished epochs; expected {MIN_EPOCHS} or more (if the run "
            "stopped at non-finite values, lower --config.train.learning_rate)"
        )
    return metrics, config


def _goal(reward: dict[str, Any]) -> tuple[str, bool]:
    """Return the goal of a run, and whether lower is better. reward: config.reward.

    A reward that learns is no goal, since its values do not compare over time.
    """
    learned = reward.get("adversarial", {})  # missing in older runs
    monitor = reward.get("monitor", AUTO)  # the same
    goal = monitored(reward | {"adversarial": learned, "monitor": monitor}, reward["metrics"])
    if goal == REWARD and learned:
        return "", False
    return goal, goal in reward["metrics"]
