"""Coefficients of the maps: computed in float64 from statistics and sums, rounded for the loops.

LLVM makes vectors of a loop over channels if it counts from zero and reads the task before it. So
arrays begin at the first of some channels here.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from batchnorm.kernels.compiled.channel_sums import SUM_GRAD, SUM_GRAD_X_HAT
from batchnorm.kernels.compiled.elements import address_of, array_at
from batchnorm.kernels.compiled.numba_internals import inlined, jitted
from batchnorm.kernels.compiled.vectors import broadcast, load


class Coefficients(NamedTuple):
    """Coefficients of one channel, or of a vector of columns.

    ``y = (x - center) * scale + offset`` and
    ``grad_x = scale * grad + x_hat_factor * x_hat + constant``,
    where ``x_hat = (x - center) * inv_std``.

    Attributes:
        center: The mean, rounded.
        inv_std: ``1 / sqrt(var + eps)``.
        scale: ``inv_std * weight``.
        offset: The bias, corrected for the rounding of ``center``.
        x_hat_factor: Minus ``scale`` times the mean of ``grad * x_hat``.
        constant: Minus ``scale`` times the mean of ``grad``, corrected in the same way.
    """

    center: float
    inv_std: float
    scale: float
    offset: float
    x_hat_factor: float
    constant: float


# Rows of the array of coefficients: the fields above. The last two are written only by a backward
# pass; in others they are read, if at all, but not used.
CENTER, INV_STD, SCALE, OFFSET, X_HAT_FACTOR, CONSTANT = range(6)
ROWS = 6


@inlined
def of_channel(coefficients, c):
    """Reads the coefficients of column ``c``."""
    return Coefficients(
        coefficients[CENTER, c],
        coefficients[INV_STD, c],
        coefficients[SCALE, c],
        coefficients[OFFSET, c],
        coefficients[X_HAT_FACTOR, c],
        coefficients[CONSTANT, c],
    )


@inlined
def of_columns(coefficients, k, zero):
    """Reads the coefficients of a vector of columns that begins at column ``k``."""
    return Coefficients(
        load(coefficients, CENTER, k, zero),
        load(coefficients, INV_STD, k, zero),
        load(coefficients, SCALE, k, zero),
        load(coefficients, OFFSET, k, zero),
        load(coefficients, X_HAT_FACTOR, k, zero),
        load(coefficients, CONSTANT, k, zero),
    )


@inlined
def in_all_lanes(numbers, zero):
    """Broadcasts the coefficients of a channel to vectors like ``zero``."""
    return Coefficients(
        broadcast(numbers.center, zero),
        broadcast(numbers.inv_std, zero),
        broadcast(numbers.scale, zero),
        broadcast(numbers.offset, zero),
        broadcast(numbers.x_hat_factor, zero),
        broadcast(numbers.constant, zero),
    )


@jitted
def prepare(task, coefficients, first, last):
    """Writes the coefficients of `maps.normalize` of some channels, from mean and variance."""
    shape, number = (last - first,), coefficients.dtype
    table = array_at(address_of(coefficients, first), coefficients.shape, number)
    weight = array_at(task.weight + coefficients.itemsize * first, shape, number)
    bias = array_at(task.bias + coefficients.itemsize * first, shape, number)
    means = array_at(task.mean + 8 * first, shape, np.float64)
    variances = array_at(task.var + 8 * first, shape, np.float64)
    narrow_means = array_at(task.mean + 4 * first, shape, np.float32)
    narrow_variances = array_at(task.var + 4 * first, shape, np.float32)
    eps, in_float32 = task.eps, task.statistics_in_float32 != 0
    _fill(table, SCALE, weight, task.weight, 1.0)
    _fill(table, OFFSET, bias, task.bias, 0.0)
    for c in range(last - first):
        mean = float(narrow_means[c]) if in_float32 else means[c]
        var = float(narrow_variances[c]) if in_float32 else variances[c]
        inv_std = 1 / math.sqrt(var + eps)
        scale = inv_std * float(table[SCALE, c])
        table[CENTER, c] = mean
        rounding = float(table[CENTER, c]) - mean
        table[INV_STD, c] = inv_std
        table[SCALE, c] = scale
        # An infinite scale times a rounding of zero would be NaN.
        table[OFFSET, c] += rounding * scale if rounding != 0 else 0.0


@jitted
def _fill(table, row, values, address, default):
    """Copies ``values`` to a row, or fills it if they have no address."""
    for c in range(len(values)):
        table[row, c] = values[c] if address else default


@jitted
def spread(numbers, coefficients, first, last, repeat):
    """Copies some rows of coefficients, one number a channel, to all columns of each channel."""
    channels, width = numbers.shape[1], coefficients.shape[1]
    for row in range(first, last):
        for start in range(0, width, channels * repeat):
            for column in range(start, start + repeat):
                for c in range(channels):
                    coefficients[row, column + c * repeat] = numbers[row, c]


@jitted
def merge_grads(task, partial, coefficients, first, last):
    """Writes the sums of the gradient of some channels, and the coefficients of their means."""
    table = array_at(address_of(coefficients, first), coefficients.shape, coefficients.dtype)
    sums = array_at(address_of(partial, first), partial.shape, np.float64)
    means = array_at(task.mean + 8 * first, (last - first,), np.float64)
    share = 1 / task.count
    for c in range(last - first):
        error = _center_error(table, means, c)
        sum_grad = sums[SUM_GRAD, c]
        # The loops computed ``x_hat`` about ``center``.
        sum_grad_x_hat = sums[SUM_GRAD_X_HAT, c] + error * sum_grad
        sums[SUM_GRAD_X_HAT, c] = sum_grad_x_hat
        _set_means(table, c, error, share * sum_grad, share * sum_grad_x_hat)
    of_sum = coefficients.itemsize if task.sums_as_number else 8
    for row in range(2):
        address = (task.sum_grad, task.sum_grad_x_hat)[row] + of_sum * first
        if task.sums_as_number:
            narrow = array_at(address, (last - first,), coefficients.dtype)
            for c in range(last - first):
                narrow[c] = sums[row, c]
        else:
            wide = array_at(address, (last - first,), np.float64)
            for c in range(last - first):
                wide[c] = sums[row, c]


@jitted
def take_means(task, coefficients, first, last):
    """Writes the coefficients of some channels from means that the caller has merged."""
    shape = (last - first,)
    table = array_at(address_of(coefficients, first), coefficients.shape, coefficients.dtype)
    means = array_at(task.mean + 8 * first, shape, np.float64)
    mean_grad = array_at(task.mean_grad + 8 * first, shape, np.float64)
    mean_grad_x_hat = array_at(task.mean_grad_x_hat + 8 * first, shape, np.float64)
    for c in range(last - first):
        _set_means(table, c, _center_error(table, means, c), mean_grad[c], mean_grad_x_hat[c])


@jitted
def _center_error(table, means, c):
    """Returns the distance of ``center`` from the exact mean, in standard deviations."""
    return (float(table[CENTER, c]) - means[c]) * float(table[INV_STD, c])


@jitted
def _set_means(table, c, error, mean_grad, mean_grad_x_hat):
    minus = -float(table[SCALE, c])
    table[X_HAT_FACTOR, c] = minus * mean_grad_x_hat
    table[CONSTANT, c] = minus * (mean_grad + error * mean_grad_x_hat)
