"""The axes of the charts: how far they reach, and where their ticks stand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator

from batchnorm.charts import numerals

Tick = Callable[[float], str]
ROUND = (1, 2, 2.5, 5, 10)  # the steps, times powers of ten, that a reader counts in


@dataclass(frozen=True)
class Frame:
    """The axes of a chart by epoch: which epochs, which values, how a value is written."""

    epochs: tuple[int, int]
    values: tuple[float, float]
    tick: Tick


@dataclass(frozen=True)
class Scale:
    """A horizontal axis for strips: where a value is drawn, and which place it is held against."""

    place: Callable[[float], float]
    ticks: Callable[[tuple[float, float]], Sequence[float]]
    tick: Tick
    reference: float


def log10(value: float) -> float:
    """The decimal logarithm, NaN for what has none."""
    return math.log10(value) if value > 0 and math.isfinite(value) else math.nan


def even_ticks(bounds: tuple[float, float]) -> list[float]:
    """About five round numbers at even distances within the bounds."""
    places = MaxNLocator(5, steps=ROUND).tick_values(*bounds)
    return [float(place) for place in places if bounds[0] <= place <= bounds[1]]


def epoch_ticks(first: int, last: int) -> list[int]:
    """At most six round epochs, or the only one."""
    steps = (digit * 10**power for power in range(9) for digit in (1, 2, 5))
    step = next(step for step in steps if (last - first) // step < 6)
    return [epoch for epoch in range(first, last + 1) if epoch % step == 0] or [first]


def ratio_ticks(bounds: tuple[float, float]) -> list[float]:
    """Logarithms of a few round numbers within the bounds, themselves logarithms."""
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
    """A place on a logarithmic axis as the number that stands there."""
    return numerals.short(float(f"{10**power:.3g}"))


AROUND_0 = Scale(place=float, ticks=even_ticks, tick=numerals.short, reference=0.0)
AROUND_1 = Scale(place=float, ticks=even_ticks, tick=numerals.short, reference=1.0)
RATIO = Scale(place=log10, ticks=ratio_ticks, tick=ratio_tick, reference=0.0)


def percent_tick(fraction: float) -> str:
    """A fraction on an axis, in per cent with as few digits as it needs."""
    return f"{numerals.short(round(100 * fraction, 3))}%"


def limits(values: Sequence[float], ceiling: float = math.inf) -> tuple[float, float]:
    """Bounds of an axis that show every finite value with a little room, up to the ceiling."""
    known = numerals.finite(values) or [0.0, 1.0]
    low, high = min(known), max(known)
    room = 0.06 * (high - low) or 0.06 * abs(high) or 0.5
    return low - room, max(high, min(high + room, ceiling))
