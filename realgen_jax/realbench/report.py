"""An evaluation as a page for people (report/index.html, one file that needs no network), as Markdown and as CSV."""

import csv
import io
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import astuple, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from ml_collections import ConfigDict
from plotly.offline import get_plotlyjs

from realgen_jax.files import write_whole
from realgen_jax.realbench import plots
from realgen_jax.realbench.aggregate import ALL, MEAN, SHARE, Row
from realgen_jax.realbench.page import main_measure, page_data
from realgen_jax.realbench.results import Evaluated, Judgement
from realgen_jax.training.log import short_name

HERE = Path(__file__).parent
LISTED = 200  # problems that the page names one by one; the Markdown has them all
KINDS = ("missing", "unreadable", "other size", "extra")
MINUS, NOTHING = "\N{MINUS SIGN}", "\N{EN DASH}"


def write_report(
    folder: Path,
    config: ConfigDict,
    evaluated: Evaluated,
    rows: Sequence[Row],
    standings: Any,
    judgements: Sequence[Judgement],
    *,
    seed: int,
) -> Path:
    """Write folder/report/index.html, report.md, leaderboard.csv and scores.csv; returns the page. standings: None
    without an arena. seed: the evaluation's. Where `folder` is a run's, its curves are in it.
    """
    if not evaluated.pictures:
        raise ValueError(
            f"no picture of {', '.join(one.name for one in evaluated.entries)} was scored; expected some"
        )
    out = folder / "report"
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "leaderboard.csv", [field.name for field in fields(Row)], map(astuple, rows))
    write_scores(out / "scores.csv", evaluated)
    facts = _facts(config, evaluated, seed)
    write_whole(out / "report.md", _markdown(folder, facts, evaluated, rows, standings))
    data, images = page_data(folder, evaluated, config.evaluate, judgements)
    names, sets = (
        [one.name for one in evaluated.entries],
        list(dict.fromkeys(row.set for row in rows)),
    )
    curves = plots.curves(folder, config)
    figures = {
        "distributions": plots.distributions(evaluated),
        "categories": plots.categories(rows, names),
        "curves": [curve["figure"] for curve in curves],
    }
    if standings is not None:
        figures["matrix"] = plots.arena_matrix(standings.matches, names)
        figures["ratings"] = plots.arena_ratings(standings.ratings, names)
    settings = {"loader": FileSystemLoader(HERE), "autoescape": True, "undefined": StrictUndefined}
    environment = Environment(**settings, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "short": short_name, "number": number, "signed": signed, "percent": percent, "json": script_json,
        "nearby": nearby,
    }  # fmt: skip
    page = environment.get_template("report.html").render(
        title=_title(evaluated),
        folder=folder.name,
        facts=facts,
        leads=_leads(evaluated, rows, config.evaluate),
        evaluated=evaluated,
        settings=config.evaluate,
        sets=sets,
        categories=sorted({row.category for row in rows if row.category}),
        tables=_tables(rows),
        problems=problem_counts(evaluated),
        listed=evaluated.problems[:LISTED],
        problem_kinds=KINDS,
        measure=main_measure(evaluated, config.evaluate),
        curves=curves,
        standings=standings,
        embedded=len(images),
        data=data,
        images=images,
        figures=figures,
        colours=(plots.COLOURS, plots.DARK_COLOURS),
        plotly=Markup(get_plotlyjs()),
        share=SHARE,
    )
    write_whole(out / "index.html", page)
    return out / "index.html"


def write_scores(file: Path, evaluated: Evaluated) -> None:
    """One row a picture. Files are named relative to the table's folder."""
    head = [
        "entry",
        "set",
        "line",
        "copy",
        "category",
        "prompt",
        "file",
        "width",
        "height",
        *evaluated.rewards,
    ]
    sets = {one.name: one for one in evaluated.sets}
    lines = (
        [
            p.entry,
            p.set,
            p.line,
            p.copy,
            sets[p.set].categories[p.line],
            sets[p.set].prompts[p.line],
        ]
        + [os.path.relpath(p.file, file.parent), p.width, p.height]
        + [p.scores[name] for name in evaluated.rewards]
        for p in evaluated.pictures
    )
    write_csv(file, head, lines)


