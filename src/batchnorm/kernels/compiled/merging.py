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


@njit
def merge_moments(task, x, partials, first, last):
    """Mean and variance of some channels; ``x`` is (samples, channels, length)."""
    mean, var = _vector(task.mean, task), _vector(task.var, task)
    for c in range(first, last):
        mean[c], var[c] = moments_of_channel(partials, c, task.channels, task.repeat)
        if is_suspicious(var[c]):
            mean[c], var[c] = wide_moments(x[:, c : c + 1, :])


@njit
def prepare(task, coefficients, weight, bias, first, last):
    """Coefficients of `rows.normalize`, by a mean and a variance that are known."""
    mean, var = _vector(task.mean, task), _vector(task.var, task)
    for c in range(first, last):
        gamma = float(weight[c]) if task.weight else 1.0
        beta = float(bias[c]) if task.bias else 0.0
        inv_std = 1 / math.sqrt(var[c] + task.eps)
        set_coefficients(coefficients, c, task.channels, task.repeat, mean[c], inv_std, gamma, beta)


@njit
def merge_grads_of(task, partials, coefficients, first, last):
    """Sums of the gradient of some channels, and the coefficients of `rows.grad_input`."""
    mean, var = _vector(task.mean, task), _vector(task.var, task)
    plain, product = _vector(task.sum_grad, task), _vector(task.sum_grad_x_hat, task)
    for c in range(first, last):
        inv_std = 1 / math.sqrt(var[c] + task.eps)
        if not task.given:
            plain[c], product[c] = merge_grads(
                partials, coefficients, c, task.channels, task.repeat, mean[c], inv_std
            )
        means = plain[c] / task.count, product[c] / task.count
        set_grad_coefficients(coefficients, c, task.channels, task.repeat, mean[c], inv_std, means)


@njit
def _vector(address, task):
    return array_at(address, (task.channels,), np.float64)
