"""Chooses the limits and ticks of axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator

from batchnorm.charts import numerals

Tick = Callable[[float], str]
ROUND = (1, 2, 2.5, 5, 10)  # steps between ticks, times powers of ten


@dataclass(frozen=True)
class Frame:
    """Axes of a chart by epoch: the ranges of epochs and of values, and the format of a value."""

    epochs: tuple[int, int]
    values: tuple[float, float]
    tick: Tick


@dataclass(frozen=True)
class Scale:
    """A horizontal axis of strips: maps values to places, and marks one place for reference."""

    place: Callable[[float], float]
    ticks: Callable[[tuple[float, float]], Sequence[float]]
    tick: Tick
    reference: float


def log10(value: float) -> float:
    """Returns the decimal logarithm, NaN for a value that has none."""
    return math.log10(value) if value > 0 and math.isfinite(value) else math.nan


def even_ticks(bounds: tuple[float, float]) -> list[float]:
    """Returns about five round numbers at even distances within the bounds."""
    places = MaxNLocator(5, steps=ROUND).tick_values(*bounds)
    return [float(place) for place in places if bounds[0] <= place <= bounds[1]]


def epoch_ticks(first: int, last: int) -> list[int]:
    """Returns at most six round epochs; the first one if none is round."""
    steps = (digit * 10**power for power in range(9) for digit in (1, 2, 5))
    step = next(step for step in steps if (last - first) // step < 6)
    return [epoch for epoch in range(first, last + 1) if epoch % step == 0] or [first]


def ratio_ticks(bounds: tuple[float, float]) -> list[float]:
    """Returns the logarithms of a few round numbers; the bounds are logarithms too."""
    low, high = bounds
    if high - low < 1:
        return [math.log10(ratio) for ratio in even_ticks((10**low, 10**high)) if ratio > 0]
    digits = (1, 2, 5) if high - low < 2 else (1,)
    places = [
        power + math.log10(digit)
        for power in range(math.floor(low), math.ceil(high) + 1)
        for digit in digits
        if low <= power + math.log10(digit) <= high
    ]
    return places[:: math.ceil(len(places) / 7)]


def ratio_tick(power: float) -> str:
    """Formats the number at a place on a logarithmic axis."""
    return numerals.short(float(f"{10**power:.3g}"))


AROUND_0 = Scale(place=float, ticks=even_ticks, tick=numerals.short, reference=0.0)
AROUND_1 = Scale(place=float, ticks=even_ticks, tick=numerals.short, reference=1.0)
RATIO = Scale(place=log10, ticks=ratio_ticks, tick=ratio_tick, reference=0.0)


def percent_tick(fraction: float) -> str:
    """Formats a fraction on an axis in percent, without needless digits."""
    return f"{numerals.short(round(100 * fraction, 3))}%"


def limits(values: Sequence[float], ceiling: float = math.inf) -> tuple[float, float]:
    """Returns bounds that show every finite value with a little room, at most the ceiling."""
    known = numerals.finite(values) or [0.0, 1.0]
    low, high = min(known), max(known)
    room = 0.06 * (high - low) or 0.06 * abs(high) or 0.5
    return low - room, max(high, min(high + room, ceiling))
