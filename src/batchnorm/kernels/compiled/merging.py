"""The steps between the loops: what is known of a channel once its slabs are summed up."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from batchnorm.kernels.compiled.elements import array_at
from batchnorm.kernels.compiled.statistics import (
    is_suspicious,
    merge_grads,
    moments_of_channel,
    set_coefficients,
    set_grad_coefficients,
    wide_moments,
)

LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


@njit
def merge_moments(task, x, partials, first, last):
    """Mean and variance of some channels; moves their running statistics, if there are any.

    ``x`` is (samples, channels, length).
    """
    shape = (task.channels,)
    mean, var = array_at(task.mean, shape, np.float64), array_at(task.var, shape, np.float64)
    for c in range(first, last):
        mean[c], var[c] = moments_of_channel(partials, c, task.channels, task.repeat)
        if is_suspicious(var[c]):
            mean[c], var[c] = wide_moments(x[:, c : c + 1, :])
        if task.running_mean:
            _move_running(task, c, mean[c], var[c])


@njit
def _move_running(task, c, mean, var):
    """Moves a channel's running statistics towards the batch's; counts the batch once."""
    shape, old = (task.channels,), 1 - task.weight_of_batch
    by_mean, by_var = task.weight_of_batch * mean, task.weight_of_batch * (var * _unbiased(task))
    if task.wide_running:
        means = array_at(task.running_mean, shape, np.float64)
        variances = array_at(task.running_var, shape, np.float64)
        means[c], variances[c] = old * means[c] + by_mean, old * variances[c] + by_var
    else:
        narrow_means = array_at(task.running_mean, shape, np.float32)
        narrow_variances = array_at(task.running_var, shape, np.float32)
        moved = old * float(narrow_means[c]) + by_mean, old * float(narrow_variances[c]) + by_var
        narrow_means[c], narrow_variances[c] = moved
    if var > LARGEST_FLOAT32:
        task.overflown = 1
    if c == 0 and task.counter:
        array_at(task.counter, (1,), np.int64)[0] += 1


@njit
def _unbiased(task):
    return task.count / (task.count - 1)


@njit
def prepare(task, coefficients, weight, bias, first, last):
    """Coefficients of `maps.normalize`, by a mean and a variance that are known."""
    for c in range(first, last):
        gamma = float(weight[c]) if task.weight else 1.0
        beta = float(bias[c]) if task.bias else 0.0
        mean, var = _statistic(task, task.mean, c), _statistic(task, task.var, c)
        inv_std = 1 / math.sqrt(var + task.eps)
        set_coefficients(coefficients, c, task.channels, task.repeat, mean, inv_std, gamma, beta)


@njit
def _statistic(task, address, c):
    """A channel's mean or variance, whichever is there."""
    shape = (task.channels,)
    if task.single:
        return float(array_at(address, shape, np.float32)[c])
    return array_at(address, shape, np.float64)[c]


@njit
def merge_grads_of(task, partials, coefficients, first, last):
    """Sums of the gradient of some channels, and the coefficients of `maps.grad_input`."""
    shape, narrow = (task.channels,), coefficients.dtype
    mean, var = array_at(task.mean, shape, np.float64), array_at(task.var, shape, np.float64)
    plains = array_at(task.sum_grad, shape, np.float64)
    products = array_at(task.sum_grad_x_hat, shape, np.float64)
    narrow_plains = array_at(task.sum_grad, shape, narrow)
    narrow_products = array_at(task.sum_grad_x_hat, shape, narrow)
    for c in range(first, last):
        inv_std = 1 / math.sqrt(var[c] + task.eps)
        if task.given:
            plain, product = plains[c], products[c]
        else:
            plain, product = merge_grads(
                partials, coefficients, c, task.channels, task.repeat, mean[c], inv_std
            )
            if task.narrow:
                narrow_plains[c], narrow_products[c] = plain, product
            else:
                plains[c], products[c] = plain, product
        means = plain / task.count, product / task.count
        set_grad_coefficients(coefficients, c, task.channels, task.repeat, mean[c], inv_std, means)
