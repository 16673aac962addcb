"""Partial sums of channels, and how they merge: all in float64.

A *column* has one set of partial sums in each *slab*, a share of the rows that depends on the shape
alone. So any number of threads merges the same sums in the same order. Column ``k`` belongs to
channel ``k // repeat % channels``; planes have one column a channel.

Loops over channels compute them as in `batchnorm.kernels.compiled.channels`, so many at a time as
``zero`` has numbers. Channel ``c`` has its sums in column ``c - origin``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from batchnorm.kernels.compiled.channels import count_larger, load_few, size_of, store_few
from batchnorm.kernels.compiled.elements import array_at, widen
from batchnorm.kernels.compiled.gates import where_positive
from batchnorm.kernels.compiled.numba_internals import inlined, jitted

# Rows of ``partials[slab]``: forward the fields of `ShiftedSums`, backward the two sums of the
# gradient.
COUNT, SHIFT, LINEAR, SQUARES = range(4)
SUM_GRAD, SUM_GRAD_X_HAT = range(2)
SUMS = 4
# The largest square of a float32.
LARGEST_SQUARE = float(np.finfo(np.float32).max) ** 2
# Variances below this may have lost digits to float32, which holds no square below 1e-38.
SUSPICIOUS = 1e-30


class ShiftedSums(NamedTuple):
    """Sums of ``count`` values about ``shift``, a value near their mean; numbers or vectors.

    Attributes:
        count: Number of values.
        shift: Subtracted from each value.
        linear: Sum of the differences.
        squares: Sum of their squares.
    """

    count: Any
    shift: Any
    linear: Any
    squares: Any


@inlined
def merged(a, b):
    """Merges two sets of shifted sums, about the shift of the first, which must not be empty.

    The callers keep each shift within a standard deviation of the mean, so little cancels.
    """
    delta = b.shift - a.shift
    change = b.count * delta
    return ShiftedSums(
        a.count + b.count,
        a.shift,
        a.linear + b.linear + change,
        a.squares + b.squares + delta * (b.linear + b.linear + change),
    )


@jitted
def sums_of_columns(partial, k, count, zero):
    """Returns the sums of ``count`` columns from ``k`` on, in one slab."""
    return ShiftedSums(
        load_few(partial, COUNT, k, count, zero),
        load_few(partial, SHIFT, k, count, zero),
        load_few(partial, LINEAR, k, count, zero),
        load_few(partial, SQUARES, k, count, zero),
    )


@jitted
def set_moments(partial, k, count, sums):
    """Writes the sums of ``count`` columns from ``k`` on, in one slab."""
    store_few(partial, COUNT, k, count, sums.count)
    store_few(partial, SHIFT, k, count, sums.shift)
    store_few(partial, LINEAR, k, count, sums.linear)
    store_few(partial, SQUARES, k, count, sums.squares)


@jitted
def add_moments(partial, k, sums):
    """Merges ``sums`` into those of column ``k`` in one slab, which may be empty."""
    if partial[COUNT, k] != 0:
        sums = merged(sums_of_columns(partial, k, 1, 0.0), sums)
    set_moments(partial, k, 1, sums)


@jitted
def gather_moments(partials, first, last, zero):
    """Merges the sums of all slabs into those of the first, for some columns."""
    size = size_of(zero)
    for slab in range(1, len(partials)):
        for k in range(first, last, size):
            count = min(size, last - k)
            sums = sums_of_columns(partials[0], k, count, zero)
            sums = merged(sums, sums_of_columns(partials[slab], k, count, zero))
            set_moments(partials[0], k, count, sums)


@jitted
def gather_columns(partial, channels, repeat, zero):
    """Merges the sums of all columns of each channel into the last columns, one a channel.

    From the right to the left, no column is overwritten before it has been read.
    """
    width = partial.shape[1]
    for c in range(channels - 1, -1, -1):
        whole, skip = sums_of_columns(partial, c * repeat, 1, zero), 1
        for start in range(c * repeat, width, channels * repeat):
            for k in range(start + skip, start + repeat):
                whole = merged(whole, sums_of_columns(partial, k, 1, zero))
            skip = 0
        set_moments(partial, width - channels + c, 1, whole)


@jitted
def merge_moments(task, x, partial, first, last, origin, zero):
    """Writes mean and variance of some channels; updates their running statistics, if any.

    ``x`` is (samples, channels, length).
    """
    shape, size = (1, task.channels), size_of(zero)
    means, variances = array_at(task.mean, shape, np.float64), array_at(task.var, shape, np.float64)
    unbiased = task.count / (task.count - 1)
    for c in range(first, last, size):
        count = min(size, last - c)
        sums = sums_of_columns(partial, c - origin, count, zero)
        rest = sums.linear / sums.count
        var = sums.squares / sums.count - rest * rest
        store_few(means, 0, c, count, sums.shift + rest)
        store_few(variances, 0, c, count, where_positive(var, var, zero))
        # Squares too small or too large for float32, or NaN: float64 decides.
        enough = count_larger(var, zero + SUSPICIOUS, count)
        if enough + count_larger(zero + math.inf, var, count) < 2 * count:
            _look_again(x, means, variances, c, c + count)
        if task.running_mean:
            mean = load_few(means, 0, c, count, zero)
            var = load_few(variances, 0, c, count, zero)
            _move(task, task.running_mean, c, count, mean, zero)
            _move(task, task.running_var, c, count, var * unbiased, zero)
    if task.running_mean and task.counter and first == 0 < last:
        array_at(task.counter, (1,), np.int64)[0] += 1


@jitted
def _look_again(x, means, variances, first, last):
    for c in range(first, last):
        if not SUSPICIOUS < variances[0, c] < math.inf:
            means[0, c], variances[0, c] = _moments_in_float64(x[:, c : c + 1, :])


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
def _move(task, address, c, count, value, zero):
    """Moves a running statistic of some channels towards the batch's."""
    shape, of_old, by = (1, task.channels), 1 - task.weight_of_batch, task.weight_of_batch * value
    if task.running_in_float64:
        running = array_at(address, shape, np.float64)
        store_few(running, 0, c, count, of_old * load_few(running, 0, c, count, zero) + by)
    else:
        narrow = array_at(address, shape, np.float32)
        moved = of_old * load_few(narrow, 0, c, count, zero) + by
        store_few(narrow, 0, c, count, moved)
        if count_larger(moved * moved, zero + LARGEST_SQUARE, count):
            task.overflowed = 1


