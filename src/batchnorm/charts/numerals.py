"""Numbers as text, for people; a value that is not finite stays visible."""

from __future__ import annotations

import math
from collections.abc import Iterable


def decimal(value: float, digits: int = 3) -> str:
    """A number with this many decimals, or in scientific notation when it is large."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:.{digits}f}" if abs(value) < 10_000 else f"{value:.{digits}g}"
    return text.replace("-", "−")


def percent(fraction: float) -> str:
    """A fraction in per cent with one decimal: 0.742 -> 74.2%."""
    text = decimal(100 * fraction, 1)
    return f"{text}%" if math.isfinite(fraction) else text


def count(value: float | int) -> str:
    """A whole number with thousands separated: 60000 -> 60,000."""
    return f"{value:,.0f}" if math.isfinite(value) else decimal(value)


def short(value: float) -> str:
    """A number with as few digits as it needs, for an axis or a setting: 0.5 -> 0.5, 2.0 -> 2."""
    return f"{value:g}".replace("-", "−") if math.isfinite(value) else decimal(value)


def finite(values: Iterable[float]) -> list[float]:
    """The finite ones among the values, in their order."""
    return [value for value in values if math.isfinite(value)]


def span(fractions: Iterable[float]) -> str:
    """The range of some fractions in per cent: 69.5–87.5%; "NaN" when none is finite."""
    known = finite(fractions)
    if not known:
        return "NaN"
    low, high = f"{100 * min(known):.1f}", percent(max(known))
    return high if high == f"{low}%" else f"{low}–{high}"


def significant(value: float) -> str:
    """A number with four significant digits, for a table."""
    if not math.isfinite(value):
        return decimal(value)
    return f"{value:#.4g}".rstrip(".").replace("-", "−")
