"""A stripe of columns: sums stay in registers down some rows, results are written row by row.

``k`` is the first column of the stripe; ``zero`` says how wide it is, see
`batchnorm.kernels.compiled.vectors`. Sums are added to the rows of ``work``, but not in the first
``skip`` columns, which belong to the stripe before.
"""

from __future__ import annotations

from batchnorm.kernels.compiled import maps
from batchnorm.kernels.compiled.coefficients import of_columns
from batchnorm.kernels.compiled.numba_internals import inlined
from batchnorm.kernels.compiled.streaming import prefetch
from batchnorm.kernels.compiled.vectors import load, store

# How many rows ahead streamed passes prefetch; others do not. docs/decisions/0007: prefetching
AHEAD = 2


@inlined
def add_deviations(x, first, last, k, skip, work, zero):
    """Adds ``x - center`` to ``work[1]`` and its square to ``work[2]``; ``work[0]`` is center."""
    center = load(work, 0, k, zero)
    sums = load(work, 1, k, zero), load(work, 2, k, zero)
    for r in range(first, last):
        prefetch(x, r + last - first, k, zero)
        sums = maps.add_deviation(x, r, k, skip, center, sums, zero)
    store(work, 1, k, sums[0])
    store(work, 2, k, sums[1])


@inlined
def normalize(tensors, coefficients, options, r, k, skip, zero):
    """Applies `maps.normalize` in one row."""
    if options.streamed:
        prefetch(tensors.x, r + AHEAD, k, zero)
    maps.normalize(tensors, options, r, k, skip, of_columns(coefficients, k, zero), zero)


@inlined
def add_grads(tensors, coefficients, options, first, last, k, skip, work, zero):
    """Adds `maps.add_grads` of some rows to ``work[0]`` and ``work[1]``."""
    of_stripe = of_columns(coefficients, k, zero)
    sums = load(work, 0, k, zero), load(work, 1, k, zero)
    for r in range(first, last):
        prefetch(tensors.grad, r + last - first, k, zero)
        prefetch(tensors.x, r + last - first, k, zero)
        sums = maps.add_grads(tensors, options, r, k, skip, of_stripe, sums, zero)
    store(work, 0, k, sums[0])
    store(work, 1, k, sums[1])


@inlined
def grad_input(tensors, coefficients, options, r, k, zero):
    """Applies `maps.grad_input` in one row."""
    if options.streamed:
        prefetch(tensors.x, r + AHEAD, k, zero)
        prefetch(tensors.grad, r + AHEAD, k, zero)
    maps.grad_input(tensors, options, r, k, of_columns(coefficients, k, zero), zero)
