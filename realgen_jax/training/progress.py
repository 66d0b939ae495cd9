"""Progress bars, with and without a terminal."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

LINE_SECONDS = 30  # minimum time between two lines without a terminal


def plain_console() -> Console:
    """Return a console that prints names, paths and prompts as they are.

    Brackets in a string are no markup, and ":x:" is no emoji. Styled text is a rich.text.Text.
    """
    return Console(highlight=False, markup=False, emoji=False)


def progress_columns() -> tuple[ProgressColumn, ...]:
    """Return the columns of a progress bar: label, bar, count and total, time left."""
    return (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
    )


@contextlib.contextmanager
def progress_bars(
    console: Console | None,
) -> Iterator[Callable[[str, int, str], Callable[[int], None]]]:
    """Yield a function (label, total, unit) -> advance, where advance(n) adds n finished units.

    Without a terminal, each bar prints a line every half minute and one when it is full. Without a
    console, nothing is printed.
    """
    on_terminal = console is not None and console.is_terminal
    progress = Progress(*progress_columns(), console=console, disable=not on_terminal)

    def bar(label: str, total: int, unit: str) -> Callable[[int], None]:
        if console is None:
            return lambda count: None
        if not on_terminal:
            return _LineBar(console, label, total, unit)
        task = progress.add_task(label, total=total)
        return lambda count: progress.advance(task, count)

    with progress if on_terminal else contextlib.nullcontext():
        yield bar


class _LineBar:
    """A progress bar without a terminal, which prints a line now and then."""

    def __init__(self, console: Console, label: str, total: int, unit: str):
        self.console = console
        self.label = label
        self.total = total
        self.unit = unit
        self.start = time.monotonic()
        self.done = 0
        self.last_line = 0.0  # seconds after the start

    def __call__(self, count: int) -> None:
        self.done += count
        passed = time.monotonic() - self.start
        if self.done != self.total and passed <= self.last_line + LINE_SECONDS:
            return
        self.last_line = passed
        left = passed * (self.total - self.done) / max(1, self.done)
        self.console.print(
            f"{self.label}  {self.done}/{self.total} {self.unit}  {passed:.0f} s, {left:.0f} s left"
        )
