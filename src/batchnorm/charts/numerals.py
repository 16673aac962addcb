"""Formats numbers for people; NaN and infinity stay visible."""

from __future__ import annotations

import math
from collections.abc import Iterable


def decimal(value: float, digits: int = 3) -> str:
    """Formats a number with ``digits`` decimals, from 10,000 on in scientific notation."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:.{digits}f}" if abs(value) < 10_000 else f"{value:.{digits}g}"
    return text.replace("-", "−")


def percent(fraction: float) -> str:
    """Formats a fraction in percent with one decimal: 0.742 -> 74.2%."""
    text = decimal(100 * fraction, 1)
    return f"{text}%" if math.isfinite(fraction) else text


def count(value: float | int) -> str:
    """Formats a whole number with thousands separated: 60000 -> 60,000."""
    return f"{value:,.0f}" if math.isfinite(value) else decimal(value)


def short(value: float) -> str:
    """Formats a number of an axis or a setting without needless digits: 0.5 -> 0.5, 2.0 -> 2."""
    return f"{value:g}".replace("-", "−") if math.isfinite(value) else decimal(value)


def finite(values: Iterable[float]) -> list[float]:
    """Returns the finite values, in their order."""
    return [value for value in values if math.isfinite(value)]


def span(fractions: Iterable[float]) -> str:
    """Formats the range of fractions in percent: 69.5–87.5%; "NaN" if none is finite."""
    known = finite(fractions)
    if not known:
        return "NaN"
    low, high = f"{100 * min(known):.1f}", percent(max(known))
    return high if high == f"{low}%" else f"{low}–{high}"


def significant(value: float) -> str:
    """Formats a number of a table with four significant digits."""
    if not math.isfinite(value):
        return decimal(value)
    return f"{value:#.4g}".rstrip(".").replace("-", "−")
