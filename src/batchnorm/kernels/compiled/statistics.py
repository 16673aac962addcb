"""From partial sums to moments, gradients and the coefficients of the loops, all in float64.

A *column* has one set of partial sums in each *slab*, a fixed share of the rows that depends on the
shape alone: whoever computes a slab, the numbers and the order in which they are merged stay the
same. Column ``k`` belongs to channel ``k // repeat % channels``; planes have one column a channel.
"""

from __future__ import annotations

import math

from numba import njit

from batchnorm.kernels.compiled.elements import widen

# Rows of ``partials[slab]``: sums about a shift, or the two sums of the gradient.
COUNT, SHIFT, LINEAR, SQUARES = range(4)
PLAIN, PRODUCT = range(2)
SUMS = 4
# Rows of ``coefficients``.
CENTRE, INV_STD, SCALE, OFFSET, TILT, LEVEL = range(6)
SUSPICIOUS = 1e-30


@njit
def add_moments(partial, k, count, centre, linear, squares):
    """Merges ``count`` values, known by their sums about ``centre``, into a column's sums."""
    linear, squares = float(linear), float(squares)
    mean = float(centre) + linear / count
    if partial[COUNT, k] == 0:
        partial[SHIFT, k] = mean
    delta = mean - partial[SHIFT, k]
    partial[COUNT, k] += count
    partial[LINEAR, k] += count * delta
    partial[SQUARES, k] += squares - linear * linear / count + count * delta * delta


@njit
def moments_of_channel(partials, channel, channels, repeat):
    """Mean and biased variance of a channel, merged over slabs and columns."""
    slabs, _, columns = partials.shape
    origin = partials[0, SHIFT, channel * repeat]
    count, linear, squares = 0.0, 0.0, 0.0
    for s in range(slabs):
        for start in range(channel * repeat, columns, channels * repeat):
            for k in range(start, start + repeat):
                n, sum_d = partials[s, COUNT, k], partials[s, LINEAR, k]
                delta = partials[s, SHIFT, k] - origin
                count += n
                linear += sum_d + n * delta
                squares += partials[s, SQUARES, k] + 2 * delta * sum_d + n * delta * delta
    rest = linear / count
    var = squares / count - rest * rest
    return origin + rest, 0.0 if var < 0 else var


@njit
def is_suspicious(var):
    """Whether float32 may have been too narrow for the squares: then float64 has to decide."""
    return not SUSPICIOUS < var < math.inf


@njit
def wide_moments(values):
    """Mean and biased variance in float64, of anything that can be gone through twice.

    ``values`` is (a, b, c), in any strides.
    """
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


@njit
def sums_of_channel(partials, channel, channels, repeat):
    """The two sums of the gradient of a channel."""
    slabs, _, columns = partials.shape
    plain, product = 0.0, 0.0
    for s in range(slabs):
        for start in range(channel * repeat, columns, channels * repeat):
            for k in range(start, start + repeat):
                plain += partials[s, PLAIN, k]
                product += partials[s, PRODUCT, k]
    return plain, product


@njit
def set_coefficients(coefficients, channel, channels, repeat, mean, inv_std, weight, bias):
    """Coefficients of ``(x - centre) * scale + offset``, in all columns of a channel.

    ``centre`` is the mean, rounded; ``offset`` makes good what the rounding left.
    """
    scale = inv_std * weight
    for start in range(channel * repeat, coefficients.shape[1], channels * repeat):
        for k in range(start, start + repeat):
            coefficients[CENTRE, k] = mean
            coefficients[INV_STD, k] = inv_std
            coefficients[SCALE, k] = scale
            left = float(coefficients[CENTRE, k]) - mean
            coefficients[OFFSET, k] = left * scale + bias if left != 0 else bias


@njit
def merge_grads(partials, coefficients, channel, channels, repeat, mean, inv_std):
    """Sums of the gradient, and of its product with ``x_hat`` about the exact mean."""
    plain, product = sums_of_channel(partials, channel, channels, repeat)
    left = (float(coefficients[CENTRE, channel * repeat]) - mean) * inv_std
    return plain, product + left * plain


@njit
def set_grad_coefficients(coefficients, channel, channels, repeat, mean, inv_std, means):
    """Coefficients of ``scale * grad + tilt * x_hat + level``, where ``x_hat`` is about ``centre``.

    ``means`` are the two sums, divided by the count.
    """
    plain, product = means
    for start in range(channel * repeat, coefficients.shape[1], channels * repeat):
        for k in range(start, start + repeat):
            left = (float(coefficients[CENTRE, k]) - mean) * inv_std
            scale = float(coefficients[SCALE, k])
            coefficients[TILT, k] = -scale * product
            coefficients[LEVEL, k] = -scale * (plain + left * product)
