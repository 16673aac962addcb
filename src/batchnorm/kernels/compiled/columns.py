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
from batchnorm.kernels.compiled.vectors import LANES, LINE, finish_streams, zeros

# Elements of a block, which the L2 cache holds: it is gone through twice, once for the means of its
# columns, once for the deviations from them. Also the most rows that are summed up in the precision
# of the elements.
BLOCK, ROWS = 65536, 512
# Rows at least this wide are gone down several at a time, to load coefficients less often.
FAR = 1024
# Bytes of a matrix from which on results are written past the caches.
STREAMED = 1 << 23


@njit
def collect(x, partials, work, slab):
    """Sums of one slab of rows."""
    if x.shape[1] < LANES:
        _collect(x, partials, work, slab, 1, number_like(x, 0))
    else:
        _collect(x, partials, work, slab, LANES, zeros(x))


@njit
def _collect(x, partials, work, slab, lanes, zero):
    first, last = _rows_of(slab, len(partials), x)
    width, group = x.shape[1], _group(x)
    step = min(ROWS, max(8, BLOCK // width))
    partials[slab] = 0
    for start in range(first, last, step):
        stop = min(start + step, last)
        work[0] = 0
        for row in range(start, stop, group):
            for left in range(0, width, lanes):
                k = min(left, width - lanes)
                stripes.add(x, row, min(row + group, stop), k, left - k, work, zero)
        work[0] *= number_like(x, 1 / (stop - start))
        for left in range(0, width, lanes):
            stripes.deviations(x, start, stop, min(left, width - lanes), work, zero)
        _merge(partials[slab], work, stop - start)


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
        _normalize(task, x, residual, y, mask, coefficients, slab, slabs, 1, number_like(x, 0))
    else:
        _normalize(task, x, residual, y, mask, coefficients, slab, slabs, LANES, zeros(x))


@njit
def _normalize(task, x, residual, y, mask, coefficients, slab, slabs, lanes, zero):
    first, last = _rows_of(slab, slabs, x)
    width, group = x.shape[1], _group(x)
    by_vector = _masked_by_vector(x)
    streamed = _is_streamed(x, y)
    options = task.residual != 0, task.relu != 0, task.mask != 0 and by_vector, streamed
    for row in range(first, last, group):
        for left in range(0, width, lanes):
            k, stop = min(left, width - lanes), min(row + group, last)
            stripes.normalize(x, residual, y, mask, coefficients, options, row, stop, k, zero)
    if task.mask and not by_vector:
        for row in range(first, last):
            rows.pack(y[row], mask[row])
    if streamed:
        finish_streams()


@njit
def grad_sums(task, grad, x, mask, behind_relu, partials, work, coefficients, slab):
    """Sums of the gradient behind the ReLU; a mask's gradient is written to ``behind_relu``."""
    if task.mask and not _masked_by_vector(x):
        first, last = _rows_of(slab, len(partials), x)
        for row in range(first, last):
            rows.unpack(grad[row], mask[row], behind_relu[row])
        grad = behind_relu
    arrays = grad, x, mask, behind_relu, coefficients
    if x.shape[1] < LANES:
        _grad_sums(task, arrays, partials, work, slab, 1, number_like(x, 0))
    else:
        _grad_sums(task, arrays, partials, work, slab, LANES, zeros(x))


@njit
def _grad_sums(task, arrays, partials, work, slab, lanes, zero):
    grad, x, mask, behind_relu, coefficients = arrays
    first, last = _rows_of(slab, len(partials), x)
    width, group, partial = x.shape[1], _group(x), partials[slab]
    gated, has_mask = task.relu != 0 and task.mask == 0, task.mask != 0 and _masked_by_vector(x)
    streamed = has_mask and _is_streamed(x, behind_relu)
    options = gated, has_mask, streamed
    partial[:] = 0
    for start in range(first, last, ROWS):
        stop = min(start + ROWS, last)
        work[:] = 0
        for row in range(start, stop, group):
            for left in range(0, width, lanes):
                k, end = min(left, width - lanes), min(row + group, stop)
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
        _grad_input(task, grad, x, result, coefficients, slab, slabs, LANES, zeros(x))


@njit
def _grad_input(task, grad, x, result, coefficients, slab, slabs, lanes, zero):
    first, last = _rows_of(slab, slabs, x)
    width, group = x.shape[1], _group(x)
    streamed = _is_streamed(x, result)
    options = task.fixed != 0, task.relu != 0 and task.mask == 0, streamed
    for row in range(first, last, group):
        for left in range(0, width, lanes):
            k, stop = min(left, width - lanes), min(row + group, last)
            stripes.grad_input(grad, x, result, coefficients, options, row, stop, k, zero)
    if streamed:
        finish_streams()


@njit
def _rows_of(slab, slabs, x):
    return len(x) * slab // slabs, len(x) * (slab + 1) // slabs


@njit
def _group(x):
    """How many rows are gone down at a time: one, if only that keeps memory reads in order."""
    return 1 if x.nbytes >= STREAMED and LANES < x.shape[1] < FAR else 4


@njit
def _masked_by_vector(x):
    """Whether every stripe begins at a byte of the mask."""
    return x.shape[1] >= LANES and x.shape[1] % 8 == 0


@njit
def _is_streamed(x, result):
    """Whether ``result`` is worth it and fit for it: each stripe begins at a line of the cache."""
    aligned = result.ctypes.data % LINE == 0 and result.strides[0] % LINE == 0
    return x.nbytes >= STREAMED and x.shape[1] >= LANES and aligned
