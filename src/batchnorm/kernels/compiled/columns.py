"""A matrix whose columns belong to channels: channels last, (N, C), and planes of a few elements.

Rows are gone through in the order in which they lie in memory, a few at a time, stripe by stripe:
that is what the hardware prefetches. The last stripe begins further left where it would stand out
on the right, so some columns may be done twice, with the same result.

Slabs are applied in reverse by the kernels: the last rows are still cached.
"""

from __future__ import annotations

from numba import njit

from batchnorm.kernels.compiled import rows, stripes
from batchnorm.kernels.compiled.elements import number_like
from batchnorm.kernels.compiled.statistics import (
    COUNT,
    LINEAR,
    PLAIN,
    PRODUCT,
    SHIFT,
    SQUARES,
)
from batchnorm.kernels.compiled.vectors import LANES, finish_streams, is_streamed, zeros

# The most rows that are summed up in the precision of the elements.
ROWS = 128
# Rows that give a first idea of the means.
FIRST = 8
# Rows that are gone down at a time, to load coefficients less often.
GROUP = 8


@njit
def collect(x, partials, work, slab):
    """Sums of one slab of rows."""
    if x.shape[1] < LANES:
        _collect(x, partials, work, slab, 1, number_like(x, 0))
    else:
        _collect(x, partials, work, slab, LANES, zeros(x, LANES))


@njit
def _collect(x, partials, work, slab, lanes, zero):
    """Sums about a first idea of the means; about the means themselves if that lies far off."""
    first, last = _rows_of(slab, len(partials), x)
    partial = partials[slab]
    partial[:] = 0
    for start in range(first, last, ROWS):
        stop = min(start + ROWS, last)
        if start == first:
            few = min(start + FIRST, stop)
            work[0, :] = 0
            _deviate(x, start, few, work, lanes, zero)
            _move_centres(work, few - start)
        else:
            share = 1 / partial[COUNT, 0]
            for k in range(x.shape[1]):
                work[0, k] = partial[SHIFT, k] + partial[LINEAR, k] * share
        _deviate(x, start, stop, work, lanes, zero)
        if _is_far_off(x, work, stop - start):
            _move_centres(work, stop - start)
            _deviate(x, start, stop, work, lanes, zero)
        _merge(partial, work, stop - start)


@njit
def _deviate(x, start, stop, work, lanes, zero):
    """``work[1:] = `` sums of ``x - work[0]`` and of its square over some rows."""
    width = x.shape[1]
    work[1:, :] = 0
    for row in range(start, stop, GROUP):
        end = min(row + GROUP, stop)
        for left in range(0, width, lanes):
            k = min(left, width - lanes)
            stripes.add_deviations(x, row, end, k, left - k, work, zero)


@njit
def _move_centres(work, count):
    """Moves the centres to the means of ``count`` rows whose sums are known."""
    for k in range(work.shape[1]):
        work[0, k] += work[1, k] / count


@njit
def _is_far_off(x, work, count):
    """Whether a mean lies more than a standard deviation off its centre: squares would cancel."""
    for k in range(x.shape[1]):
        linear, squares = float(work[1, k]), float(work[2, k])
        if 2 * linear * linear > squares * count:
            return True
    return False


@njit
def _merge(partial, work, count):
    """Merges the sums of ``count`` rows about their centres into those of the slab."""
    share, begun = 1 / count, partial[COUNT, 0] > 0
    for k in range(partial.shape[1]):
        linear, squares = float(work[1, k]), float(work[2, k])
        mean = float(work[0, k]) + linear * share
        if not begun:
            partial[SHIFT, k] = mean
        delta = mean - partial[SHIFT, k]
        partial[COUNT, k] += count
        partial[LINEAR, k] += count * delta
        partial[SQUARES, k] += squares - linear * linear * share + count * delta * delta


@njit
def gather_moments(partials):
    """Merges the sums of all slabs into those of the first, for all columns at once."""
    whole = partials[0]
    for slab in range(1, len(partials)):
        partial = partials[slab]
        for k in range(partials.shape[2]):
            count, linear = partial[COUNT, k], partial[LINEAR, k]
            delta = partial[SHIFT, k] - whole[SHIFT, k]
            whole[COUNT, k] += count
            whole[LINEAR, k] += linear + count * delta
            whole[SQUARES, k] += partial[SQUARES, k] + delta * (2 * linear + count * delta)


@njit
def normalize(task, x, residual, y, mask, coefficients, slab, slabs):
    """``y`` of one slab."""
    if x.shape[1] < LANES:
        one = number_like(x, 0)
        _go_down(task, x, residual, y, None, coefficients, slab, slabs, 1, one)
    elif _masked_by_vector(x):
        _go_down(task, x, residual, y, mask, coefficients, slab, slabs, LANES, zeros(x, LANES))
    else:
        _go_down(task, x, residual, y, None, coefficients, slab, slabs, LANES, zeros(x, LANES))
    if mask is not None and task.mask and not _masked_by_vector(x):
        first, last = _rows_of(slab, slabs, x)
        for row in range(first, last):
            rows.pack(y[row], mask[row])


