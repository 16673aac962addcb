"""A matrix whose columns belong to channels: channels last, (N, C), and planes of a few elements.

Rows are gone through in the order in which they lie in memory, because that is what the hardware
prefetches: stripes of `LANES` columns, then of `FEW`. The last stripe begins further left where it
would stand out on the right, so some columns may be done twice, with the same result. A matrix
narrower than `FEW` is gone through column by column.

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
from batchnorm.kernels.compiled.task import share
from batchnorm.kernels.compiled.vectors import FEW, LANES, finish_streams, is_streamed, zeros

# The most rows that are summed up in the precision of the elements.
ROWS = 128
# Rows that give a first idea of the means.
FIRST = 8
# Rows that are summed up at a time, to load and store sums less often.
GROUP = 8


@njit
def collect(x, partials, work, slab):
    """Sums of one slab of rows."""
    if x.shape[1] < FEW:
        one = number_like(x, 0)
        _collect(x, partials, work, slab, (1, 1), (one, one))
    else:
        _collect(x, partials, work, slab, (LANES, FEW), (zeros(x, LANES), zeros(x, FEW)))


@njit
def _collect(x, partials, work, slab, lanes, vectors):
    """Sums about a first idea of the means; about the means themselves if that lies far off."""
    first, last = _rows_of(slab, len(partials), x)
    partial = partials[slab]
    partial[:] = 0
    for start in range(first, last, ROWS):
        stop = min(start + ROWS, last)
        if start == first:
            few = min(start + FIRST, stop)
            work[0, :] = 0
            _deviate(x, start, few, work, lanes, vectors)
            _move_centres(work, few - start)
        else:
            share = 1 / partial[COUNT, 0]
            for k in range(x.shape[1]):
                work[0, k] = partial[SHIFT, k] + partial[LINEAR, k] * share
        _deviate(x, start, stop, work, lanes, vectors)
        if _is_far_off(x, work, stop - start):
            _move_centres(work, stop - start)
            _deviate(x, start, stop, work, lanes, vectors)
        _merge(partial, work, stop - start)


@njit
def _deviate(x, start, stop, work, lanes, vectors):
    """``work[1:] = `` sums of ``x - work[0]`` and of its square over some rows."""
    width = x.shape[1]
    wide = _columns_of_wide(width, lanes)
    work[1:, :] = 0
    for row in range(start, stop, GROUP):
        end = min(row + GROUP, stop)
        for k in range(0, wide, lanes[0]):
            stripes.add_deviations(x, row, end, k, 0, work, vectors[0])
        for left in range(wide, width, lanes[1]):
            k = min(left, width - lanes[1])
            stripes.add_deviations(x, row, end, k, left - k, work, vectors[1])


@njit
def _move_centres(work, count):
    """Moves the centres to the means of ``count`` rows whose sums are known."""
    for k in range(work.shape[1]):
        work[0, k] += work[1, k] / count


@njit
def _is_far_off(x, work, count):
    """Whether a mean lies more than a standard deviation off its centre: squares would cancel."""
    is_far = False
    for k in range(x.shape[1]):
        linear, squares = float(work[1, k]), float(work[2, k])
        is_far |= 2 * linear * linear > squares * count
    return is_far


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
def shares(task, width, thread, team):
    """What a thread merges: its channels, and its columns.

    One thread does all if a channel has several columns.
    """
    if width == task.channels:
        channels = share(width, thread, team)
        return channels, channels
    if thread == 0:
        return (0, task.channels), (0, width)
    return (0, 0), (0, 0)


@njit
def gather_moments(partials, first, last):
    """Merges the sums of all slabs into those of the first, for some columns."""
    whole = partials[0]
    for slab in range(1, len(partials)):
        partial = partials[slab]
        for k in range(first, last):
            count, linear = partial[COUNT, k], partial[LINEAR, k]
            delta = partial[SHIFT, k] - whole[SHIFT, k]
            whole[COUNT, k] += count
            whole[LINEAR, k] += linear + count * delta
            whole[SQUARES, k] += partial[SQUARES, k] + delta * (2 * linear + count * delta)


@njit
def normalize(task, x, residual, y, mask, coefficients, slab, slabs):
    """``y`` of one slab."""
    first, last = _rows_of(slab, slabs, x)
    arrays = first, last, x, residual, y
    if x.shape[1] < FEW:
        one = number_like(x, 0)
        _normalize(task, *arrays, None, coefficients, (1, 1), (one, one))
        if mask is not None and task.mask:
            for row in range(first, last):
                rows.pack(y[row], mask[row])
    else:
        vectors = zeros(x, LANES), zeros(x, FEW)
        _normalize(task, *arrays, mask, coefficients, (LANES, FEW), vectors)


@njit
def _normalize(task, first, last, x, residual, y, mask, coefficients, lanes, vectors):
    width = x.shape[1]
    wide, streamed = _columns_of_wide(width, lanes), is_streamed(x, y, task.collected)
    options = task.relu != 0, task.mask != 0, streamed
    for r in range(first, last):
        for k in range(0, wide, lanes[0]):
            stripes.normalize(x, residual, y, mask, coefficients, options, r, k, 0, vectors[0])
        for left in range(wide, width, lanes[1]):
            k = min(left, width - lanes[1])
            skip = left - k
            stripes.normalize(x, residual, y, mask, coefficients, options, r, k, skip, vectors[1])
    if streamed:
        finish_streams()


@njit
def grad_sums(task, grad, x, mask, behind_relu, partials, work, coefficients, slab):
    """Sums of the gradient behind the ReLU; a mask's gradient is written to ``behind_relu``."""
    gated = task.relu != 0 and mask is None
    sums = coefficients, partials, work, slab
    if x.shape[1] >= FEW:
        lanes, vectors = (LANES, FEW), (zeros(x, LANES), zeros(x, FEW))
        _grad_sums(task, gated, grad, x, mask, behind_relu, *sums, lanes, vectors)
        return
    if mask is not None:
        first, last = _rows_of(slab, len(partials), x)
        for row in range(first, last):
            rows.unpack(grad[row], mask[row], behind_relu[row])
        grad = behind_relu
    one = number_like(x, 0)
    _grad_sums(task, gated, grad, x, None, behind_relu, *sums, (1, 1), (one, one))


