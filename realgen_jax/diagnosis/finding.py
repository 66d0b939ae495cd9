"""The result of a check.

A check is a function `check(metrics, config)`. It returns a Finding, or None if the check does not
apply to this run. It raises NotRecorded if the run's metrics lack a value that it needs.
"""

from dataclasses import dataclass

# Severities, worst first.
PROBLEM = "problem"
NOTE = "note"
FINE = "fine"


@dataclass(frozen=True)
class Figure:
    """A number behind a finding."""

    what: str
    value: float
    healthy: str  # the condition that a healthy run meets, such as "<= 0.2"; empty if there is none
    epochs: str  # the epochs it was computed from, such as "9-12"


@dataclass(frozen=True)
class Finding:
    """What one check found. If all is fine, `says` and `remedy` are empty."""

    name: str
    severity: str
    figures: list[Figure]
    says: str = ""  # what is wrong
    remedy: str = ""  # what to do about it
