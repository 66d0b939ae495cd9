"""The report's plotly figures.

The page draws them when they scroll into view, in its own light or dark colours.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from ml_collections import ConfigDict

from realgen_jax.diagnosis.metrics import Metrics, NotRecorded
from realgen_jax.files import read_jsonl
from realgen_jax.realbench.aggregate import ALL, MEAN, Row
from realgen_jax.realbench.formatting import points
from realgen_jax.realbench.results import Results
from realgen_jax.realbench.standings import Match, Rating
from realgen_jax.training.log import short_name

# Colour-blind-safe colours of entries, on white and on black.
COLOURS = [
    "#6b7280",
    "#2563eb",
    "#c2570c",
    "#0f8a6a",
    "#8b44c9",
    "#b8257a",
    "#8a6d0b",
    "#0e7490",
]
DARK_COLOURS = [
    "#a3a9b5",
    "#6ea0ff",
    "#f2955a",
    "#45c9a3",
    "#bf93f0",
    "#ee7db8",
    "#d6b84a",
    "#4fc3dc",
]
WIN_RATE_COLOURS = [[0, "#c2570c"], [0.5, "#f3f1ec"], [1, "#2563eb"]]
BINS = 32
HEIGHT = 232  # pixels
SHORT_RUN = 8  # epochs; the axis of shorter runs has a tick at every epoch
# Figures of the update that have a curve if the run recorded them: {metric: (name, role)}.
UPDATE_CURVES = {
    "velocity_norm": ("velocity norm", "1: as the base model"),
    "old_distance": ("distance to the old policy", "update"),
    "kept_share": ("kept share", "of pictures, by dppo"),
    "scout/kept_share": ("kept share", "of pictures, by previews"),
    "scout/rank_correlation": ("previews and pictures", "rank correlation"),
}
Figure = dict[str, Any]  # plotly's JSON
Figures = dict[str, dict[str, Figure]]


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _faint(colour: str) -> str:
    """The colour #rrggbb, nearly transparent."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.10)"


def _figure(height: int, hovermode: str | None = None) -> go.Figure:
    layout = {
        "height": height,
        "margin": {"l": 44, "r": 12, "t": 8, "b": 28},
        "showlegend": False,
    }
    if hovermode is not None:
        layout["hovermode"] = hovermode
    return go.Figure(layout=layout)


def _plain(figure: go.Figure) -> Figure:
    """Return the figure as JSON without plotly's template, because the page has its own."""
    data = json.loads(figure.to_json())
    data["layout"].pop("template", None)
    return data


# --- Distributions of scores


def distributions(results: Results) -> Figures:
    """Return {set: {reward: histograms of all entries, each adding up to 100 %}}."""
    names = [prompt_set.name for prompt_set in results.sets]
    if len(names) > 1:
        names.append(ALL)

    figures: Figures = {}
    for set_name in names:
        figures[set_name] = {}
        for reward in results.rewards:
            scores = _scores_of_entries(results, set_name, reward)
            if any(scores.values()):
                figures[set_name][reward] = _histograms(scores)
    return figures


def _scores_of_entries(results: Results, set_name: str, reward: str) -> dict[str, list[float]]:
    """{entry: scores of its pictures}, in the order of the entries."""
    scores: dict[str, list[float]] = {entry.name: [] for entry in results.entries}
    for picture in results.pictures:
        if set_name in (picture.set, ALL):
            scores[picture.entry].append(picture.scores[reward])
    return scores


