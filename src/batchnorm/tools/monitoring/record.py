"""Computes one record of numbers from two states of a layer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from batchnorm.tools.monitoring.state import Numbers, State

Record = dict[str, Any]

NEAR_ZERO = 1e-4
"""A weight up to this leaves no signal in the output."""
CONSTANT = 0.01
"""A variance below this share of eps counts as constant: eps shrinks it to less than a tenth."""
CLOSED = 3.0
"""A bias this many weights below zero closes a ReLU: 0.1 % of a normal distribution is above."""


@np.errstate(all="ignore")
def record(step: int, name: str, before: State, now: State) -> Record:
    """Describes the changes in a layer since the last record; see `watch` for each number.

    Args:
        step: Number of the step.
        name: Name of the layer.
        before: Its state at the last record.
        now: Its state after the step.
    """
    batches = _batches(before, now)
    weight = _weight_of_batches(before, now, batches)
    mean, var = _batch(before, now, weight)
    channels = max((len(numbers) for numbers in now.numbers.values()), default=0)
    return {
        "step": step,
        "layer": name,
        "channels": channels,
        "batches": batches,
        **_against_running(before, mean, var),
        **_drift(before, now),
        **_dead(now, var, weight, channels),
        **_range("weight", now.numbers.get("weight")),
        **_range("bias", now.numbers.get("bias")),
        **_range("batch_mean", mean),
        **_range("batch_var", var),
        **_range("running_mean", now.numbers.get("running_mean")),
        **_range("running_var", now.numbers.get("running_var")),
    }


def severity(found: Record) -> tuple[bool, float, float]:
    """Sorts records: the worst are not finite, then far from the running statistics, then dead."""
    factors = [found["var_ratio_low"], found["var_ratio_high"], found["var_drift"]]
    known = [factor for factor in factors if factor is not None]
    measures = [abs(math.log(factor)) if factor > 0 else math.inf for factor in known]
    measures += [found[key] or 0.0 for key in ("mean_shift", "mean_drift")]
    values = [value for value in found.values() if isinstance(value, float)]
    broken = not all(math.isfinite(value) for value in values)
    finite = [measure for measure in measures if math.isfinite(measure)]
    return broken, max(finite, default=0.0), found["dead"] or 0.0


def _batches(before: State, now: State) -> int:
    if before.counter is None or now.counter is None:
        return 0
    return max(0, now.counter - before.counter)


def _weight_of_batches(before: State, now: State, batches: int) -> float:
    """Combined weight, in the running statistics, of all batches since the last record."""
    if batches == 0 or not _comparable(before, now.numbers.get("running_mean")):
        return 0.0
    if now.momentum is None:
        return batches / now.counter if now.counter else 0.0
    return 1 - (1 - now.momentum) ** batches


def _batch(before: State, now: State, weight: float) -> tuple[Numbers | None, Numbers | None]:
    """Mean and unbiased variance of the batch, as a hook saw it or from the running statistics."""
    if "batch_mean" in now.numbers:
        return now.numbers["batch_mean"], now.numbers["batch_var"]
    if weight == 0:
        return None, None
    found = []
    for kind in ("running_mean", "running_var"):
        old, new = before.numbers[kind], now.numbers[kind]
        found.append(old + (new - old) / weight)
    return found[0], np.maximum(found[1], 0.0)


def _against_running(before: State, mean: Numbers | None, var: Numbers | None) -> Record:
    names = ("mean_shift", "mean_shift_rms", "var_ratio_low", "var_ratio_high")
    if mean is None or var is None or not _comparable(before, mean):
        return dict.fromkeys(names)
    shift = _in_deviations(mean - before.numbers["running_mean"], before)
    ratio = (var + before.eps) / (before.numbers["running_var"] + before.eps)
    rms = float(np.sqrt(np.mean(np.square(shift))))
    values = (float(np.abs(shift).max()), rms, float(ratio.min()), float(ratio.max()))
    return dict(zip(names, values, strict=True))


def _drift(before: State, now: State) -> Record:
    if not _comparable(before, now.numbers.get("running_mean")):
        return {"mean_drift": None, "var_drift": None}
    moved = now.numbers["running_mean"] - before.numbers["running_mean"]
    ratio = (now.numbers["running_var"] + now.eps) / (before.numbers["running_var"] + now.eps)
    factor = np.maximum(ratio, 1 / ratio)
    return {
        "mean_drift": float(np.abs(_in_deviations(moved, before)).max()),
        "var_drift": float(factor.max()),
    }


def _comparable(before: State, mean: Numbers | None) -> bool:
    """Tells if there was a running mean before, for as many channels."""
    old = before.numbers.get("running_mean")
    return old is not None and mean is not None and old.shape == mean.shape


def _in_deviations(difference: Numbers, before: State) -> Numbers:
    return difference / np.sqrt(before.numbers["running_var"] + before.eps)


def _dead(now: State, var: Numbers | None, weight: float, channels: int) -> Record:
    none = np.zeros(channels, dtype=bool)
    constant = zero = closed = none
    running_var = now.numbers.get("running_var")
    known = running_var if var is None else var
    if known is not None:
        allowed = np.full(channels, CONSTANT * now.eps)
        if running_var is not None and weight > 0:
            allowed = np.maximum(allowed, 4 * now.rounding * running_var / weight)
        constant = known <= allowed
    if "weight" in now.numbers:
        scale = np.abs(now.numbers["weight"])
        zero = scale <= NEAR_ZERO
        if "bias" in now.numbers:
            closed = (now.numbers["bias"] + CLOSED * scale <= 0) & ~zero
    shares = {
        "dead": constant | zero | closed,
        "dead_constant": constant,
        "dead_weight": zero,
        "dead_relu": closed,
    }
    return {name: float(which.mean()) if channels else 0.0 for name, which in shares.items()}


def _range(name: str, numbers: Numbers | None) -> Record:
    low, high = (None, None) if numbers is None else (float(numbers.min()), float(numbers.max()))
    return {f"{name}_low": low, f"{name}_high": high}