@njit
def _grad_sums(
    task, gated, grad, x, mask, behind_relu, coefficients, partials, work, slab, lanes, vectors
):
    first, last = _rows_of(slab, len(partials), x)
    width, partial = x.shape[1], partials[slab]
    wide = _columns_of_wide(width, lanes)
    streamed = mask is not None and is_streamed(x, behind_relu, task.collected)
    options = gated, streamed
    partial[:] = 0
    for start in range(first, last, ROWS):
        stop = min(start + ROWS, last)
        work[:] = 0
        for row in range(start, stop, GROUP):
            end = min(row + GROUP, stop)
            for k in range(0, wide, lanes[0]):
                stripes.add_grads(
                    grad, x, mask, behind_relu, coefficients, options,
                    row, end, k, 0, work, vectors[0],
                )  # fmt: skip
            for left in range(wide, width, lanes[1]):
                k = min(left, width - lanes[1])
                stripes.add_grads(
                    grad, x, mask, behind_relu, coefficients, options,
                    row, end, k, left - k, work, vectors[1],
                )  # fmt: skip
        for k in range(width):
            partial[PLAIN, k] += work[0, k]
            partial[PRODUCT, k] += work[1, k]
    if streamed:
        finish_streams()


@njit
def gather_grads(partials, first, last):
    """Adds the sums of all slabs to those of the first, for some columns."""
    for slab in range(1, len(partials)):
        for k in range(first, last):
            partials[0, PLAIN, k] += partials[slab, PLAIN, k]
            partials[0, PRODUCT, k] += partials[slab, PRODUCT, k]


@njit
def grad_input(task, grad, x, result, coefficients, slab, slabs):
    """Gradient of the input. With a mask, ``grad`` lies behind the ReLU already."""
    arrays = grad, x, result, coefficients, slab, slabs
    if x.shape[1] < FEW:
        one = number_like(x, 0)
        _grad_input(task, *arrays, (1, 1), (one, one))
    else:
        _grad_input(task, *arrays, (LANES, FEW), (zeros(x, LANES), zeros(x, FEW)))


@njit
def _grad_input(task, grad, x, result, coefficients, slab, slabs, lanes, vectors):
    first, last = _rows_of(slab, slabs, x)
    width = x.shape[1]
    wide, streamed = _columns_of_wide(width, lanes), is_streamed(x, result, task.collected)
    options = task.fixed != 0, task.relu != 0 and task.mask == 0, streamed
    for r in range(first, last):
        for k in range(0, wide, lanes[0]):
            stripes.grad_input(grad, x, result, coefficients, options, r, k, vectors[0])
        for left in range(wide, width, lanes[1]):
            k = min(left, width - lanes[1])
            stripes.grad_input(grad, x, result, coefficients, options, r, k, vectors[1])
    if streamed:
        finish_streams()


@njit
def _rows_of(slab, slabs, x):
    return len(x) * slab // slabs, len(x) * (slab + 1) // slabs


@njit
def _columns_of_wide(width, lanes):
    """How many columns stripes of the wider kind cover."""
    return width - width % lanes[0]
