"""The title and tables that the page and the Markdown of a report share."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from realgen_jax.realbench.aggregate import Row
from realgen_jax.realbench.results import Results

PROBLEM_KINDS = ("missing", "unreadable", "other size", "extra")


def title(results: Results) -> str:
    first, *others = (entry.name for entry in results.entries)
    return f"{join_names(others)} against {first}" if others else first


def join_names(names: Sequence[str]) -> str:
    """Return "a", "a and b" or "a, b and c"."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def nearby(path: str) -> str:
    """Return a path relative to the working directory if it is inside it."""
    if Path(path).is_relative_to(Path.cwd()):
        return str(Path(path).relative_to(Path.cwd()))
    return path


def certain(row: Row) -> int:
    """Return 1 or -1 if the difference's interval is above or below 0, else 0."""
    if row.difference_low > 0:
        return 1
    if row.difference_high < 0:
        return -1
    return 0


def problem_counts(results: Results) -> list[dict[str, Any]]:
    """Return the scored pictures, the prompts they cover, and the problems, by entry and set."""
    problems = Counter((problem.entry, problem.set, problem.kind) for problem in results.problems)
    pictures = Counter((picture.entry, picture.set) for picture in results.pictures)
    lines = {(picture.entry, picture.set, picture.line) for picture in results.pictures}
    prompts = Counter((entry, set_name) for entry, set_name, _ in lines)

    counts = []
    for entry in results.entries:
        for prompt_set in results.sets:
            key = entry.name, prompt_set.name
            row = {
                "entry": entry.name,
                "set": prompt_set.name,
                "pictures": pictures[key],
                "prompts": prompts[key],
                "of": len(prompt_set.prompts),
            }
            for kind in PROBLEM_KINDS:
                row[kind] = problems[*key, kind]
            counts.append(row)
    return counts


def leaderboard_tables(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return a table for each set and category: measures as lines, entries as columns."""
    tables: dict[tuple[str, str], dict[tuple[str, str], list[Row]]] = {}
    for row in rows:
        lines = tables.setdefault((row.set, row.category), {})
        lines.setdefault((row.measure, row.kind), []).append(row)

    described = []
    for (set_name, category), lines in tables.items():
        table = {"set": set_name, "category": category, "lines": []}
        for (measure, kind), columns in lines.items():
            line = {"measure": measure, "kind": kind, "columns": _columns(columns)}
            table["lines"].append(line)
            table["entries"] = columns
        described.append(table)
    return described


def _columns(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One measure's cells. The best value is marked if exactly one of several entries has it."""
    best = max((row.value for row in rows if row.pictures), default=math.nan)
    is_unique = sum(row.value == best for row in rows) == 1 and len(rows) > 1
    columns = []
    for row in rows:
        is_best = is_unique and row.value == best
        columns.append({"row": row, "sure": certain(row), "best": is_best})
    return columns