def _histograms(scores: Mapping[str, Sequence[float]]) -> Figure:
    """Outlines of every entry's histogram on common bins, and its mean as a dotted line."""
    everything = np.concatenate([np.float64(values) for values in scores.values()])
    low = float(everything.min())
    high = float(everything.max())
    if low >= 0 and high <= 1:  # probabilities
        low, high = 0.0, 1.0
    edges = np.histogram_bin_edges(everything, BINS, (low, high))

    figure = _figure(HEIGHT, "x unified")
    for i, (entry, values) in enumerate(scores.items()):
        if not values:
            continue
        share = 100 * np.histogram(values, edges)[0] / len(values)
        figure.add_scatter(
            x=np.repeat(edges, 2),
            y=np.concatenate([[0], np.repeat(share, 2), [0]]),
            name=entry,
            mode="lines",
            line={"color": colour(i), "width": 1.75},
            fill="tozeroy",
            fillcolor=_faint(colour(i)),
            hovertemplate="%{y:.1f} %",
        )
        mean = float(np.mean(values))
        figure.add_shape(
            type="line",
            x0=mean,
            x1=mean,
            y0=0,
            y1=1,
            yref="paper",
            line={"color": colour(i), "width": 1.5, "dash": "dot"},
        )
    figure.update_yaxes(ticksuffix=" %", rangemode="tozero", nticks=5)
    figure.update_xaxes(range=[float(edges[0]), float(edges[-1])], nticks=6)
    return _plain(figure)


# --- Means by category


def categories(rows: Sequence[Row], entries: Sequence[str]) -> Figures:
    """Return {set: {measure: means with intervals by category}}; empty without categories."""
    rows_of: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row.category and row.kind == MEAN and row.pictures:
            rows_of[row.set, row.measure].append(row)

    figures: Figures = {}
    for (set_name, measure), own_rows in rows_of.items():
        figures.setdefault(set_name, {})[measure] = _category_means(own_rows, entries)
    return figures


def _category_means(rows: Sequence[Row], entries: Sequence[str]) -> Figure:
    """One line per category, with a point for each entry."""
    labels = sorted({row.category for row in rows}, reverse=True)
    height = 70 + len(labels) * (14 + 13 * len(entries))
    figure = _figure(height, "closest")
    for i, entry in enumerate(entries):
        points = sorted(
            (row for row in rows if row.entry == entry), key=lambda row: labels.index(row.category)
        )
        value = np.array([row.value for row in points])
        low = np.array([row.low for row in points])
        high = np.array([row.high for row in points])
        # Entries are spread within their category's line, the first one on top.
        offset = 0.6 * ((len(entries) - 1) / 2 - i) / max(1, len(entries))
        figure.add_scatter(
            x=value,
            y=[labels.index(row.category) + offset for row in points],
            error_x={
                "type": "data",
                "array": high - value,
                "arrayminus": value - low,
                "thickness": 1.5,
                "width": 0,
            },
            mode="markers",
            marker={"color": colour(i), "size": 8},
            name=entry,
            customdata=[[row.category, row.pictures] for row in points],
            hovertemplate="%{customdata[0]}: %{x:.3f} (%{customdata[1]} pictures)",
        )
    figure.update_yaxes(
        tickvals=list(range(len(labels))),
        ticktext=labels,
        range=[-0.6, len(labels) - 0.4],
        automargin=True,
    )
    figure.update_xaxes(nticks=6)
    return _plain(figure)


# --- Reward curves of a training run


def curves(folder: Path, config: ConfigDict) -> list[dict[str, Any]]:
    """Return [{name, role, figure}] of a run's rewards, checks and updates; empty without a run."""
    metrics = Metrics(read_jsonl(folder / "metrics.jsonl"))
    weights = config.reward.fn
    roles = [(name, "trained on") for name in sorted(weights, key=lambda name: -weights[name])]
    roles += [(name, "held out") for name in config.reward.held_out]
    watched = [name for name in config.reward.watched if name not in weights]
    roles += [(name, "watched") for name in watched if name not in config.reward.held_out]
    roles += [(name, "check, lower is better") for name in config.reward.metrics]

    figures = []
    for name, role in roles:
        training = name if name in watched else f"reward/{name}"
        figure = _curve(metrics, name, training, colour(1 if role == "trained on" else 2))
        figures.append({"name": short_name(name), "role": role, "figure": figure})
    for key, (name, role) in UPDATE_CURVES.items():
        figures.append({"name": name, "role": role, "figure": _curve(metrics, key, key, colour(0))})
    return [curve for curve in figures if curve["figure"] is not None]


