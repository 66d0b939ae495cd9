"""The report's figures, by plotly. The page draws them where they come into view, in its own light or dark colours."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from ml_collections import ConfigDict

from realgen_jax.diagnosis.metrics import Metrics, NotRecorded
from realgen_jax.realbench.aggregate import ALL, MEAN, Row
from realgen_jax.realbench.results import Evaluated
from realgen_jax.training.log import short_name

# of entries, on white and on black; readable beside one another for colour-blind people too
COLOURS = ["#6b7280", "#2563eb", "#c2570c", "#0f8a6a", "#8b44c9", "#b8257a", "#8a6d0b", "#0e7490"]
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
BINS = 32
HEIGHT = 232


def colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def _layout(height: int, **more: Any) -> dict[str, Any]:
    margin = {"l": 44, "r": 12, "t": 8, "b": 28}
    return {"height": height, "margin": margin, "showlegend": False, **more}


def _plain(figure: go.Figure) -> dict[str, Any]:
    """As JSON without plotly's own template: the page brings one."""
    found = json.loads(figure.to_json())
    found["layout"].pop("template", None)
    return found


def distributions(evaluated: Evaluated) -> dict[str, dict[str, dict]]:
    """{set: {reward: histograms of all entries, each adding up to 100 %}}."""
    names, found = [one.name for one in evaluated.sets], {}
    for name in [*names, ALL] if len(names) > 1 else names:
        found[name] = {}
        for reward in evaluated.rewards:
            scores = {
                one.name: [
                    p.scores[reward]
                    for p in evaluated.pictures
                    if p.entry == one.name and name in (p.set, ALL)
                ]
                for one in evaluated.entries
            }
            every = np.concatenate([np.float64(values) for values in scores.values()])
            if not len(every):
                continue
            low, high = float(every.min()), float(every.max())
            span = (
                (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)
            )  # probabilities are shown as such
            edges = np.histogram_bin_edges(every, BINS, span)
            figure = go.Figure(layout=_layout(HEIGHT, hovermode="x unified"))
            for place, (entry, values) in enumerate(scores.items()):
                if values:
                    share = 100 * np.histogram(values, edges)[0] / len(values)
                    figure.add_scatter(
                        x=np.repeat(edges, 2),
                        y=np.concatenate([[0], np.repeat(share, 2), [0]]),
                        name=entry,
                        mode="lines",
                        line={"color": colour(place), "width": 1.75},
                        fill="tozeroy",
                        fillcolor=_faint(colour(place)),
                        hovertemplate="%{y:.1f} %",
                    )
                    mean = float(np.mean(values))
                    line = {"color": colour(place), "width": 1.5, "dash": "dot"}
                    figure.add_shape(
                        type="line", x0=mean, x1=mean, y0=0, y1=1, yref="paper", line=line
                    )
            figure.update_yaxes(ticksuffix=" %", rangemode="tozero", nticks=5)
            figure.update_xaxes(range=[float(edges[0]), float(edges[-1])], nticks=6)
            found[name][reward] = _plain(figure)
    return found


