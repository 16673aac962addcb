"""Partial sums of channels, and how they merge: all in float64.

A *column* has one set of partial sums in each *slab*, a share of the rows that depends on the shape
alone. So any number of threads merges the same sums in the same order. Column ``k`` belongs to
channel ``k // repeat % channels``; planes have one column a channel.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from batchnorm.kernels.compiled.elements import array_at, widen
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
    whole = merged(sums_of_column(partial, k), sums)
    partial[COUNT, k] = whole.count
    partial[SHIFT, k] = whole.shift
    partial[LINEAR, k] = whole.linear
    partial[SQUARES, k] = whole.squares


@jitted
def merge_moments(task, x, partials, first, last):
    """Writes mean and variance of some channels; updates their running statistics, if any.

    ``x`` is (samples, channels, length).
    """
    shape = (task.channels,)
    mean, var = array_at(task.mean, shape, np.float64), array_at(task.var, shape, np.float64)
    for c in range(first, last):
        mean[c], var[c] = _moments_of_channel(partials, c, task.channels, task.repeat)
        # Squares too small or too large for float32, or NaN: float64 decides.
        if not SUSPICIOUS < var[c] < math.inf:
            mean[c], var[c] = _moments_in_float64(x[:, c : c + 1, :])
        if task.running_mean:
            _update_running(task, c, mean[c], var[c])


@jitted
def _moments_of_channel(partials, channel, channels, repeat):
    """Mean and biased variance of a channel, merged over slabs and columns."""
    slabs, _, columns = partials.shape
    sums = ShiftedSums(0.0, 0.0, 0.0, 0.0)
    for s in range(slabs):
        for start in range(channel * repeat, columns, channels * repeat):
            for k in range(start, start + repeat):
                sums = merged(sums, sums_of_column(partials[s], k))
    rest = sums.linear / sums.count
    var = sums.squares / sums.count - rest * rest
    return sums.shift + rest, 0.0 if var < 0 else var


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
def _update_running(task, c, mean, var):
    """Moves a channel's running statistics towards the batch's; counts the batch once."""
    shape, old = (task.channels,), 1 - task.weight_of_batch
    unbiased = task.count / (task.count - 1)
    by_mean, by_var = task.weight_of_batch * mean, task.weight_of_batch * (var * unbiased)
    if task.running_in_float64:
        means = array_at(task.running_mean, shape, np.float64)
        variances = array_at(task.running_var, shape, np.float64)
        means[c], variances[c] = old * means[c] + by_mean, old * variances[c] + by_var
    else:
        narrow_means = array_at(task.running_mean, shape, np.float32)
        narrow_variances = array_at(task.running_var, shape, np.float32)
        new = old * float(narrow_means[c]) + by_mean, old * float(narrow_variances[c]) + by_var
        narrow_means[c], narrow_variances[c] = new
        if max(abs(new[0]), new[1]) > LARGEST_FLOAT32:
            task.overflowed = 1
    if c == 0 and task.counter:
        array_at(task.counter, (1,), np.int64)[0] += 1


@jitted
def grad_sums_of_channel(partials, channel, channels, repeat):
    """Returns the two sums of the gradient of a channel, over slabs and columns."""
    slabs, _, columns = partials.shape
    sum_grad, sum_grad_x_hat = 0.0, 0.0
    for s in range(slabs):
        for start in range(channel * repeat, columns, channels * repeat):
            for k in range(start, start + repeat):
                sum_grad += partials[s, SUM_GRAD, k]
                sum_grad_x_hat += partials[s, SUM_GRAD_X_HAT, k]
    return sum_grad, sum_grad_x_hat
