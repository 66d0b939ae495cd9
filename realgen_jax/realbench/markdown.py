"""The report as Markdown."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from realgen_jax.realbench.aggregate import Row
from realgen_jax.realbench.formatting import number, percent, points, signed
from realgen_jax.realbench.results import Results
from realgen_jax.realbench.standings import Standings
from realgen_jax.realbench.tables import (
    PROBLEM_KINDS,
    leaderboard_tables,
    nearby,
    problem_counts,
    title,
)

MATCH_COUNTS = ("wins", "losses", "ties", "pairs", "refused", "unreadable", "incomplete")


def markdown(
    folder: Path,
    facts: Sequence[tuple[str, str]],
    results: Results,
    rows: Sequence[Row],
    standings: Standings | None,
) -> str:
    """Return the whole report. facts: (name, value); standings: None without an arena."""
    lines = [
        f"# RealBench: {title(results)}",
        "",
        f"{folder.name}. Page: index.html; numbers: leaderboard.csv, scores.csv.",
        "",
    ]
    lines += [f"- {name}: {value}" for name, value in facts]
    for entry in results.entries:
        prompts = f", prompts by {nearby(entry.rewriter)}" if entry.rewriter else ""
        lines.append(f"- Entry {entry.name}: {entry.kind}, {nearby(entry.source)}{prompts}")
    lines += ["", *_leaderboard(results, rows)]
    lines += _problems(results)
    if standings is not None:
        lines += ["", *_arena(standings)]
    return "\n".join(lines).rstrip() + "\n"


def _leaderboard(results: Results, rows: Sequence[Row]) -> list[str]:
    lines = [
        "## Leaderboard",
        "",
        "Means over pictures [interval], then the difference from the first entry over the prompts",
        "that both have [interval]. A * marks differences whose interval does not contain 0.",
        "",
    ]
    header = ["measure", *(entry.name for entry in results.entries)]
    for table in leaderboard_tables(rows):
        body = [[f"{line['measure']}, {line['kind']}", *_cells(line)] for line in table["lines"]]
        counts = [f"{row.pictures} / {row.prompts}" for row in table["entries"]]
        body.append(["pictures / prompts", *counts])
        heading = f"### {table['set']}"
        if table["category"]:
            heading += f", {table['category']}"
        lines += [heading, "", *_table(header, body), ""]
    return lines


def _cells(line: dict[str, Any]) -> list[str]:
    """The cells of one measure for all entries: value [interval]; difference [interval]."""
    kind = line["kind"]
    cells = []
    for column in line["columns"]:
        row = column["row"]
        text = f"{number(row.value, kind)} [{number(row.low, kind)}, {number(row.high, kind)}]"
        if not math.isnan(row.difference):
            low = signed(row.difference_low, kind)
            high = signed(row.difference_high, kind)
            text += f"; {signed(row.difference, kind)} [{low}, {high}]"
            if column["sure"]:
                text += "*"
        cells.append(text)
    return cells


def _problems(results: Results) -> list[str]:
    header = ["entry", "set", "pictures", "prompts", *PROBLEM_KINDS]
    body = []
    for count in problem_counts(results):
        prompts = f"{count['prompts']} of {count['of']}"
        problems = [count[kind] for kind in PROBLEM_KINDS]
        body.append([count["entry"], count["set"], count["pictures"], prompts, *problems])
    lines = ["## Pictures behind the numbers", "", *_table(header, body)]

    if results.problems:
        lines.append("")
    for problem in results.problems:
        detail = f" ({problem.detail})" if problem.detail else ""
        file = problem.file.name
        lines.append(f"- {problem.entry}, {problem.set}: {file} {problem.kind}{detail}")
    return lines


def _arena(standings: Standings) -> list[str]:
    # -- Matches.
    matches = []
    for match in standings.matches:
        rate = f"{percent(match.win_rate)} [{percent(match.low)}, {percent(match.high)}]"
        counts = [getattr(match, name) for name in MATCH_COUNTS]
        matches.append([f"{match.a} against {match.b}", rate, *counts])

    # -- Ratings.
    ratings = []
    for rating in standings.ratings:
        interval = f"[{points(rating.low)}, {points(rating.high)}]"
        ratings.append([rating.entry, f"{points(rating.rating)} {interval}"])

    share, low, high = (percent(value) for value in standings.first_share)
    return [
        "## Arena",
        "",
        f"Judge {standings.judge}, protocol {standings.protocol}. A tie counts as half a win.",
        "",
        *_table(["match", "win rate", *MATCH_COUNTS], matches),
        "",
        *_table(["entry", "rating"], ratings),
        "",
        f"The picture shown first was chosen in {share} [{low}, {high}].",
        "",
        "Answers:",
        "",
        *(f"- {name}: {count}" for name, count in standings.counts.items()),
    ]


def _table(header: Sequence[Any], body: Iterable[Sequence[Any]]) -> list[str]:
    lines = [_row(header), "|" + " --- |" * len(header)]
    lines += [_row(cells) for cells in body]
    return lines


def _row(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
