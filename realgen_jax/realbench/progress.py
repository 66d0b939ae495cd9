"""How far a long piece of work has come, with and without a terminal."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextlib.contextmanager
def bars(console: Console | None) -> Iterator[Callable[[str, int, str], Callable[[int], None]]]:
    """(label, total, of what) -> a bar with the time left, which hears how many more are done. Without a terminal, a
    line when it is full, and one every half a minute; without a console, nothing.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    plain = console is None or not console.is_terminal
    progress = Progress(*columns, TextColumn("left"), console=console, disable=plain)
    with contextlib.nullcontext() if plain else progress:

        def bar(label: str, total: int, what: str) -> Callable[[int], None]:
            task, start, state = (
                progress.add_task(label, total=total),
                time.monotonic(),
                {"n": 0, "told": 0.0},
            )

            def done(n: int) -> None:
                progress.advance(task, n)
                state["n"] += n
                passed = time.monotonic() - start
                if plain and console and (state["n"] == total or passed > state["told"] + 30):
                    state["told"] = passed
                    left = passed * (total - state["n"]) / max(1, state["n"])
                    console.print(
                        f"{label}  {state['n']}/{total} {what}  {passed:.0f} s, {left:.0f} s left"
                    )

            return done

        yield bar