def _faint(hexadecimal: str) -> str:
    red, green, blue = (int(hexadecimal[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.10)"


def categories(rows: Sequence[Row], entries: Sequence[str]) -> dict[str, dict[str, dict]]:
    """{set: {measure: means with intervals by category}}; empty where there are no categories."""
    found: dict[str, dict[str, dict]] = {}
    cells: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.category and row.kind == MEAN and row.pictures:
            cells.setdefault((row.set, row.measure), []).append(row)
    for (name, measure), own in cells.items():
        labels = sorted({row.category for row in own}, reverse=True)
        figure = go.Figure(
            layout=_layout(70 + len(labels) * (14 + 13 * len(entries)), hovermode="closest")
        )
        for place, entry in enumerate(entries):
            at = {row.category: row for row in own if row.entry == entry}
            shown = [label for label in labels if label in at]
            value, low, high = (
                np.array([getattr(at[c], key) for c in shown]) for key in ("value", "low", "high")
            )
            offset = (len(entries) - 1) / 2 - place
            figure.add_scatter(
                x=value,
                y=[labels.index(label) + 0.6 * offset / max(1, len(entries)) for label in shown],
                error_x={
                    "type": "data",
                    "array": high - value,
                    "arrayminus": value - low,
                    "thickness": 1.5,
                    "width": 0,
                },
                mode="markers",
                marker={"color": colour(place), "size": 8},
                name=entry,
                customdata=[[c, at[c].pictures] for c in shown],
                hovertemplate="%{customdata[0]}: %{x:.3f} (%{customdata[1]} pictures)",
            )
        figure.update_yaxes(
            tickvals=list(range(len(labels))),
            ticktext=labels,
            range=[-0.6, len(labels) - 0.4],
            automargin=True,
        )
        figure.update_xaxes(nticks=6)
        found.setdefault(name, {})[measure] = _plain(figure)
    return found


def curves(folder: Path, config: ConfigDict) -> list[dict[str, Any]]:
    """[{name, role, figure}] of the run's rewards and checks over its epochs; empty where `folder` is no run."""
    file, rows = folder / "metrics.jsonl", []
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # still being written, or cut off by a kill
            break
    metrics, found = Metrics(rows), []
    weights = config.reward.fn
    roles = [(name, "trained on") for name in sorted(weights, key=lambda name: -weights[name])]
    roles += [(name, "held out") for name in config.reward.held_out]
    roles += [(name, "check, lower is better") for name in config.reward.metrics]
    for name, role in roles:
        place = 1 if role == "trained on" else 2
        figure = go.Figure(layout=_layout(HEIGHT, hovermode="x unified"))
        for key, kind, label in (
            (f"reward/{name}", "train", "while training"),
            (name, "eval", "test prompts"),
        ):
            try:
                epochs, values = metrics.series(key, kind)
            except NotRecorded:
                continue
            test = kind == "eval"
            figure.add_scatter(
                x=epochs,
                y=values,
                name=label,
                mode="lines+markers" if test else "lines",
                line={"color": colour(place if test else 0), "width": 2.25 if test else 1},
                marker={"size": 7},
                hovertemplate="%{y:.3f}",
                cliponaxis=False,
            )
        if figure.data:
            figure.update_xaxes(
                title={"text": "epoch", "standoff": 4}, nticks=7, rangemode="tozero"
            )
            if max(trace.x[-1] for trace in figure.data) < 8:
                figure.update_xaxes(dtick=1)  # whole epochs
            figure.update_yaxes(nticks=5)
            every = np.concatenate([np.float64(trace.y) for trace in figure.data])
            if (
                np.ptp(every) < 1e-6
            ):  # else plotly's axis would reach from nought to twice the value
                figure.update_yaxes(range=[every[0] - 0.05, every[0] + 0.05])
            found.append({"name": short_name(name), "role": role, "figure": _plain(figure)})
    return found


def arena_matrix(matches: Sequence[Any], entries: Sequence[str]) -> dict[str, Any]:
    """How often the row's picture was preferred to the column's."""
    met = [name for name in entries if any(name in (m.a, m.b) for m in matches)]
    rate = np.full((len(met), len(met)), np.nan)
    for m in matches:
        rate[met.index(m.a), met.index(m.b)] = m.win_rate
        rate[met.index(m.b), met.index(m.a)] = 1 - m.win_rate
    text = [["" if np.isnan(value) else f"{100 * value:.0f} %" for value in line] for line in rate]
    figure = go.Figure(
        go.Heatmap(
            z=[[None if np.isnan(value) else float(value) for value in line] for line in rate],
            x=met,
            y=met,
            text=text,
            texttemplate="%{text}",
            textfont={"size": 14},
            zmin=0,
            zmax=1,
            colorscale=[[0, "#c2570c"], [0.5, "#f3f1ec"], [1, "#2563eb"]],
            showscale=False,
            xgap=3,
            ygap=3,
            hovertemplate="%{y} preferred to %{x}: %{text}<extra></extra>",
            hoverongaps=False,
        ),
        layout=_layout(max(HEIGHT, 60 + 56 * len(met))),
    )
    figure.update_yaxes(autorange="reversed", automargin=True, showgrid=False, ticks="")
    figure.update_xaxes(side="top", automargin=True, showgrid=False, ticks="")
    return _plain(figure)


def arena_ratings(ratings: Sequence[Any], entries: Sequence[str]) -> dict[str, Any]:
    """Ratings with their intervals, the best one on top."""
    order = sorted(ratings, key=lambda one: one.rating)
    value, low, high = (
        np.array([getattr(one, key) for one in order]) for key in ("rating", "low", "high")
    )
    colours = [colour(entries.index(one.entry)) for one in order]
    figure = go.Figure(layout=_layout(max(HEIGHT, 60 + 56 * len(order)), hovermode="closest"))
    for i, one in enumerate(order):  # an error bar has one colour a trace
        bar = {"type": "data", "array": [high[i] - value[i]], "arrayminus": [value[i] - low[i]]}
        figure.add_scatter(
            x=[value[i]],
            y=[one.entry],
            error_x={**bar, "thickness": 2, "width": 0, "color": colours[i]},
            mode="markers+text",
            text=[f"{value[i]:.0f}"],
            textposition="top center",
            marker={"color": colours[i], "size": 11},
            hovertemplate=f"%{{y}}: %{{x:.0f}} [{low[i]:.0f}, {high[i]:.0f}]<extra></extra>",
        )
    figure.update_yaxes(automargin=True, range=[-0.6, len(order) - 0.4])
    figure.update_xaxes(nticks=6)
    return _plain(figure)
