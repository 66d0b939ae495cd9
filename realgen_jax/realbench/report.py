"""The report of an evaluation: a page for people, Markdown and CSV.

The page, report/index.html, is one file that needs no network.
"""

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import astuple, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup
from ml_collections import ConfigDict
from plotly.offline import get_plotlyjs

from realgen_jax.files import expand_home, write_whole
from realgen_jax.models.model import tuned_steps
from realgen_jax.realbench import plots
from realgen_jax.realbench.aggregate import ALL, CATEGORIES, MEAN, SHARE, Row
from realgen_jax.realbench.formatting import number, percent, points, signed
from realgen_jax.realbench.markdown import markdown
from realgen_jax.realbench.page import main_measure, page_data
from realgen_jax.realbench.results import Judgement, Results
from realgen_jax.realbench.rewrites import write_rewriter_page
from realgen_jax.realbench.standings import Standings
from realgen_jax.realbench.tables import (
    PROBLEM_KINDS,
    certain,
    join_names,
    leaderboard_tables,
    nearby,
    problem_counts,
    title,
)
from realgen_jax.rewriter.records import FILE as REWRITES
from realgen_jax.training.log import short_name

HERE = Path(__file__).parent
LISTED = 200  # maximum number of problems on the page; the Markdown lists all of them


def write_report(
    folder: Path,
    config: ConfigDict,
    results: Results,
    rows: Sequence[Row],
    standings: Standings | None,
    judgements: Sequence[Judgement],
    *,
    seed: int,
) -> Path:
    """Write index.html, report.md, leaderboard.csv and scores.csv to folder/report, or
    the folder of `results.report`.

    Returns the path of the page. standings: None without an arena; seed: the evaluation's seed. If
    `folder` is a run folder, the page includes its reward curves. Raises ValueError if no picture
    was scored.
    """
    if not results.pictures:
        names = ", ".join(entry.name for entry in results.entries)
        raise ValueError(f"no picture of {names} was scored, so there is nothing to report")
    report = folder / results.report
    report.mkdir(parents=True, exist_ok=True)

    # -- CSV, for programs.
    header = [field.name for field in fields(Row)]
    write_csv(report / "leaderboard.csv", header, map(astuple, rows))
    write_scores(report / "scores.csv", results)

    # -- The page and Markdown, for people.
    facts = _facts(config, results, seed)
    text = markdown(folder, facts, results, rows, standings)
    write_whole(report / "report.md", text)
    learnt = _learnt(folder, results, report)
    page = _page(folder, config, facts, results, rows, standings, judgements, learnt)
    write_whole(report / "index.html", page)
    return report / "index.html"


# --- CSV


def write_scores(file: Path, results: Results) -> None:
    """Write one row per picture. Files are named relative to the table's folder."""
    header = ["entry", "set", "line", "copy", "category", "prompt", "file", "width", "height"]
    sets = {prompt_set.name: prompt_set for prompt_set in results.sets}
    lines = []
    for picture in results.pictures:
        prompt_set = sets[picture.set]
        line = [
            picture.entry,
            picture.set,
            picture.line,
            picture.copy,
            prompt_set.categories[picture.line],
            prompt_set.prompts[picture.line],
            os.path.relpath(picture.file, file.parent),
            picture.width,
            picture.height,
        ]
        lines.append(line + [picture.scores[name] for name in results.rewards])
    write_csv(file, [*header, *results.rewards], lines)


