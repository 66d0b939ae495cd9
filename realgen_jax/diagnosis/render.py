"""Print a diagnosis in the terminal."""

import textwrap

from rich.console import Console

from realgen_jax.diagnosis.diagnose import Answer
from realgen_jax.diagnosis.finding import FINE, NOTE, PROBLEM, Figure

STYLES = {PROBLEM: "bold red", NOTE: "bold yellow", FINE: "green"}


def show(answer: Answer, console: Console) -> None:
    """Print the verdict, problems and notes in full, and one line for each check that is fine."""
    print_paragraph(console, answer.verdict, style="bold")
    ills = answer.of(PROBLEM, NOTE)
    if not ills:
        print_paragraph(console, "Healthy: no problems found.", style=STYLES[FINE])

    for finding in ills:
        console.print()
        print_paragraph(
            console, f"{finding.severity}: {finding.name}", style=STYLES[finding.severity]
        )
        print_paragraph(console, finding.says, indent="  ")
        for figure in finding.figures:
            print_paragraph(console, long_text(figure), indent="  ")
        print_paragraph(console, f"To do: {finding.remedy}", indent="  ")

    fine = answer.of(FINE)
    if fine:
        console.print()
        print_paragraph(console, "fine:", style=STYLES[FINE])
    for finding in fine:
        figures = "; ".join(short_text(figure) for figure in finding.figures)
        print_paragraph(console, f"{finding.name}: {figures}", indent="  ")

    if answer.not_recorded:
        console.print()
        print_paragraph(console, f"not recorded: {'; '.join(answer.not_recorded)}")


def print_paragraph(console: Console, text: str, *, style: str = "", indent: str = "") -> None:
    """Print text, wrapped to the console's width but never at the hyphens of an option."""
    wrapped = textwrap.fill(
        text,
        console.width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
    )
    console.print(wrapped, style=style or None, soft_wrap=True)


def long_text(figure: Figure) -> str:
    """A figure with its value, its healthy range and its epochs."""
    text = f"{figure.what}: {figure.value:.3g}"
    if figure.healthy:
        text += f", healthy {figure.healthy}"
    return f"{text} (epochs {figure.epochs})"


def short_text(figure: Figure) -> str:
    """A figure with its value and its healthy range."""
    text = f"{figure.what} {figure.value:.3g}"
    if figure.healthy:
        text += f" ({figure.healthy})"
    return text
