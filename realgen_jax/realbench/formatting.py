"""Number formatting for the report."""

import math

from realgen_jax.realbench.aggregate import MEAN, SHARE

MINUS = "\N{MINUS SIGN}"
NOTHING = "\N{EN DASH}"


def number(value: float, kind: str = MEAN) -> str:
    """Return a mean with about four digits, or a share in per cent."""
    if math.isnan(value):
        return NOTHING
    if kind == SHARE:
        return percent(value)
    if abs(value) < 10:
        digits = 3
    elif abs(value) < 100:
        digits = 2
    else:
        digits = 1
    return f"{value:.{digits}f}".replace("-", MINUS)


def signed(value: float, kind: str = MEAN) -> str:
    """Return a difference with its sign; differences of shares are in percentage points."""
    text = number(value, kind).replace("%", "pp")
    if text.startswith((MINUS, NOTHING)):
        return text
    return "+" + text


def percent(value: float) -> str:
    if math.isnan(value):
        return NOTHING
    return f"{100 * value:.1f} %".replace("-", MINUS)


def points(value: float) -> str:
    """Return a rating without decimals."""
    return NOTHING if math.isnan(value) else f"{value:.0f}"
