"""A stripe of columns, gone down some rows: sums and coefficients stay in registers.

``k`` is the first column of the stripe; ``zero`` says how wide it is, see
`batchnorm.kernels.compiled.vectors`. Sums are added to the rows of ``work``, but not in the first
``skip`` columns, which belong to the stripe before.

No product is fused with a sum in `_affine`: `normalize` and `_gradient` must compute the same ``y``
to the last bit, or the gradient of ReLU would pass where the output was cut.
"""

from __future__ import annotations

from numba import njit

from batchnorm.kernels.compiled.gates import (
    beyond,
    store_passes,
    where_passed,
    where_positive,
)
from batchnorm.kernels.compiled.statistics import CENTRE, INV_STD, LEVEL, OFFSET, SCALE, TILT
from batchnorm.kernels.compiled.vectors import fused, load, rounded, store


@njit(forceinline=True)
def add(x, first, last, k, skip, work, zero):
    """Adds rows to the totals of their columns, ``work[0]``."""
    total = load(work, 0, k, zero)
    for r in range(first, last):
        total = total + beyond(skip, load(x, r, k, zero), zero)
    store(work, 0, k, total)


@njit(forceinline=True)
def deviations(x, first, last, k, work, zero):
    """``work[1:] = `` sums of ``x - centre`` and of its square, where ``centre`` is ``work[0]``."""
    centre = load(work, 0, k, zero)
    linear, squares = zero, zero
    for r in range(first, last):
        d = load(x, r, k, zero) - centre
        linear = linear + d
        squares = fused(d, d, squares)
    store(work, 1, k, linear)
    store(work, 2, k, squares)


@njit(forceinline=True)
def _affine(element, centre, scale, offset):
    return (element - centre) * scale + offset


@njit(forceinline=True)
def normalize(x, residual, y, mask, coefficients, options, first, last, k, zero):
    """``y = (x - centre) * scale + offset + residual``, then ReLU, which lets NaN through."""
    has_residual, relu, has_mask, streamed = options
    centre = load(coefficients, CENTRE, k, zero)
    scale, offset = load(coefficients, SCALE, k, zero), load(coefficients, OFFSET, k, zero)
    for r in range(first, last):
        value = _affine(load(x, r, k, zero), centre, scale, offset)
        if has_residual:
            value = value + load(residual, r, k, zero)
        if relu:
            value = where_positive(value, value, zero)
        store(y, r, k, value, streamed)
        if has_mask:
            store_passes(mask, r, k, rounded(value, y), zero)


@njit(forceinline=True)
def _gradient(gated, g, element, like, centre, scale, offset, zero):
    """The gradient behind the ReLU, whose decision is found again from ``element`` if ``gated``."""
    if gated:
        y = rounded(_affine(element, centre, scale, offset), like)
        return where_positive(y, g, zero)
    return g


@njit(forceinline=True)
def add_grads(grad, x, mask, behind_relu, coefficients, options, first, last, k, skip, work, zero):
    """Adds the gradient to ``work[0]`` and its product with ``x_hat`` to ``work[1]``.

    With a mask, the gradient behind the ReLU is written to ``behind_relu``.
    """
    gated, has_mask, streamed = options
    centre, inv_std = load(coefficients, CENTRE, k, zero), load(coefficients, INV_STD, k, zero)
    scale, offset = load(coefficients, SCALE, k, zero), load(coefficients, OFFSET, k, zero)
    plain, product = load(work, 0, k, zero), load(work, 1, k, zero)
    for r in range(first, last):
        g, element = load(grad, r, k, zero), load(x, r, k, zero)
        if has_mask:
            g = where_passed(mask, r, k, g, zero)
            store(behind_relu, r, k, g, streamed)
        g = _gradient(gated, g, element, x, centre, scale, offset, zero)
        plain = plain + beyond(skip, g, zero)
        product = product + beyond(skip, g * ((element - centre) * inv_std), zero)
    store(work, 0, k, plain)
    store(work, 1, k, product)


@njit(forceinline=True)
def grad_input(grad, x, result, coefficients, options, first, last, k, zero):
    """``result = scale * grad + tilt * x_hat + level``, or just ``scale * grad`` if ``fixed``.

    ``options`` are whether statistics are fixed, the gradient is gated, the result streamed.
    """
    fixed, gated, streamed = options
    centre, inv_std = load(coefficients, CENTRE, k, zero), load(coefficients, INV_STD, k, zero)
    scale, offset = load(coefficients, SCALE, k, zero), load(coefficients, OFFSET, k, zero)
    tilt, level = load(coefficients, TILT, k, zero), load(coefficients, LEVEL, k, zero)
    for r in range(first, last):
        element = load(x, r, k, zero)
        g = load(grad, r, k, zero)
        value = scale * _gradient(gated, g, element, x, centre, scale, offset, zero)
        if not fixed:
            value = fused((element - centre) * inv_std, tilt, value) + level
        store(result, r, k, value, streamed)
