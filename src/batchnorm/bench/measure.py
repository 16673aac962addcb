"""Measures a plan: checks each row, times it, and gathers results as plain data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from batchnorm.bench import expected, machine, summary
from batchnorm.bench.cases import Case, Net, Pass, Plan, least_bytes
from batchnorm.bench.clock import Effort, interleaved
from batchnorm.bench.clock import summary as summary_of
from batchnorm.bench.rivals import (
    COMPILED,
    COPY,
    OURS,
    TORCH,
    CompilerFailed,
    Rival,
    copy_of,
    rivals_of,
)
from batchnorm.bench.steps import SETTINGS, steps_of
from batchnorm.version import __version__

STEP_EFFORT = 5
"""A training step gets this many times the seconds of a row: steps differ by a few percent."""

Announce = Callable[[str], None]


def measure(
    plan: Plan,
    effort: Effort,
    *,
    threads: int | None = None,
    compiled: bool = False,
    announce: Announce = lambda name: None,
) -> dict[str, Any]:
    """Checks and times everything in a plan.

    Args:
        plan: What to measure.
        effort: Rounds and seconds of each row.
        threads: CPU threads of torch; None does not change them.
        compiled: Also torch's layers through ``torch.compile``, tens of seconds a case.
        announce: Called with the name of each case and net before it is measured.

    Returns:
        ``schema``, ``batchnorm`` (the version), ``machine``, ``settings``, ``rows``, ``memory``,
        ``steps``, ``geometric_means`` and ``slower``, see `summary`. Times are in seconds, sizes
        in bytes.

    Raises:
        Disagreement: A rival's results are not the expected ones; no further row is timed.
        CompilerFailed: ``torch.compile`` failed on a case.
    """
    rows: list[dict[str, Any]] = []
    memory: list[dict[str, Any]] = []
    with _threads(threads):
        described = machine.describe()
        for case in plan.cases:
            announce(str(case))
            case_rows, saved = _measure_case(case, effort, compiled=compiled)
            rows += case_rows
            memory += saved
        steps = [_measure_net(net, effort, announce) for net in plan.nets]
    return {
        "schema": 2,
        "batchnorm": __version__,
        "machine": described,
        "settings": {"seconds": effort.seconds, "rounds": effort.rounds, "compile": compiled},
        "rows": rows,
        "memory": memory,
        "steps": steps,
        "geometric_means": summary.geometric_means(rows),
        "slower": summary.slower(rows),
    }


def _measure_case(
    case: Case, effort: Effort, *, compiled: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    operands, answers = expected.problem(case)
    rivals = rivals_of(case, operands, compiled=compiled)
    got = {name: _answers(name, rival, case) for name, rival in rivals.items()}
    expected.check(case, got, answers)
    del answers, got
    place = _place(case)
    copy = copy_of(operands)
    rows = []
    for measured in case.passes:
        timed = {name: rival.timed(measured) for name, rival in rivals.items()} | {COPY: copy}
        samples = interleaved(timed, effort)
        seconds = {name: summary_of(values) for name, values in samples.items()}
        rows.append({**place, "pass": measured, **_derived(case, measured, seconds)})
    if set(case.passes) == {"eval"}:
        return rows, []
    saved = {name: rivals[name].saved_bytes() for name in (OURS, TORCH)}
    tensor = operands.x.numel() * operands.x.element_size()
    return rows, [{**place, "tensor_bytes": tensor, "saved_bytes": saved}]


def _answers(name: str, rival: Rival, case: Case) -> expected.Answers:
    try:
        return rival.answers(case)
    except RuntimeError as error:
        if name != COMPILED:
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise CompilerFailed(
            f"torch.compile failed on {case} ({reason}); leave out --compile."
        ) from error


def _place(case: Case) -> dict[str, Any]:
    return {
        "group": case.group,
        "shape": list(case.shape),
        "layout": case.layout,
        "dtype": case.precision,
        "variant": case.variant,
    }


def _derived(case: Case, measured: Pass, seconds: dict[str, Any]) -> dict[str, Any]:
    """Computes the columns of a row; the bytes are the least possible ones for every rival."""
    least = least_bytes(case, measured)
    ours, copy = (seconds[name]["median"] for name in (OURS, COPY))
    others = [name for name in seconds if name not in (OURS, COPY)]
    size = 2 if case.precision == "bfloat16" else 4
    copy_speed = 2 * size * math.prod(case.shape) / copy
    return {
        "least_bytes": least,
        "seconds": seconds,
        "speedup": {name: seconds[name]["median"] / ours for name in others},
        "bytes_per_second": least / ours,
        "copy_bytes_per_second": copy_speed,
        "of_copy_speed": least / ours / copy_speed,
        "to_copy_time": ours / copy,
    }


def _measure_net(net: Net, effort: Effort, announce: Announce) -> dict[str, Any]:
    announce(f"training step of {net}")
    rivals = {name: step.timed() for name, step in steps_of(net).items()}
    longer = Effort(STEP_EFFORT * effort.seconds, effort.rounds)
    seconds = {name: summary_of(values) for name, values in interleaved(rivals, longer).items()}
    setting = SETTINGS[net]
    return {
        "net": net,
        "batch": setting.batch,
        "image": list(setting.image),
        "seconds": seconds,
        "speedup": seconds[TORCH]["median"] / seconds[OURS]["median"],
        "share_of_cost": summary.share_of_cost(seconds),
    }


@contextmanager
def _threads(wanted: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(wanted or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
