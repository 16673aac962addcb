"""Coefficients of the maps: computed in float64 from statistics and sums, rounded for the loops."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from batchnorm.kernels.compiled.channel_sums import SUM_GRAD, SUM_GRAD_X_HAT
from batchnorm.kernels.compiled.elements import array_at
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
def prepare(task, coefficients, weight, bias, first, last):
    """Writes the coefficients of `maps.normalize` of some channels, from mean and variance."""
    means, narrow_means = _in_both_dtypes(task.mean, first, last)
    variances, narrow_variances = _in_both_dtypes(task.var, first, last)
    in_float32, eps = task.statistics_in_float32 != 0, task.eps
    weight, has_weight = weight[first:last], task.weight != 0
    bias, has_bias = bias[first:last], task.bias != 0
    center, inv_std = coefficients[CENTER, first:last], coefficients[INV_STD, first:last]
    scale, offset = coefficients[SCALE, first:last], coefficients[OFFSET, first:last]
    for c in range(last - first):
        mean = float(narrow_means[c]) if in_float32 else means[c]
        var = float(narrow_variances[c]) if in_float32 else variances[c]
        exact_inv_std = 1 / math.sqrt(var + eps)
        exact_scale = exact_inv_std * (float(weight[c]) if has_weight else 1.0)
        shift = float(bias[c]) if has_bias else 0.0
        center[c] = mean
        inv_std[c] = exact_inv_std
        scale[c] = exact_scale
        rounding = float(center[c]) - mean
        # An infinite scale times a rounding of zero would be NaN.
        offset[c] = rounding * exact_scale + shift if rounding != 0 else shift


@jitted
def _in_both_dtypes(address, first, last):
    """Returns a vector of some channels as if it were float64, and as if it were float32."""
    shape = (last - first,)
    wide = array_at(address + 8 * first, shape, np.float64)
    return wide, array_at(address + 4 * first, shape, np.float32)


@jitted
def spread(numbers, coefficients, rows, repeat):
    """Copies some rows of coefficients, one number a channel, to all columns of each channel."""
    channels, width = numbers.shape[1], coefficients.shape[1]
    for row in range(rows):
        for start in range(0, width, channels * repeat):
            for c in range(channels):
                for k in range(start + c * repeat, start + (c + 1) * repeat):
                    coefficients[row, k] = numbers[row, c]


@jitted
def merge_grads(task, partial, coefficients, first, last):
    """Writes the sums of the gradient of some channels, and the coefficients of their means."""
    sums, sums_x_hat = partial[SUM_GRAD, first:last], partial[SUM_GRAD_X_HAT, first:last]
    means, _ = _in_both_dtypes(task.mean, first, last)
    center, inv_std = coefficients[CENTER, first:last], coefficients[INV_STD, first:last]
    for c in range(last - first):
        # The loops computed ``x_hat`` about ``center``.
        sums_x_hat[c] += (float(center[c]) - means[c]) * float(inv_std[c]) * sums[c]
    _write(task.sum_grad, task.sums_as_number, coefficients, sums, first)
    _write(task.sum_grad_x_hat, task.sums_as_number, coefficients, sums_x_hat, first)
    _set_means(task, coefficients, sums, sums_x_hat, 1 / task.count, first, last)


@jitted
def _write(address, as_number, coefficients, sums, first):
    shape = (first + len(sums),)
    if as_number:
        narrow = array_at(address, shape, coefficients.dtype)[first:]
        for c in range(len(sums)):
            narrow[c] = sums[c]
    else:
        wide = array_at(address, shape, np.float64)[first:]
        for c in range(len(sums)):
            wide[c] = sums[c]


@jitted
def take_means(task, coefficients, first, last):
    """Writes the coefficients of some channels from means that the caller has merged."""
    mean_grad, _ = _in_both_dtypes(task.mean_grad, first, last)
    mean_grad_x_hat, _ = _in_both_dtypes(task.mean_grad_x_hat, first, last)
    _set_means(task, coefficients, mean_grad, mean_grad_x_hat, 1.0, first, last)


@jitted
def _set_means(task, coefficients, sums, sums_x_hat, share, first, last):
    """Writes the coefficients of the means, which are sums times ``share``."""
    means, _ = _in_both_dtypes(task.mean, first, last)
    center, inv_std = coefficients[CENTER, first:last], coefficients[INV_STD, first:last]
    scale, x_hat_factor = coefficients[SCALE, first:last], coefficients[X_HAT_FACTOR, first:last]
    constant = coefficients[CONSTANT, first:last]
    for c in range(last - first):
        error = (float(center[c]) - means[c]) * float(inv_std[c])
        mean_grad, mean_grad_x_hat = share * sums[c], share * sums_x_hat[c]
        minus = -float(scale[c])
        x_hat_factor[c] = minus * mean_grad_x_hat
        constant[c] = minus * (mean_grad + error * mean_grad_x_hat)
