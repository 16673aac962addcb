"""A stripe of columns: sums stay in registers down some rows, results are written row by row.

``k`` is the first column of the stripe; ``zero`` says how wide it is, see
`batchnorm.kernels.compiled.vectors`. Sums are added to the rows of ``work``, but not in the first
``skip`` columns, which belong to the stripe before.
"""

from __future__ import annotations

from numba import njit

from batchnorm.kernels.compiled import maps
from batchnorm.kernels.compiled.statistics import CENTRE, INV_STD, LEVEL, OFFSET, SCALE, TILT
from batchnorm.kernels.compiled.vectors import load, prefetch, store

# How many rows ahead to prefetch.
AHEAD = 2


@njit(forceinline=True)
def add_deviations(x, first, last, k, skip, work, zero):
    """Adds ``x - centre`` to ``work[1]`` and its square to ``work[2]``; ``work[0]`` is centre."""
    centre = load(work, 0, k, zero)
    sums = load(work, 1, k, zero), load(work, 2, k, zero)
    for r in range(first, last):
        prefetch(x, r + last - first, k, zero)
        sums = maps.add_deviation(x, r, k, skip, centre, sums, zero)
    store(work, 1, k, sums[0])
    store(work, 2, k, sums[1])


@njit(forceinline=True)
def normalize(x, residual, y, mask, coefficients, options, r, k, skip, zero):
    """`maps.normalize` in one row."""
    numbers = (
        load(coefficients, CENTRE, k, zero),
        load(coefficients, SCALE, k, zero),
        load(coefficients, OFFSET, k, zero),
    )
    if options[2]:
        prefetch(x, r + AHEAD, k, zero)
    maps.normalize(x, residual, y, mask, options, r, k, skip, numbers, zero)


@njit(forceinline=True)
def add_grads(grad, x, mask, behind_relu, coefficients, options, first, last, k, skip, work, zero):
    """`maps.add_grads` down some rows, to ``work[0]`` and ``work[1]``."""
    numbers = (
        load(coefficients, CENTRE, k, zero),
        load(coefficients, INV_STD, k, zero),
        load(coefficients, SCALE, k, zero),
        load(coefficients, OFFSET, k, zero),
    )
    sums = load(work, 0, k, zero), load(work, 1, k, zero)
    for r in range(first, last):
        prefetch(grad, r + last - first, k, zero)
        prefetch(x, r + last - first, k, zero)
        sums = maps.add_grads(grad, x, mask, behind_relu, options, r, k, skip, numbers, sums, zero)
    store(work, 0, k, sums[0])
    store(work, 1, k, sums[1])


@njit(forceinline=True)
def grad_input(grad, x, result, coefficients, options, r, k, zero):
    """`maps.grad_input` in one row."""
    numbers = (
        load(coefficients, CENTRE, k, zero),
        load(coefficients, INV_STD, k, zero),
        load(coefficients, SCALE, k, zero),
        load(coefficients, OFFSET, k, zero),
        load(coefficients, TILT, k, zero),
        load(coefficients, LEVEL, k, zero),
    )
    if options[2]:
        prefetch(x, r + AHEAD, k, zero)
        prefetch(grad, r + AHEAD, k, zero)
    maps.grad_input(grad, x, None, result, options, r, k, numbers, zero)
