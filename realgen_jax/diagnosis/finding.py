"""What a check returns.

A check gets the run's metrics and config and returns a Finding, or None where it does not apply; a figure that the run
did not record raises NotRecorded.
"""

from dataclasses import dataclass

PROBLEM, NOTE, FINE = "problem", "note", "fine"


@dataclass(frozen=True)
class Figure:
    what: str
    value: float
    healthy: str  # the threshold as a condition; empty for a figure that only explains
    epochs: str


@dataclass(frozen=True)
class Finding:
    """`says` is what is wrong and `remedy` what to do; where all is fine, both are empty."""

    name: str
    severity: str
    figures: list[Figure]
    says: str = ""
    remedy: str = ""
