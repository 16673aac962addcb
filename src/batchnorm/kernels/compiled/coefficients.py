"""Coefficients of the maps: computed in float64 from statistics and sums, rounded for the loops."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from batchnorm.kernels.compiled.channel_sums import SUM_GRAD, SUM_GRAD_X_HAT
from batchnorm.kernels.compiled.channels import (
    load_few,
    rounded_like,
    size_of,
    square_root,
    store_few,
    where_zero,
)
from batchnorm.kernels.compiled.elements import array_at
from batchnorm.kernels.compiled.numba_internals import inlined, jitted
from batchnorm.kernels.compiled.vectors import FEW, broadcast, load, zero_vector_like


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
def prepare(task, coefficients, weight, bias, first, last, origin, zero):
    """Writes the coefficients of `maps.normalize` of some channels, from mean and variance.

    Those of channel ``c`` go into column ``c - origin``; `spread` copies them to the others.
    ``zero`` has as many numbers as are computed at a time.
    """
    size = size_of(zero)
    for c in range(first, last, size):
        count, k = min(size, last - c), c - origin
        mean, inv_std = _statistic(task, task.mean, c, count, zero), _inv_std(task, c, count, zero)
        scale = _scale(task, inv_std, weight, c, count, zero)
        shift = load_few(bias, 0, c, count, zero) if task.bias else zero
        store_few(coefficients, CENTER, k, count, mean)
        store_few(coefficients, INV_STD, k, count, inv_std)
        store_few(coefficients, SCALE, k, count, scale)
        rounding = rounded_like(mean, coefficients) - mean
        # An infinite scale times a rounding of zero would be NaN.
        offset = where_zero(rounding, shift, rounding * scale + shift)
        store_few(coefficients, OFFSET, k, count, offset)


@jitted
def spread(coefficients, first, last, channels, repeat):
    """Copies some rows of coefficients from the last columns, one a channel, to all columns.

    From the left to the right, no column is overwritten before it has been read.
    """
    width, zero = coefficients.shape[1], zero_vector_like(coefficients, FEW)
    for start in range(0, width, repeat):
        source = width - channels + start // repeat % channels
        for row in range(first, last):
            number = coefficients[row, source] + zero
            for k in range(start, start + repeat, FEW):
                store_few(coefficients, row, k, min(FEW, start + repeat - k), number)


@jitted
def take_means(task, partial, coefficients, weight, first, last, origin, merges, zero):
    """Writes the coefficients of the means of the gradient, which the caller may have merged.

    If this call ``merges``, it writes the sums of the gradient first and takes the means of those.
    """
    size = size_of(zero)
    for c in range(first, last, size):
        count = min(size, last - c)
        inv_std = _inv_std(task, c, count, zero)
        error = _center_error(task, coefficients, inv_std, c, count, zero)
        scale = _scale(task, inv_std, weight, c, count, zero)
        if merges:
            means = _merge_grads(task, partial, coefficients, error, c, c - origin, count, zero)
        else:
            means = _means(task, c, count, zero)
        _set_means(coefficients, c - origin, count, scale, error, means)


@jitted
def _merge_grads(task, partial, coefficients, error, c, k, count, zero):
    sum_grad = load_few(partial, SUM_GRAD, k, count, zero)
    # The loops computed ``x_hat`` about ``center``.
    sum_grad_x_hat = load_few(partial, SUM_GRAD_X_HAT, k, count, zero) + error * sum_grad
    _store_sum(task, task.sum_grad, coefficients, c, count, sum_grad)
    _store_sum(task, task.sum_grad_x_hat, coefficients, c, count, sum_grad_x_hat)
    total = float(task.count)
    return sum_grad / total, sum_grad_x_hat / total


@jitted
def _store_sum(task, address, coefficients, c, count, value):
    shape = (1, task.channels)
    if task.sums_as_number:
        store_few(array_at(address, shape, coefficients.dtype), 0, c, count, value)
    else:
        store_few(array_at(address, shape, np.float64), 0, c, count, value)


@jitted
def _means(task, c, count, zero):
    shape = (1, task.channels)
    mean_grad = load_few(array_at(task.mean_grad, shape, np.float64), 0, c, count, zero)
    mean_grad_x_hat = load_few(array_at(task.mean_grad_x_hat, shape, np.float64), 0, c, count, zero)
    return mean_grad, mean_grad_x_hat


@jitted
def _set_means(coefficients, k, count, scale, error, means):
    mean_grad, mean_grad_x_hat = means
    minus = -1.0 * rounded_like(scale, coefficients)
    store_few(coefficients, X_HAT_FACTOR, k, count, minus * mean_grad_x_hat)
    store_few(coefficients, CONSTANT, k, count, minus * (mean_grad + error * mean_grad_x_hat))


@jitted
def _center_error(task, coefficients, inv_std, c, count, zero):
    """Returns the distance of ``center`` from the exact mean, in standard deviations."""
    mean = _statistic(task, task.mean, c, count, zero)
    return (rounded_like(mean, coefficients) - mean) * inv_std


@jitted
def _scale(task, inv_std, weight, c, count, zero):
    return inv_std * load_few(weight, 0, c, count, zero) if task.weight else inv_std


@jitted
def _inv_std(task, c, count, zero):
    return 1.0 / square_root(_statistic(task, task.var, c, count, zero) + task.eps)


@jitted
def _statistic(task, address, c, count, zero):
    """Mean or variance of some channels."""
    shape = (1, task.channels)
    if task.statistics_in_float32:
        return load_few(array_at(address, shape, np.float32), 0, c, count, zero)
    return load_few(array_at(address, shape, np.float64), 0, c, count, zero)
