"""The results of an evaluation: leaderboard, arena and report."""

import math
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from realgen_jax.realbench.aggregate import ALL, CATEGORIES, MEAN, Row, leaderboard
from realgen_jax.realbench.arena import judge_all, protocol_for
from realgen_jax.realbench.interfaces import Judge
from realgen_jax.realbench.results import Judgement, Problem, Results
from realgen_jax.realbench.standings import Standings, standings
from realgen_jax.training.log import short_name

# Streams of the root key, in addition to the pictures' noise.
RESAMPLES = 0
ARENA = 1
STANDINGS = 2


def summarize(
    config: ConfigDict,
    results: Results,
    folder: Path,
    *,
    judge: Judge | None,
    seed: int,
    console: Console,
) -> Path:
    """Print the leaderboard, run the arena if there is a judge, and write the report.

    Returns the report's index.html, in `folder`/report. Raises ValueError if no picture was scored.
    """
    # -- Leaderboard.
    rows = leaderboard(results, config.evaluate, generator(seed, RESAMPLES))
    print_leaderboard(rows, results, console)
    print_category_means(rows, console)
    for name, value in results.facts:
        console.print(f"{name}: {value}", soft_wrap=True)
    print_problems(results.problems, console)

    # -- Arena.
    judgements: list[Judgement] = []
    table = None
    if judge is not None:
        judgements, table = _run_arena(config, results, folder, judge, seed, console)

    # -- Report. Imported here: plotly is slow to import, and training needs it only at its end.
    from realgen_jax.realbench.report import write_report

    return write_report(folder, config, results, rows, table, judgements, seed=seed)


def _run_arena(
    config: ConfigDict, results: Results, folder: Path, judge: Judge, seed: int, console: Console
) -> tuple[list[Judgement], Standings]:
    """Judge all pairs and aggregate the answers."""

    def say(text: str) -> None:
        console.print(text, soft_wrap=True)

    judgements = judge_all(
        results,
        judge,
        config.evaluate.arena,
        folder / "evaluation" / "arena",
        seed=int(generator(seed, ARENA).integers(2**31)),
        say=say,
    )
    table = standings(
        judgements,
        [entry.name for entry in results.entries],
        config.evaluate,
        generator(seed, STANDINGS),
        judge=judge.name,
        protocol=protocol_for(judge, config.evaluate.arena).name,
    )
    print_matches(table, console)
    return judgements, table


def generator(seed: int, stream: int) -> np.random.Generator:
    """Return numpy's generator, seeded from a stream of the root key."""
    key = jax.random.fold_in(jax.random.key(seed), stream)
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def print_leaderboard(rows: Sequence[Row], results: Results, console: Console) -> None:
    """Print the means over all sets, plus or minus half their intervals, one row per entry.

    Says so if there are no intervals.
    """
    overall = ALL if len(results.sets) > 1 else results.sets[0].name
    means = {}
    for row in rows:
        if (row.set, row.category, row.kind) == (overall, "", MEAN):
            means[row.entry, row.measure] = row

    table = Table(box=None, pad_edge=False)
    table.add_column("entry")
    table.add_column("pictures", justify="right")
    for reward in results.rewards:
        table.add_column(short_name(reward), justify="right")
    for entry in results.entries:
        count = sum(picture.entry == entry.name for picture in results.pictures)
        cells = []
        for reward in results.rewards:
            row = means[entry.name, reward]
            has_interval = not math.isnan(row.low)
            interval = f" ±{(row.high - row.low) / 2:.3f}" if has_interval else ""
            cells.append(f"{row.value:.3f}{interval}")
        table.add_row(entry.name, str(count), *cells)
    console.print(table)
    if any(math.isnan(row.low) for row in means.values()):
        console.print(
            "no interval: that needs pictures of two prompts and config.evaluate.resamples",
            soft_wrap=True,
        )


def print_category_means(rows: Sequence[Row], console: Console) -> None:
    """Print one line for each mean over categories, if there are any."""
    for row in rows:
        if row.kind == CATEGORIES:
            has_interval = not math.isnan(row.low)
            interval = f" [{row.low:.3f}, {row.high:.3f}]" if has_interval else ""
            console.print(
                f"{row.entry}, {row.set}: {short_name(row.measure)} {row.value:.3f}{interval}, "
                "mean over categories",
                soft_wrap=True,
            )


def print_problems(problems: Sequence[Problem], console: Console) -> None:
    """Print one warning for each entry, set and kind of problem."""
    groups: dict[tuple[str, str, str], list[Problem]] = {}
    for problem in problems:
        groups.setdefault((problem.entry, problem.set, problem.kind), []).append(problem)
    for (entry, set_name, kind), group in groups.items():
        text = (
            f" {entry}, {set_name}: {len(group)} {kind}, the first is {group[0].file} "
            f"({group[0].detail})"
        )
        console.print(Text.assemble(("warning", "bold red"), text), soft_wrap=True)


def print_matches(table: Standings, console: Console) -> None:
    """Print one line per match: the win rate and what it is based on."""
    for match in table.matches:
        has_interval = not math.isnan(match.low)
        interval = f" [{100 * match.low:.1f}, {100 * match.high:.1f}]" if has_interval else ""
        console.print(
            f"{match.a} against {match.b}: wins {100 * match.win_rate:.1f} %{interval} of "
            f"{match.pairs} pairs ({match.wins} won, {match.losses} lost, {match.ties} ties); "
            f"judge: {table.judge} ({table.protocol})",
            soft_wrap=True,
        )
