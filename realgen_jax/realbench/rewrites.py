"""The page "What the rewriter learnt": words gained and lost, and rewrites beside their pictures.

It is one file that needs no network. Its data is rewrites.jsonl in a run's folder, which training
the rewriter leaves: {"epoch", "kind" (eval, train), "prompt", "rewrite", "usable", "reward",
"picture" (a file in the run's folder, or null)} a line.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from realgen_jax.files import write_whole
from realgen_jax.realbench.formatting import number, percent, signed
from realgen_jax.realbench.page import thumbnail
from realgen_jax.rewriter.records import FILE, Record, read_records
from realgen_jax.rewriter.texts import (
    TextSettings,
    WordChange,
    difference,
    log_odds,
    statistics,
    text_settings,
)

PAGE = "rewriter.html"
WORDS = 30  # words gained and lost that are listed, each
SURE = 1.0  # least |z| of a listed word
PROMPTS = 24  # prompts whose rewrites are shown
DIFFERENT = 12  # words of a difference that are shown, each


def write_rewriter_page(run: Path, report: Path) -> Path | None:
    """Write report/rewriter.html about the run in a folder; return None if it has no evaluation.

    Raises ValueError for a damaged rewrites.jsonl or config.json of the run.
    """
    settings = run_settings(run)
    rows = read_records(run / FILE)
    evaluations = by_epoch([row for row in rows if row.kind == "eval"])
    if not evaluations:
        return None
    epochs = list(evaluations)
    before = evaluations[epochs[0]]
    after = evaluations[epochs[-1]]

    # -- Words, if there is a before and an after.
    changes = log_odds(texts(before), texts(after)) if len(epochs) > 1 else []
    gained = [change for change in changes if change.z >= SURE][:WORDS]
    lost = [change for change in reversed(changes) if change.z <= -SURE][:WORDS]

    # -- Rewrites beside pictures.
    groups = by_epoch([row for row in rows if row.kind == "train"])
    latest = groups[max(groups)] if groups else []
    content = template().render(
        folder=run.name,
        epochs=epochs,
        counts=(len(before), len(after)),
        lines=[figures(epoch, own, settings) for epoch, own in evaluations.items()],
        tables=(("Gained", gained), ("Lost", lost)),
        word_count=len(changes),
        pairs=[both(run, *pair) for pair in spread(same_prompt(before, after), PROMPTS)],
        groups=[compared(run, own) for own in spread(grouped(latest), PROMPTS)],
        last=max(groups) if groups else 0,
    )
    report.mkdir(parents=True, exist_ok=True)
    write_whole(report / PAGE, content)
    return report / PAGE


def run_settings(run: Path) -> TextSettings:
    """Return what a run's config says about texts. Raises ValueError if it is damaged."""
    file = run / "config.json"
    try:
        rewriter = json.loads(file.read_bytes())["rewriter"]
        return text_settings(SimpleNamespace(**rewriter))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} does not tell how the run rewrote prompts ({type(error).__name__}: {error})"
        ) from error


# --- The data of the page


def by_epoch(rows: Sequence[Record]) -> dict[int, list[Record]]:
    """Return {epoch: its rows}, in the order of epochs."""
    epochs: dict[int, list[Record]] = defaultdict(list)
    for row in rows:
        epochs[row.epoch].append(row)
    return {epoch: epochs[epoch] for epoch in sorted(epochs)}


def texts(rows: Sequence[Record]) -> list[str]:
    return [row.rewrite for row in rows]


def figures(epoch: int, rows: Sequence[Record], settings: TextSettings) -> dict[str, Any]:
    """Return the figures of an evaluation."""
    own = statistics(settings, [row.prompt for row in rows], texts(rows), group=1)
    return {
        "epoch": epoch,
        "reward": sum(row.reward for row in rows) / len(rows),
        "usable": sum(row.usable for row in rows) / len(rows),
        **{name: own[name] for name in ("words", "words_95", "kept", "spam", "tail")},
    }


def same_prompt(before: Sequence[Record], after: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Return the first rows of each prompt at both times, the largest rise of the reward first.

    Only those with pictures, if there are any.
    """
    first = {}
    for row in reversed(before):
        first[row.prompt] = row
    last = {}
    for row in reversed(after):
        last[row.prompt] = row
    pairs = [(first[prompt], last[prompt]) for prompt in first if prompt in last]
    pictured = [pair for pair in pairs if pair[0].picture and pair[1].picture]
    return sorted(pictured or pairs, key=lambda pair: pair[0].reward - pair[1].reward)


def grouped(rows: Sequence[Record]) -> list[list[Record]]:
    """Return the rows of each prompt that has several, the best first."""
    groups = defaultdict(list)
    for row in rows:
        groups[row.prompt].append(row)
    ordered = [sorted(own, key=lambda row: -row.reward) for own in groups.values()]
    return [own for own in ordered if len(own) > 1]


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """Return at most `count` evenly spaced items."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def card(run: Path, row: Record) -> dict[str, Any]:
    """Return what the page shows of a rewrite. Its picture is None if there is no such file."""
    image = None
    if row.picture is not None and (run / row.picture).is_file():
        image = thumbnail(run / row.picture)
    return {"row": row, "image": image}


def both(run: Path, before: Record, after: Record) -> dict[str, Any]:
    """Return a prompt before and after."""
    return {"prompt": before.prompt, "cards": [card(run, before), card(run, after)]}


def compared(run: Path, rows: Sequence[Record]) -> dict[str, Any]:
    """Return a prompt's rewrites, and the words of the best that the worst lacks and vice versa."""
    best, worst = difference(rows[0].rewrite, rows[-1].rewrite)
    return {
        "prompt": rows[0].prompt,
        "cards": [card(run, row) for row in rows],
        "best": best[:DIFFERENT],
        "worst": worst[:DIFFERENT],
    }


def template() -> Any:
    """Return the page's template."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["signed"] = signed
    environment.filters["percent"] = percent
    environment.filters["share"] = share
    return environment.get_template("rewrites.html")


def share(change: WordChange, counts: tuple[int, int]) -> str:
    """Return a word's shares of the rewrites before and after, with its counts."""
    before = f"{percent(change.before / counts[0])} ({change.before})"
    after = f"{percent(change.after / counts[1])} ({change.after})"
    return f"{before} → {after}"