def write_csv(file: Path, head: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    """nan is an empty cell. Whoever opens the file finds the old table or the new one."""
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(head)
    for line in lines:
        writer.writerow(["" if isinstance(v, float) and math.isnan(v) else v for v in line])
    write_whole(file, table.getvalue())


def script_json(value: Any) -> Markup:
    """JSON inside a <script>: no character that could end it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def number(value: float, kind: str = MEAN) -> str:
    """About four digits, shares in per cent."""
    if math.isnan(value):
        return NOTHING
    if kind == SHARE:
        return percent(value)
    return f"{value:.{3 if abs(value) < 10 else 2 if abs(value) < 100 else 1}f}".replace("-", MINUS)


def signed(value: float, kind: str = MEAN) -> str:
    """A difference; of shares in percentage points."""
    text = number(value, kind).replace("%", "pp")
    return text if text.startswith((MINUS, NOTHING)) else "+" + text


def percent(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{100 * value:.1f} %".replace("-", MINUS)


def nearby(path: str) -> str:
    """A path as it is seen from where the program runs, where it lies below that."""
    where = Path(path)
    return str(where.relative_to(Path.cwd())) if where.is_relative_to(Path.cwd()) else path


def certain(row: Row) -> int:
    """1, -1 where the difference's interval lies above or below 0, else 0."""
    return 1 if row.difference_low > 0 else -1 if row.difference_high < 0 else 0


def problem_counts(evaluated: Evaluated) -> list[dict[str, Any]]:
    """By entry and set: pictures scored, prompts that have one, and problems by kind."""
    kinds = Counter((one.entry, one.set, one.what) for one in evaluated.problems)
    pictures = Counter((p.entry, p.set) for p in evaluated.pictures)
    prompts = Counter(
        (entry, name) for entry, name, _ in {(p.entry, p.set, p.line) for p in evaluated.pictures}
    )
    return [
        {"entry": entry.name, "set": one.name, "pictures": pictures[entry.name, one.name]}
        | {"prompts": prompts[entry.name, one.name], "of": len(one.prompts)}
        | {what: kinds[entry.name, one.name, what] for what in KINDS}
        for entry in evaluated.entries
        for one in evaluated.sets
    ]


def _title(evaluated: Evaluated) -> str:
    first, *others = (one.name for one in evaluated.entries)
    return f"{_listed(others)} against {first}" if others else first


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _facts(config: ConfigDict, evaluated: Evaluated, seed: int) -> list[tuple[str, str]]:
    lines, settings = max((len(one.prompts) for one in evaluated.sets), default=0), config.evaluate
    made = [one for one in evaluated.entries if one.kind in ("model", "lora")]
    sample = config.sample
    facts = [
        ("Date", f"{datetime.now():%Y-%m-%d %H:%M}"),
        ("Prompts", f"{lines:,} ({_listed([one.name for one in evaluated.sets])})"),
        ("Pictures", f"{len(evaluated.pictures):,}"),
    ]
    if made:
        facts += [
            ("Model", Path(config.pretrained.model).name),
            (
                "Sampling",
                f"{sample.resolution} px, {sample.eval_num_steps} steps, guidance {sample.guidance_scale:g}",
            ),
            ("Pictures a prompt", f"{settings.images_per_prompt}"),
            ("Seed", f"{seed}"),
        ]
    return [
        *facts,
        ("Intervals", f"{100 * settings.confidence:g} %, {settings.resamples:,} resamples"),
    ]


def _leads(evaluated: Evaluated, rows: Sequence[Row], settings: ConfigDict) -> list[dict[str, Any]]:
    """What an entry's figures come to, for each but the first: means over all prompts that are surely other."""
    name = ALL if len(evaluated.sets) > 1 else evaluated.sets[0].name
    overall = [row for row in rows if (row.set, row.category, row.kind) == (name, "", MEAN)]
    first, *others = (one.name for one in evaluated.entries)
    before = {row.measure: row for row in overall if row.entry == first}
    found = []
    for place, entry in enumerate(others, 1):
        own = [row for row in overall if row.entry == entry]
        main = next(row for row in own if row.measure == main_measure(evaluated, settings))
        names = {
            key: [short_name(row.measure) for row in own if certain(row) == sign]
            for key, sign in (("higher", 1), ("lower", -1), ("equal", 0))
        }
        found.append(
            {"entry": entry, "place": place, "main": main, "before": before[main.measure], **names}
        )
    return found


def _tables(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One for each set and category: its measures as lines, entries as columns, and how many pictures that is."""
    cells: dict[tuple[str, str], dict[tuple[str, str], list[Row]]] = {}
    for row in rows:
        cells.setdefault((row.set, row.category), {}).setdefault(
            (row.measure, row.kind), []
        ).append(row)
    found = []
    for (name, category), measures in cells.items():
        lines = []
        for (measure, kind), own in measures.items():
            best = max((row.value for row in own if row.pictures), default=math.nan)
            alone = sum(row.value == best for row in own) == 1 < len(own)
            columns = [
                {"row": row, "sure": certain(row), "best": alone and row.value == best}
                for row in own
            ]
            lines.append({"measure": measure, "kind": kind, "columns": columns})
        found.append(
            {
                "set": name,
                "category": category,
                "lines": lines,
                "entries": [c["row"] for c in columns],
            }
        )
    return found


def _markdown(
    folder: Path,
    facts: Sequence[tuple[str, str]],
    evaluated: Evaluated,
    rows: Sequence[Row],
    standings: Any,
) -> str:
    entries = [one.name for one in evaluated.entries]
    parts = [f"# RealBench: {_title(evaluated)}", ""]
    parts += [f"{folder.name}. Page: index.html; numbers: leaderboard.csv, scores.csv.", ""]
    parts += [f"- {name}: {value}" for name, value in facts]
    parts += [f"- Entry {one.name}: {one.kind}, {nearby(one.source)}" for one in evaluated.entries]
    parts += [
        "",
        "## Leaderboard",
        "",
        "Means over pictures [interval]; then the difference from the first entry over",
    ]
    parts += [
        "the prompts that both have [interval], with a * where that interval leaves out 0.",
        "",
    ]
    for table in _tables(rows):
        lines = [[f"{line['measure']}, {line['kind']}", *_cells(line)] for line in table["lines"]]
        lines.append(
            ["pictures / prompts"] + [f"{row.pictures} / {row.prompts}" for row in table["entries"]]
        )
        heading = f"### {table['set']}" + (f", {table['category']}" if table["category"] else "")
        parts += [heading, "", *_table(["measure", *entries], lines), ""]
    counts = problem_counts(evaluated)
    head = ["entry", "set", "pictures", "prompts", *KINDS]
    lines = [
        [c["entry"], c["set"], c["pictures"], f"{c['prompts']} of {c['of']}"]
        + [c[k] for k in KINDS]
        for c in counts
    ]
    parts += ["## Pictures behind the numbers", "", *_table(head, lines)]
    parts += [""] if evaluated.problems else []
    for one in evaluated.problems:
        parts.append(
            f"- {one.entry}, {one.set}: {one.file.name} {one.what}"
            + (f" ({one.detail})" if one.detail else "")
        )
    if standings is not None:
        parts += ["", "## Arena", ""]
        parts += [
            f"Judge {standings.judge}, protocol {standings.protocol}; a tie is half a win.",
            "",
        ]
        counted = ("wins", "losses", "ties", "pairs", "refused", "unreadable", "incomplete")
        head = ["match", "win rate", *counted]
        lines = []
        for m in standings.matches:
            rate = f"{percent(m.win_rate)} [{percent(m.low)}, {percent(m.high)}]"
            lines.append([f"{m.a} against {m.b}", rate, *(getattr(m, name) for name in counted)])
        parts += [*_table(head, lines), ""]
        lines = [
            [one.entry, f"{one.rating:.0f} [{one.low:.0f}, {one.high:.0f}]"]
            for one in standings.ratings
        ]
        share, low, high = standings.first_share
        parts += [*_table(["entry", "rating"], lines), ""]
        parts += [
            f"The picture shown first was chosen in {percent(share)} [{percent(low)}, {percent(high)}]."
        ]
        parts += ["", "Answers:", ""]
        parts += [f"- {name}: {value}" for name, value in standings.counts.items()]
    return "\n".join(parts).rstrip() + "\n"


def _cells(line: dict[str, Any]) -> list[str]:
    found = []
    for column in line["columns"]:
        row, kind = column["row"], line["kind"]
        text = f"{number(row.value, kind)} [{number(row.low, kind)}, {number(row.high, kind)}]"
        if not math.isnan(row.difference):
            limits = f"[{signed(row.difference_low, kind)}, {signed(row.difference_high, kind)}]"
            text += f"; {signed(row.difference, kind)} {limits}" + ("*" if column["sure"] else "")
        found.append(text)
    return found


def _table(head: Sequence[Any], lines: Iterable[Sequence[Any]]) -> list[str]:
    def cells(line: Sequence[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |"

    return [cells(head), "|" + " --- |" * len(head), *map(cells, lines)]