@njit
def _go_down(task, x, residual, y, mask, coefficients, slab, slabs, lanes, zero):
    first, last = _rows_of(slab, slabs, x)
    width = x.shape[1]
    streamed = is_streamed(x, y, task.collected)
    options = task.relu != 0, task.mask != 0, streamed
    for row in range(first, last, GROUP):
        for left in range(0, width, lanes):
            k, stop = min(left, width - lanes), min(row + GROUP, last)
            stripes.normalize(x, residual, y, mask, coefficients, options, row, stop, k, zero)
    if streamed:
        finish_streams()


@njit
def grad_sums(task, grad, x, mask, behind_relu, partials, work, coefficients, slab):
    """Sums of the gradient behind the ReLU; a mask's gradient is written to ``behind_relu``."""
    if mask is None:
        gated = task.relu != 0
        _sum_unmasked(task, gated, grad, x, behind_relu, coefficients, partials, work, slab)
    elif _masked_by_vector(x):
        arrays = grad, x, mask, behind_relu
        zero = zeros(x, LANES)
        _grad_sums(task, False, *arrays, coefficients, partials, work, slab, LANES, zero)
    else:
        first, last = _rows_of(slab, len(partials), x)
        for row in range(first, last):
            rows.unpack(grad[row], mask[row], behind_relu[row])
        unpacked = behind_relu
        _sum_unmasked(task, False, unpacked, x, behind_relu, coefficients, partials, work, slab)


@njit
def _sum_unmasked(task, gated, grad, x, behind_relu, coefficients, partials, work, slab):
    sums = coefficients, partials, work, slab
    if x.shape[1] < LANES:
        _grad_sums(task, gated, grad, x, None, behind_relu, *sums, 1, number_like(x, 0))
    else:
        _grad_sums(task, gated, grad, x, None, behind_relu, *sums, LANES, zeros(x, LANES))


@njit
def _grad_sums(
    task, gated, grad, x, mask, behind_relu, coefficients, partials, work, slab, lanes, zero
):
    first, last = _rows_of(slab, len(partials), x)
    width, partial = x.shape[1], partials[slab]
    streamed = mask is not None and is_streamed(x, behind_relu, task.collected)
    options = gated, streamed
    partial[:] = 0
    for start in range(first, last, ROWS):
        stop = min(start + ROWS, last)
        work[:] = 0
        for row in range(start, stop, GROUP):
            for left in range(0, width, lanes):
                k, end = min(left, width - lanes), min(row + GROUP, stop)
                stripes.add_grads(
                    grad, x, mask, behind_relu, coefficients, options,
                    row, end, k, left - k, work, zero,
                )  # fmt: skip
        for k in range(width):
            partial[PLAIN, k] += work[0, k]
            partial[PRODUCT, k] += work[1, k]
    if streamed:
        finish_streams()


@njit
def gather_grads(partials):
    """Adds the sums of all slabs to those of the first."""
    for slab in range(1, len(partials)):
        for k in range(partials.shape[2]):
            partials[0, PLAIN, k] += partials[slab, PLAIN, k]
            partials[0, PRODUCT, k] += partials[slab, PRODUCT, k]


@njit
def grad_input(task, grad, x, result, coefficients, slab, slabs):
    """Gradient of the input. With a mask, ``grad`` lies behind the ReLU already."""
    if x.shape[1] < LANES:
        _grad_input(task, grad, x, result, coefficients, slab, slabs, 1, number_like(x, 0))
    else:
        _grad_input(task, grad, x, result, coefficients, slab, slabs, LANES, zeros(x, LANES))


@njit
def _grad_input(task, grad, x, result, coefficients, slab, slabs, lanes, zero):
    first, last = _rows_of(slab, slabs, x)
    width = x.shape[1]
    streamed = is_streamed(x, result, task.collected)
    options = task.fixed != 0, task.relu != 0 and task.mask == 0, streamed
    for row in range(first, last, GROUP):
        for left in range(0, width, lanes):
            k, stop = min(left, width - lanes), min(row + GROUP, last)
            stripes.grad_input(grad, x, result, coefficients, options, row, stop, k, zero)
    if streamed:
        finish_streams()


@njit
def _rows_of(slab, slabs, x):
    return len(x) * slab // slabs, len(x) * (slab + 1) // slabs


@njit
def _masked_by_vector(x):
    """Whether every stripe begins at a byte of the mask."""
    return x.shape[1] >= LANES and x.shape[1] % 8 == 0
