"""Partial sums of channels, and how they merge: all in float64.

A *column* has one set of partial sums in each *slab*, a share of the rows that depends on the shape
alone. So any number of threads merges the same sums in the same order. Column ``k`` belongs to
channel ``k // repeat % channels``; planes have one column a channel.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from batchnorm.kernels.compiled.elements import address_of, array_at, widen
from batchnorm.kernels.compiled.numba_internals import jitted

# Rows of ``partials[slab]``: forward the fields of `ShiftedSums`, backward the two sums of the
# gradient.
COUNT, SHIFT, LINEAR, SQUARES = range(4)
SUM_GRAD, SUM_GRAD_X_HAT = range(2)
SUMS = 4
LARGEST_FLOAT32 = float(np.finfo(np.float32).max)
# Variances below this may have lost digits to float32, which holds no square below 1e-38.
SUSPICIOUS = 1e-30


class ShiftedSums(NamedTuple):
    """Sums of ``count`` values about ``shift``, a value near their mean.

    Attributes:
        count: Number of values.
        shift: Subtracted from each value.
        linear: Sum of the differences.
        squares: Sum of their squares.
    """

    count: float
    shift: float
    linear: float
    squares: float


@jitted
def merged(a, b):
    """Merges two sets of shifted sums, about the shift of the first unless it is empty.

    The callers keep each shift within a standard deviation of the mean, so little cancels.
    """
    shift = b.shift if a.count == 0 else a.shift
    delta = b.shift - shift
    return ShiftedSums(
        a.count + b.count,
        shift,
        a.linear + b.linear + b.count * delta,
        a.squares + b.squares + delta * (2 * b.linear + b.count * delta),
    )


@jitted
def sums_of_column(partial, k):
    """Returns the sums of column ``k`` in one slab."""
    return ShiftedSums(
        partial[COUNT, k], partial[SHIFT, k], partial[LINEAR, k], partial[SQUARES, k]
    )


@jitted
def add_moments(partial, k, sums):
    """Merges ``sums`` into those of column ``k`` in one slab."""
    set_moments(partial, k, merged(sums_of_column(partial, k), sums))


@jitted
def set_moments(partial, k, sums):
    """Writes the sums of column ``k`` in one slab."""
    partial[COUNT, k] = sums.count
    partial[SHIFT, k] = sums.shift
    partial[LINEAR, k] = sums.linear
    partial[SQUARES, k] = sums.squares


@jitted
def gather_moments(partials, first, last):
    """Merges the sums of all slabs into those of the first, for some columns."""
    for slab in range(1, len(partials)):
        for k in range(first, last):
            add_moments(partials[0], k, sums_of_column(partials[slab], k))


@jitted
def gather_columns(partial, channels, repeat):
    """Merges the sums of all columns of channel ``c`` into column ``c``, for all channels.

    From the left to the right: no column is overwritten before it has been read.
    """
    width = partial.shape[1]
    for c in range(channels):
        whole = ShiftedSums(0.0, 0.0, 0.0, 0.0)
        for start in range(c * repeat, width, channels * repeat):
            for k in range(start, start + repeat):
                whole = merged(whole, sums_of_column(partial, k))
        set_moments(partial, c, whole)


@jitted
def merge_moments(task, x, partial, first, last):
    """Writes mean and variance of some channels; updates their running statistics, if any.

    ``x`` is (samples, channels, length).
    """
    shape = (last - first,)
    sums = array_at(address_of(partial, first), partial.shape, np.float64)
    mean = array_at(task.mean + 8 * first, shape, np.float64)
    var = array_at(task.var + 8 * first, shape, np.float64)
    for c in range(last - first):
        rest = sums[LINEAR, c] / sums[COUNT, c]
        biased = sums[SQUARES, c] / sums[COUNT, c] - rest * rest
        mean[c] = sums[SHIFT, c] + rest
        var[c] = 0.0 if biased < 0 else biased
    for c in range(last - first):
        # Squares too small or too large for float32, or NaN: float64 decides.
        if not SUSPICIOUS < var[c] < math.inf:
            mean[c], var[c] = _moments_in_float64(x[:, first + c : first + c + 1, :])
    if task.running_mean:
        _move(task, task.running_mean, mean, 1.0, first)
        _move(task, task.running_var, var, task.count / (task.count - 1), first)
        if first == 0 < last and task.counter:
            array_at(task.counter, (1,), np.int64)[0] += 1


@jitted
def _moments_in_float64(values):
    """Mean and biased variance of an array (a, b, c) in any strides, in two passes over it."""
    count = values.size
    total = 0.0
    for i in range(values.shape[0]):
        for j in range(values.shape[1]):
            for k in range(values.shape[2]):
                total += float(widen(values[i, j, k]))
    mean = total / count
    linear, squares = 0.0, 0.0
    for i in range(values.shape[0]):
        for j in range(values.shape[1]):
            for k in range(values.shape[2]):
                d = float(widen(values[i, j, k])) - mean
                linear += d
                squares += d * d
    rest = linear / count
    var = squares / count - rest * rest
    return mean + rest, 0.0 if var < 0 else var


@jitted
def _move(task, address, values, factor, first):
    """Moves running statistics towards ``factor * values``; notes what float32 cannot hold."""
    weight, is_larger = task.weight_of_batch, False
    old = 1 - weight
    if task.running_in_float64:
        wide = array_at(address + 8 * first, values.shape, np.float64)
        for c in range(len(values)):
            wide[c] = old * wide[c] + weight * (factor * values[c])
        return
    narrow = array_at(address + 4 * first, values.shape, np.float32)
    for c in range(len(values)):
        moved = old * float(narrow[c]) + weight * (factor * values[c])
        narrow[c] = moved
        is_larger |= abs(moved) > LARGEST_FLOAT32
    if is_larger:
        task.overflowed = 1


@jitted
def gather_grads(partials, first, last):
    """Adds the sums of all slabs to those of the first, for some columns."""
    for slab in range(1, len(partials)):
        for k in range(first, last):
            partials[0, SUM_GRAD, k] += partials[slab, SUM_GRAD, k]
            partials[0, SUM_GRAD_X_HAT, k] += partials[slab, SUM_GRAD_X_HAT, k]


@jitted
def gather_grads_of_columns(partial, channels, repeat):
    """Does for the sums of the gradient what `gather_columns` does for moments."""
    width = partial.shape[1]
    for c in range(channels):
        sum_grad, sum_grad_x_hat = 0.0, 0.0
        for start in range(c * repeat, width, channels * repeat):
            for k in range(start, start + repeat):
                sum_grad += partial[SUM_GRAD, k]
                sum_grad_x_hat += partial[SUM_GRAD_X_HAT, k]
        partial[SUM_GRAD, c], partial[SUM_GRAD_X_HAT, c] = sum_grad, sum_grad_x_hat
