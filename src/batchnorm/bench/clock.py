"""Times rivals in turn, round by round, so that a slower machine slows all of them alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Any

SHORTEST_SAMPLE = 200e-6
"""Seconds. A call that is shorter is repeated, so that reading the clock costs under 0.1 %."""

WARM_UP = 3
"""Calls before the first round."""


@dataclass(frozen=True)
class Timed:
    """One thing to time.

    Attributes:
        call: The measured function; its argument is the result of ``prepare``. Its own result is
            freed outside of the clock.
        prepare: Runs before every call, outside of the clock.
    """

    call: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Effort:
    """The time to spend on a row: at least ``rounds``, and until ``seconds`` have passed."""

    seconds: float
    rounds: int


def interleaved(rivals: Mapping[str, Timed], effort: Effort) -> dict[str, list[float]]:
    """Measures seconds per call of each rival, one value a round.

    A round times every rival once, in an order of `orders`. A call shorter than
    ``SHORTEST_SAMPLE`` is repeated in a round, and the value is the mean of these calls.

    Args:
        rivals: By name.
        effort: Rounds and seconds to measure.
    """
    repeats = {name: _repeats(timed) for name, timed in rivals.items()}
    samples: dict[str, list[float]] = {name: [] for name in rivals}
    with _no_collection():
        started = time.perf_counter()
        for done, order in enumerate(cycle(orders(list(rivals)))):
            if done >= effort.rounds and time.perf_counter() - started >= effort.seconds:
                break
            for name in order:
                samples[name].append(_sample(rivals[name], repeats[name]))
    return samples


def orders(names: Sequence[str]) -> list[list[str]]:
    """Returns orders of rounds in which every rival follows every other equally often.

    The previous call matters: its successor finds the caches and the freed memory that it left.

    Source:
        Williams (1949), "Experimental designs balanced for the estimation of residual effects of
        treatments".
    """
    size = len(names)
    zigzag = [(place + 1) // 2 if place % 2 else -place // 2 for place in range(size)]
    rows = [[names[(place + start) % size] for place in zigzag] for start in range(size)]
    return rows if size % 2 == 0 else rows + [row[::-1] for row in rows]


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Returns the median and the quartiles, in seconds, and the number of rounds."""
    low, median, high = (
        statistics.quantiles(samples, method="inclusive") if len(samples) > 1 else [samples[0]] * 3
    )
    return {"median": median, "low": low, "high": high, "rounds": len(samples)}


def _repeats(timed: Timed) -> int:
    seconds = min(_sample(timed, 1) for _ in range(WARM_UP))
    return max(1, round(SHORTEST_SAMPLE / seconds) + 1) if seconds < SHORTEST_SAMPLE else 1


def _sample(timed: Timed, repeats: int) -> float:
    prepared = [timed.prepare() for _ in range(repeats)]
    results: list[object] = [None] * repeats
    started = time.perf_counter()
    for place, argument in enumerate(prepared):
        results[place] = timed.call(argument)
    return (time.perf_counter() - started) / repeats


@contextmanager
def _no_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
