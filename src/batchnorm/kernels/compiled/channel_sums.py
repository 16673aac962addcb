"""Partial sums of channels, and how they merge: all in float64.

A *column* has one set of partial sums in each *slab*, a share of the rows that depends on the shape
alone. So any number of threads merges the same sums in the same order. Column ``k`` belongs to
channel ``k // repeat % channels``; planes have one column a channel.

The loops over channels take `FEW` of them at a time and the rest one by one, by functions that
compute vectors and single numbers to the same bits: they never round ``a * b + c`` only once. A
channel ``c`` has its sums in column ``c - origin``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from batchnorm.kernels.compiled.elements import array_at, widen
from batchnorm.kernels.compiled.gates import are_all_larger, is_any_larger, where_positive
from batchnorm.kernels.compiled.numba_internals import inlined, jitted
from batchnorm.kernels.compiled.vectors import (
    FEW,
    broadcast,
    load,
    store,
    zero_vector_like,
)

# Rows of ``partials[slab]``: forward the fields of `ShiftedSums`, backward the two sums of the
# gradient.
COUNT, SHIFT, LINEAR, SQUARES = range(4)
SUM_GRAD, SUM_GRAD_X_HAT = range(2)
SUMS = 4
LARGEST_FLOAT32 = float(np.finfo(np.float32).max)
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


@inlined
def sums_of_column(partial, k, zero):
    """Returns the sums of column ``k`` in one slab."""
    return ShiftedSums(
        load(partial, COUNT, k, zero),
        load(partial, SHIFT, k, zero),
        load(partial, LINEAR, k, zero),
        load(partial, SQUARES, k, zero),
    )


@inlined
def set_moments(partial, k, sums):
    """Writes the sums of column ``k`` in one slab."""
    store(partial, COUNT, k, sums.count)
    store(partial, SHIFT, k, sums.shift)
    store(partial, LINEAR, k, sums.linear)
    store(partial, SQUARES, k, sums.squares)


@jitted
def add_moments(partial, k, sums):
    """Merges ``sums`` into those of column ``k`` in one slab, which may be empty."""
    if partial[COUNT, k] == 0:
        set_moments(partial, k, sums)
    else:
        set_moments(partial, k, merged(sums_of_column(partial, k, 0.0), sums))


@jitted
def in_vectors(first, last):
    """Returns where the vectors of `FEW` end that begin at ``first``."""
    return last - (last - first) % FEW


@jitted
def gather_moments(partials, first, last):
    """Merges the sums of all slabs into those of the first, for some columns."""
    zero, end = zero_vector_like(partials, FEW), in_vectors(first, last)
    for slab in range(1, len(partials)):
        for k in range(first, end, FEW):
            _gather_moments(partials[0], partials[slab], k, zero)
        for k in range(end, last):
            _gather_moments(partials[0], partials[slab], k, 0.0)


@inlined
def _gather_moments(into, partial, k, zero):
    whole = merged(sums_of_column(into, k, zero), sums_of_column(partial, k, zero))
    set_moments(into, k, whole)


@jitted
def gather_columns(partial, channels, repeat):
    """Merges the sums of all columns of each channel into the last columns, one a channel.

    From the right to the left, no column is overwritten before it has been read.
    """
    width = partial.shape[1]
    for c in range(channels - 1, -1, -1):
        whole, skip = sums_of_column(partial, c * repeat, 0.0), 1
        for start in range(c * repeat, width, channels * repeat):
            for k in range(start + skip, start + repeat):
                whole = merged(whole, sums_of_column(partial, k, 0.0))
            skip = 0
        set_moments(partial, width - channels + c, whole)


@jitted
def merge_moments(task, x, partial, first, last, origin):
    """Writes mean and variance of some channels; updates their running statistics, if any.

    ``x`` is (samples, channels, length).
    """
    zero, end = zero_vector_like(partial, FEW), in_vectors(first, last)
    for c in range(first, end, FEW):
        _merge_moments(task, x, partial, c, c - origin, FEW, zero)
    for c in range(end, last):
        _merge_moments(task, x, partial, c, c - origin, 1, 0.0)


@inlined
def _merge_moments(task, x, partial, c, k, count, zero):
    shape = (1, task.channels)
    means, variances = array_at(task.mean, shape, np.float64), array_at(task.var, shape, np.float64)
    sums = sums_of_column(partial, k, zero)
    rest = sums.linear / sums.count
    var = sums.squares / sums.count - rest * rest
    store(means, 0, c, sums.shift + rest)
    store(variances, 0, c, where_positive(var, var, zero))
    # Squares too small or too large for float32, or NaN: float64 decides.
    least, most = broadcast(SUSPICIOUS, zero), broadcast(math.inf, zero)
    if not (are_all_larger(var, least) and are_all_larger(most, var)):
        _look_again(x, means, variances, c, c + count)
    if task.running_mean:
        mean, var = load(means, 0, c, zero), load(variances, 0, c, zero)
        _update_running(task, c, mean, var, zero)
        if c == 0 and task.counter:
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


@inlined
def _update_running(task, c, mean, var, zero):
    """Moves the running statistics of channels towards the batch's."""
    _move(task, task.running_mean, c, mean, zero)
    _move(task, task.running_var, c, var * broadcast(task.count / (task.count - 1), zero), zero)


@inlined
def _move(task, address, c, value, zero):
    shape = (1, task.channels)
    if task.running_in_float64:
        running = array_at(address, shape, np.float64)
        store(running, 0, c, _moved(task, load(running, 0, c, zero), value, zero))
    else:
        narrow = array_at(address, shape, np.float32)
        moved = _moved(task, load(narrow, 0, c, zero), value, zero)
        store(narrow, 0, c, moved)
        largest = broadcast(LARGEST_FLOAT32, zero)
        if is_any_larger(moved, largest) or is_any_larger(zero - moved, largest):
            task.overflowed = 1


@inlined
def _moved(task, running, value, zero):
    weight, of_old = task.weight_of_batch, 1 - task.weight_of_batch
    return broadcast(of_old, zero) * running + broadcast(weight, zero) * value


@jitted
def gather_grads(partials, first, last):
    """Adds the sums of all slabs to those of the first, for some columns."""
    zero, end = zero_vector_like(partials, FEW), in_vectors(first, last)
    for slab in range(1, len(partials)):
        for k in range(first, end, FEW):
            _add_grads(partials[0], partials[slab], k, zero)
        for k in range(end, last):
            _add_grads(partials[0], partials[slab], k, 0.0)


@inlined
def _add_grads(into, partial, k, zero):
    for row in range(2):
        store(into, row, k, load(into, row, k, zero) + load(partial, row, k, zero))


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
