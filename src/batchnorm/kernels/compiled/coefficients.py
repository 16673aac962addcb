"""Coefficients of the maps: computed in float64 from statistics and sums, rounded for the loops."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from batchnorm.kernels.compiled.channel_sums import SUM_GRAD, SUM_GRAD_X_HAT, in_vectors
from batchnorm.kernels.compiled.elements import array_at
from batchnorm.kernels.compiled.gates import where_zero
from batchnorm.kernels.compiled.numba_internals import inlined, jitted
from batchnorm.kernels.compiled.vectors import (
    FEW,
    broadcast,
    load,
    rounded,
    square_root,
    store,
    zero_vector_like,
)


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
def prepare(task, coefficients, weight, bias, first, last, origin):
    """Writes the coefficients of `maps.normalize` of some channels, from mean and variance.

    Those of channel ``c`` go into column ``c - origin``; `spread` copies them to the others.
    """
    zero, end = _zero_of_sums(task), in_vectors(first, last)
    for c in range(first, end, FEW):
        _prepare(task, coefficients, weight, bias, c, c - origin, zero)
    for c in range(end, last):
        _prepare(task, coefficients, weight, bias, c, c - origin, 0.0)


@inlined
def _prepare(task, coefficients, weight, bias, c, k, zero):
    mean, inv_std = _statistic(task, task.mean, c, zero), _inv_std(task, c, zero)
    scale = _scale(task, inv_std, weight, c, zero)
    shift = load(bias, 0, c, zero) if task.bias else broadcast(0.0, zero)
    store(coefficients, CENTER, k, mean)
    store(coefficients, INV_STD, k, inv_std)
    store(coefficients, SCALE, k, scale)
    rounding = rounded(mean, coefficients) - mean
    # An infinite scale times a rounding of zero would be NaN.
    store(coefficients, OFFSET, k, where_zero(rounding, shift, rounding * scale + shift))


@jitted
def spread(coefficients, first, last, channels, repeat):
    """Copies some rows of coefficients from the last columns, one a channel, to all columns."""
    zero, width = zero_vector_like(coefficients, FEW), coefficients.shape[1]
    blocks, whole = width // (channels * repeat), (repeat + FEW - 1) // FEW * FEW
    for block in range(blocks):
        for c in range(channels):
            source, start = width - channels + c, (block * channels + c) * repeat
            # What is read later begins here.
            stop = source + 1 if block == blocks - 1 else width - channels
            if start + whole <= stop:
                for row in range(first, last):
                    number = broadcast(coefficients[row, source], zero)
                    for k in range(start, start + whole, FEW):
                        store(coefficients, row, k, number)
            else:
                for row in range(first, last):
                    number = coefficients[row, source]
                    for k in range(start, start + repeat):
                        coefficients[row, k] = number


@jitted
def merge_grads(task, partial, coefficients, weight, first, last, origin):
    """Writes the sums of the gradient of some channels, and the coefficients of their means."""
    zero, end = _zero_of_sums(task), in_vectors(first, last)
    for c in range(first, end, FEW):
        _merge_grads(task, partial, coefficients, weight, c, c - origin, zero)
    for c in range(end, last):
        _merge_grads(task, partial, coefficients, weight, c, c - origin, 0.0)


@inlined
def _merge_grads(task, partial, coefficients, weight, c, k, zero):
    inv_std = _inv_std(task, c, zero)
    # The loops computed ``x_hat`` about ``center``.
    error = _center_error(task, coefficients, inv_std, c, zero)
    sum_grad = load(partial, SUM_GRAD, k, zero)
    sum_grad_x_hat = load(partial, SUM_GRAD_X_HAT, k, zero) + error * sum_grad
    shape, number = (1, task.channels), coefficients.dtype
    if task.sums_as_number:
        store(array_at(task.sum_grad, shape, number), 0, c, sum_grad)
        store(array_at(task.sum_grad_x_hat, shape, number), 0, c, sum_grad_x_hat)
    else:
        store(array_at(task.sum_grad, shape, np.float64), 0, c, sum_grad)
        store(array_at(task.sum_grad_x_hat, shape, np.float64), 0, c, sum_grad_x_hat)
    count = broadcast(float(task.count), zero)
    means = sum_grad / count, sum_grad_x_hat / count
    scale = rounded(_scale(task, inv_std, weight, c, zero), coefficients)
    _set_means(coefficients, k, scale, error, means, zero)


@jitted
def take_means(task, coefficients, weight, first, last, origin):
    """Writes the coefficients of some channels from means that the caller has merged."""
    zero, end = _zero_of_sums(task), in_vectors(first, last)
    for c in range(first, end, FEW):
        _take_means(task, coefficients, weight, c, c - origin, zero)
    for c in range(end, last):
        _take_means(task, coefficients, weight, c, c - origin, 0.0)


@inlined
def _take_means(task, coefficients, weight, c, k, zero):
    shape, inv_std = (1, task.channels), _inv_std(task, c, zero)
    mean_grad = load(array_at(task.mean_grad, shape, np.float64), 0, c, zero)
    mean_grad_x_hat = load(array_at(task.mean_grad_x_hat, shape, np.float64), 0, c, zero)
    scale = rounded(_scale(task, inv_std, weight, c, zero), coefficients)
    error = _center_error(task, coefficients, inv_std, c, zero)
    _set_means(coefficients, k, scale, error, (mean_grad, mean_grad_x_hat), zero)


@inlined
def _set_means(coefficients, k, scale, error, means, zero):
    mean_grad, mean_grad_x_hat = means
    store(coefficients, X_HAT_FACTOR, k, zero - scale * mean_grad_x_hat)
    store(coefficients, CONSTANT, k, zero - scale * (mean_grad + error * mean_grad_x_hat))


@inlined
def _center_error(task, coefficients, inv_std, c, zero):
    """Returns the distance of ``center`` from the exact mean, in standard deviations."""
    mean = _statistic(task, task.mean, c, zero)
    return (rounded(mean, coefficients) - mean) * inv_std


@inlined
def _scale(task, inv_std, weight, c, zero):
    return inv_std * load(weight, 0, c, zero) if task.weight else inv_std


@inlined
def _inv_std(task, c, zero):
    var = _statistic(task, task.var, c, zero) + broadcast(task.eps, zero)
    return broadcast(1.0, zero) / square_root(var)


@inlined
def _statistic(task, address, c, zero):
    """Mean or variance of channels, in float64."""
    shape = (1, task.channels)
    if task.statistics_in_float32:
        return load(array_at(address, shape, np.float32), 0, c, zero)
    return load(array_at(address, shape, np.float64), 0, c, zero)


@jitted
def _zero_of_sums(task):
    return zero_vector_like(array_at(task.mean, (1, task.channels), np.float64), FEW)