@jitted
def gather_grads(partials, first, last, zero):
    """Adds the sums of all slabs to those of the first, for some columns."""
    for slab in range(1, len(partials)):
        add_grads(partials[0], partials[slab], first, last, zero)


@jitted
def add_grads(partial, more, first, last, zero):
    """Adds the first two rows of ``more`` to those of ``partial``, for some columns."""
    size = size_of(zero)
    for row in range(2):
        for k in range(first, last, size):
            count = min(size, last - k)
            whole = load_few(partial, row, k, count, zero) + load_few(more, row, k, count, zero)
            store_few(partial, row, k, count, whole)


@jitted
def gather_grads_of_columns(partial, channels, repeat):
    """Does for the sums of the gradient what `gather_columns` does for moments."""
    width = partial.shape[1]
    for c in range(channels - 1, -1, -1):
        sum_grad, sum_grad_x_hat = 0.0, 0.0
        for start in range(c * repeat, width, channels * repeat):
            for k in range(start, start + repeat):
                sum_grad += partial[SUM_GRAD, k]
                sum_grad_x_hat += partial[SUM_GRAD_X_HAT, k]
        home = width - channels + c
        partial[SUM_GRAD, home], partial[SUM_GRAD_X_HAT, home] = sum_grad, sum_grad_x_hat
