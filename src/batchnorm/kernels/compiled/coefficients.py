"""Coefficients of the maps: computed in float64 from statistics and sums, rounded for the loops."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from batchnorm.kernels.compiled.channel_sums import grad_sums_of_channel
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
    for c in range(first, last):
        mean, inv_std = _statistic(task, task.mean, c), _inv_std(task, c)
        scale = inv_std * (float(weight[c]) if task.weight else 1.0)
        shift = float(bias[c]) if task.bias else 0.0
        for start in range(c * task.repeat, coefficients.shape[1], task.channels * task.repeat):
            for k in range(start, start + task.repeat):
                coefficients[CENTER, k] = mean
                coefficients[INV_STD, k] = inv_std
                coefficients[SCALE, k] = scale
                rounding = float(coefficients[CENTER, k]) - mean
                coefficients[OFFSET, k] = rounding * scale + shift if rounding != 0 else shift


@jitted
def merge_grads(task, partials, coefficients, first, last):
    """Writes the sums of the gradient of some channels, and the coefficients of their means."""
    shape, number = (task.channels,), coefficients.dtype
    sums = array_at(task.sum_grad, shape, np.float64)
    sums_x_hat = array_at(task.sum_grad_x_hat, shape, np.float64)
    narrow_sums = array_at(task.sum_grad, shape, number)
    narrow_sums_x_hat = array_at(task.sum_grad_x_hat, shape, number)
    for c in range(first, last):
        sum_grad, sum_grad_x_hat = grad_sums_of_channel(partials, c, task.channels, task.repeat)
        # The loops computed ``x_hat`` about ``center``.
        error = _center_error(task, coefficients, c)
        sum_grad_x_hat += error * sum_grad
        if task.sums_as_number:
            narrow_sums[c], narrow_sums_x_hat[c] = sum_grad, sum_grad_x_hat
        else:
            sums[c], sums_x_hat[c] = sum_grad, sum_grad_x_hat
        means = sum_grad / task.count, sum_grad_x_hat / task.count
        _set_means(task, coefficients, c, error, means)


@jitted
def take_means(task, coefficients, first, last):
    """Writes the coefficients of some channels from means that the caller has merged."""
    shape = (task.channels,)
    mean_grad = array_at(task.mean_grad, shape, np.float64)
    mean_grad_x_hat = array_at(task.mean_grad_x_hat, shape, np.float64)
    for c in range(first, last):
        error = _center_error(task, coefficients, c)
        _set_means(task, coefficients, c, error, (mean_grad[c], mean_grad_x_hat[c]))


@jitted
def _set_means(task, coefficients, c, error, means):
    mean_grad, mean_grad_x_hat = means
    for start in range(c * task.repeat, coefficients.shape[1], task.channels * task.repeat):
        for k in range(start, start + task.repeat):
            scale = float(coefficients[SCALE, k])
            coefficients[X_HAT_FACTOR, k] = -scale * mean_grad_x_hat
            coefficients[CONSTANT, k] = -scale * (mean_grad + error * mean_grad_x_hat)


@jitted
def _center_error(task, coefficients, c):
    """Returns the distance of ``center`` from the exact mean, in standard deviations."""
    center = float(coefficients[CENTER, c * task.repeat])
    return (center - _statistic(task, task.mean, c)) * _inv_std(task, c)


@jitted
def _inv_std(task, c):
    return 1 / math.sqrt(_statistic(task, task.var, c) + task.eps)


@jitted
def _statistic(task, address, c):
    """A channel's mean or variance, in float64."""
    shape = (task.channels,)
    if task.statistics_in_float32:
        return float(array_at(address, shape, np.float32)[c])
    return array_at(address, shape, np.float64)[c]