def _curve(metrics: Metrics, name: str, training: str, main_colour: str) -> Figure | None:
    """One figure over the epochs: thin in training, thick on test prompts. None without rows.

    training: its key in the rows of training epochs.
    """
    figure = _figure(HEIGHT, "x unified")
    series = (
        (training, "train", "while training"),
        (name, "eval", "test prompts"),
    )
    for key, kind, label in series:
        try:
            epochs, values = metrics.series(key, kind)
        except NotRecorded:
            continue
        is_test = kind == "eval"
        figure.add_scatter(
            x=epochs,
            y=values,
            name=label,
            mode="lines+markers" if is_test else "lines",
            line={
                "color": main_colour if is_test else colour(0),
                "width": 2.25 if is_test else 1,
            },
            marker={"size": 7},
            hovertemplate="%{y:.4g}",
            cliponaxis=False,
        )
    if not figure.data:
        return None

    figure.update_xaxes(title={"text": "epoch", "standoff": 4}, nticks=7, rangemode="tozero")
    if max(trace.x[-1] for trace in figure.data) < SHORT_RUN:
        figure.update_xaxes(dtick=1)
    figure.update_yaxes(nticks=5, exponentformat="power")
    # For a constant curve, plotly's axis would range from zero to twice the value.
    everything = np.concatenate([np.float64(trace.y) for trace in figure.data])
    if np.ptp(everything) <= 1e-6 * np.abs(everything).max():
        figure.update_yaxes(range=[everything[0] - 0.05, everything[0] + 0.05])
    return _plain(figure)


# --- Arena


def arena_matrix(matches: Sequence[Match], entries: Sequence[str]) -> Figure:
    """Return how often the row's picture was preferred to the column's."""
    # -- Win rates as a matrix; nan for entries that did not meet.
    met = {match.a for match in matches} | {match.b for match in matches}
    names = [name for name in entries if name in met]
    rate = np.full((len(names), len(names)), np.nan)
    for match in matches:
        rate[names.index(match.a), names.index(match.b)] = match.win_rate
        rate[names.index(match.b), names.index(match.a)] = 1 - match.win_rate

    cells = []
    labels = []
    for row in rate:
        cells.append([None if np.isnan(value) else float(value) for value in row])
        labels.append(["" if np.isnan(value) else f"{100 * value:.0f} %" for value in row])

    # -- The heat map.
    figure = _figure(max(HEIGHT, 60 + 56 * len(names)))
    figure.add_heatmap(
        z=cells,
        x=names,
        y=names,
        text=labels,
        texttemplate="%{text}",
        textfont={"size": 14},
        zmin=0,
        zmax=1,
        colorscale=WIN_RATE_COLOURS,
        showscale=False,
        xgap=3,
        ygap=3,
        hovertemplate="%{y} preferred to %{x}: %{text}<extra></extra>",
        hoverongaps=False,
    )
    figure.update_yaxes(autorange="reversed", automargin=True, showgrid=False, ticks="")
    figure.update_xaxes(side="top", automargin=True, showgrid=False, ticks="")
    return _plain(figure)


def arena_ratings(ratings: Sequence[Rating], entries: Sequence[str]) -> Figure:
    """Return ratings with their intervals, the best one on top."""
    ascending = sorted(ratings, key=lambda rating: rating.rating)
    figure = _figure(max(HEIGHT, 60 + 56 * len(ascending)), "closest")
    for rating in ascending:  # one trace each, because error bars have one colour per trace
        own_colour = colour(entries.index(rating.entry))
        interval = f"[{points(rating.low)}, {points(rating.high)}]"
        figure.add_scatter(
            x=[rating.rating],
            y=[rating.entry],
            error_x={
                "type": "data",
                "array": [rating.high - rating.rating],
                "arrayminus": [rating.rating - rating.low],
                "thickness": 2,
                "width": 0,
                "color": own_colour,
            },
            mode="markers+text",
            text=[points(rating.rating)],
            textposition="top center",
            marker={"color": own_colour, "size": 11},
            hovertemplate=f"%{{y}}: %{{x:.0f}} {interval}<extra></extra>",
        )
    figure.update_yaxes(automargin=True, range=[-0.6, len(ascending) - 0.4])
    figure.update_xaxes(nticks=6)
    return _plain(figure)
