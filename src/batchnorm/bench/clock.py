"""Times rivals in turn, round by round, so that whatever slows the machine slows them all."""

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
WARM_UP = 3


@dataclass(frozen=True)
class Timed:
    """One thing to time.

    Args:
        call: What the clock measures; gets what ``prepare`` made. What it returns is freed outside
            of the clock.
        prepare: Runs before every call, outside of the clock.
    """

    call: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Effort:
    """How long to measure a row: at least so many rounds, and on until the time is up."""

    seconds: float
    rounds: int


def interleaved(rivals: Mapping[str, Timed], effort: Effort) -> dict[str, list[float]]:
    """Seconds a call of each rival, one value a round.

    A round times every rival once, in an order of `orders`; a rival too quick for the clock is
    called several times a round, and the value is the mean of those calls.

    Args:
        rivals: By name.
        effort: When to stop.
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
    """Orders of rounds in which everyone follows everyone else equally often.

    What ran before matters: it leaves the caches, and the memory that it freed, to the next one.

    Source:
        Williams (1949), "Experimental designs balanced for the estimation of residual effects of
        treatments".
    """
    size = len(names)
    zigzag = [(place + 1) // 2 if place % 2 else -place // 2 for place in range(size)]
    rows = [[names[(place + start) % size] for place in zigzag] for start in range(size)]
    return rows if size % 2 == 0 else rows + [row[::-1] for row in rows]


def summary(samples: Sequence[float]) -> dict[str, float]:
    """The median and the quartiles, in seconds, and how many rounds are behind them."""
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