def write_csv(file: Path, header: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    """Write a table atomically; nan becomes an empty cell."""
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    writer.writerow(header)
    for line in lines:
        cells = []
        for value in line:
            is_nan = isinstance(value, float) and math.isnan(value)
            cells.append("" if is_nan else value)
        writer.writerow(cells)
    write_whole(file, stream.getvalue())


# --- The page


def _page(
    folder: Path,
    config: ConfigDict,
    facts: Sequence[tuple[str, str]],
    results: Results,
    rows: Sequence[Row],
    standings: Standings | None,
    judgements: Sequence[Judgement],
    learnt: str,
) -> str:
    """The page's HTML. learnt: the name of the page about the rewriter, or ""."""
    # -- Figures.
    names = [entry.name for entry in results.entries]
    curves = plots.curves(folder, config)
    figures: dict[str, Any] = {
        "distributions": plots.distributions(results),
        "categories": plots.categories(rows, names),
        "curves": [curve["figure"] for curve in curves],
    }
    if standings is not None:
        figures["matrix"] = plots.arena_matrix(standings.matches, names)
        figures["ratings"] = plots.arena_ratings(standings.ratings, names)

    # -- Everything else.
    data, images = page_data(folder, results, config.evaluate, judgements)
    return _template().render(
        title=title(results),
        folder=folder.name,
        facts=facts,
        leads=_leads(results, rows, config.evaluate),
        results=results,
        settings=config.evaluate,
        sets=list(dict.fromkeys(row.set for row in rows)),
        categories=sorted({row.category for row in rows if row.category}),
        tables=leaderboard_tables(rows),
        problems=problem_counts(results),
        listed=results.problems[:LISTED],
        problem_kinds=PROBLEM_KINDS,
        measure=main_measure(results, config.evaluate),
        curves=curves,
        learnt=learnt,
        standings=standings,
        embedded=len(images),
        data=data,
        images=images,
        figures=figures,
        colours=(plots.COLOURS, plots.DARK_COLOURS),
        plotly=Markup(get_plotlyjs()),
        share=SHARE,
        by_category=CATEGORIES,
    )


def _learnt(folder: Path, results: Results, report: Path) -> str:
    """Write the page about the rewriter, if this run or that of an entry's rewriter trained one."""
    runs = [folder]
    for entry in results.entries:
        if entry.rewriter:
            runs.append(expand_home(entry.rewriter).absolute().parent)
    for run in runs:
        if (run / REWRITES).is_file():
            page = write_rewriter_page(run, report)
            return "" if page is None else page.name
    return ""


def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["short"] = short_name
    environment.filters["number"] = number
    environment.filters["signed"] = signed
    environment.filters["percent"] = percent
    environment.filters["points"] = points
    environment.filters["json"] = script_json
    environment.filters["nearby"] = nearby
    return environment.get_template("report.html")


def script_json(value: Any) -> Markup:
    """Return JSON for use inside a <script>, without any character that could end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _facts(config: ConfigDict, results: Results, seed: int) -> list[tuple[str, str]]:
    """(name, value) pairs that describe the whole evaluation."""
    settings = config.evaluate
    lines = max((len(prompt_set.prompts) for prompt_set in results.sets), default=0)
    set_names = join_names([prompt_set.name for prompt_set in results.sets])
    facts = [
        ("Date", f"{datetime.now():%Y-%m-%d %H:%M}"),
        ("Prompts", f"{lines:,} ({set_names})"),
        ("Pictures", f"{len(results.pictures):,}"),
    ]
    if any(entry.is_generated for entry in results.entries):
        sample = settings.sample
        sampling = (
            f"{sample.width} x {sample.height} px, {sample.num_steps} steps ({sample.solver}), "
            f"guidance {sample.guidance_scale:g}"
        )
        if sample.tuned_share < 1:
            sampling += f"; tuned weights in the first {tuned_steps(sample)} steps"
        facts += [
            ("Model", Path(config.pretrained.model).name),
            ("Sampling", sampling),
            ("Pictures per prompt", f"{settings.images_per_prompt}"),
            ("Seed", f"{seed}"),
        ]
    intervals = f"{100 * settings.confidence:g} %, {settings.resamples:,} resamples"
    return [*facts, ("Intervals", intervals), *results.facts]


def _leads(results: Results, rows: Sequence[Row], settings: ConfigDict) -> list[dict[str, Any]]:
    """One sentence for each entry but the first: its main measure, and which means differ."""
    # -- The means over all prompts, by entry.
    set_name = ALL if len(results.sets) > 1 else results.sets[0].name
    means: dict[str, list[Row]] = {entry.name: [] for entry in results.entries}
    for row in rows:
        if (row.set, row.category, row.kind) == (set_name, "", MEAN):
            means[row.entry].append(row)

    # -- Each one against the first.
    measure = main_measure(results, settings)
    first, *others = means
    before = next(row for row in means[first] if row.measure == measure)
    leads = []
    for place, entry in enumerate(others, start=1):
        differing = {1: [], -1: [], 0: []}
        for row in means[entry]:
            differing[certain(row)].append(short_name(row.measure))
        lead = {
            "entry": entry,
            "place": place,
            "main": next(row for row in means[entry] if row.measure == measure),
            "before": before,
            "higher": differing[1],
            "lower": differing[-1],
            "equal": differing[0],
        }
        leads.append(lead)
    return leads
