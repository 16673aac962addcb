"""A matrix whose columns belong to channels: channels last, (N, C), and planes of a few elements.

Rows are read in the order in which they lie in memory, because the hardware prefetches that order:
in stripes of `LANES` columns, then of `FEW`. The last stripe begins further left where it would
cross the right edge, so some columns may be computed twice, with the same result. A matrix narrower
than `FEW` is computed column by column.

The kernels apply slabs in reverse: the last rows are still cached.
"""

from __future__ import annotations

from batchnorm.kernels.compiled import rows, stripes
from batchnorm.kernels.compiled.channel_sums import (
    COUNT,
    LINEAR,
    SHIFT,
    SUM_GRAD,
    SUM_GRAD_X_HAT,
    ShiftedSums,
    add_moments,
)
from batchnorm.kernels.compiled.elements import number_like
from batchnorm.kernels.compiled.maps import BackwardOptions, ForwardOptions, Tensors
from batchnorm.kernels.compiled.numba_internals import jitted
from batchnorm.kernels.compiled.streaming import finish_streams, is_streamed
from batchnorm.kernels.compiled.task import share
from batchnorm.kernels.compiled.vectors import FEW, LANES, zero_vector_like

# The most rows that are summed in the dtype of the arithmetic; beyond them float32 would lose
# digits. docs/decisions/0007: sums
FLOAT32_ROWS = 128
# Rows that give a first guess of the means.
PROBE_ROWS = 8
# Rows that are summed at a time, to load and store sums less often. docs/decisions/0007: columns
UNROLL = 8


@jitted
def collect(x, partials, work, slab):
    """Collects sums of one slab of rows."""
    if x.shape[1] < FEW:
        one = number_like(x, 0)
        _collect(x, partials, work, slab, (1, 1), (one, one))
    else:
        vectors = zero_vector_like(x, LANES), zero_vector_like(x, FEW)
        _collect(x, partials, work, slab, (LANES, FEW), vectors)


@jitted
def _collect(x, partials, work, slab, lanes, vectors):
    """Accumulates deviations from provisional means.

    It repeats with the means of the rows if the two are more than a standard deviation apart.
    """
    first, last = _rows_of(slab, len(partials), x)
    partial = partials[slab]
    partial[:] = 0
    for start in range(first, last, FLOAT32_ROWS):
        stop = min(start + FLOAT32_ROWS, last)
        if start == first:
            few = min(start + PROBE_ROWS, stop)
            work[0, :] = 0
            _deviate(x, start, few, work, lanes, vectors)
            _move_centers(work, few - start)
        else:
            share = 1 / partial[COUNT, 0]
            for k in range(work.shape[1]):
                work[0, k] = partial[SHIFT, k] + partial[LINEAR, k] * share
        _deviate(x, start, stop, work, lanes, vectors)
        if _is_far_off(work, stop - start):
            _move_centers(work, stop - start)
            _deviate(x, start, stop, work, lanes, vectors)
        _merge_rows(partial, work, stop - start)


@jitted
def _deviate(x, start, stop, work, lanes, vectors):
    """Sums ``x - work[0]`` and its square over some rows, in ``work[1]`` and ``work[2]``."""
    width = work.shape[1]
    wide = _columns_of_wide(width, lanes)
    work[1:, :] = 0
    for row in range(start, stop, UNROLL):
        end = min(row + UNROLL, stop)
        for k in range(0, wide, lanes[0]):
            stripes.add_deviations(x, row, end, k, 0, work, vectors[0])
        for left in range(wide, width, lanes[1]):
            k = min(left, width - lanes[1])
            stripes.add_deviations(x, row, end, k, left - k, work, vectors[1])


@jitted
def _move_centers(work, count):
    """Moves the centers to the means of ``count`` rows whose sums are known."""
    for k in range(work.shape[1]):
        work[0, k] += work[1, k] / count


@jitted
def _is_far_off(work, count):
    """Returns whether a mean is more than a standard deviation from its center.

    The squares would cancel.
    """
    is_far = False
    for k in range(work.shape[1]):
        linear, squares = float(work[1, k]), float(work[2, k])
        is_far |= 2 * linear * linear > squares * count
    return is_far


@jitted
def _merge_rows(partial, work, count):
    """Merges the sums of ``count`` rows about their centers into those of the slab."""
    for k in range(partial.shape[1]):
        sums = ShiftedSums(float(count), float(work[0, k]), float(work[1, k]), float(work[2, k]))
        add_moments(partial, k, sums)


@jitted
def shares(task, width, thread, team):
    """Returns the channels and the columns that a thread merges.

    One thread does all if a channel has several columns.
    """
    if width == task.channels:
        channels = share(width, thread, team)
        return channels, channels
    if thread == 0:
        return (0, task.channels), (0, width)
    return (0, 0), (0, 0)


@jitted
def normalize(task, tensors, coefficients, slab):
    """Writes ``y`` of one slab."""
    x = tensors.x
    first, last = _rows_of(slab, task.slabs, x)
    if x.shape[1] < FEW:
        one = number_like(x, 0)
        _normalize(task, _without_mask(tensors), coefficients, first, last, (1, 1), (one, one))
        if task.mask:
            _store_passes(tensors.y, tensors.mask, first, last)
    else:
        vectors = zero_vector_like(x, LANES), zero_vector_like(x, FEW)
        _normalize(task, tensors, coefficients, first, last, (LANES, FEW), vectors)


@jitted
def _store_passes(y, mask, first, last):
    if mask is not None:
        for row in range(first, last):
            rows.store_passes(y[row], mask[row])


@jitted
def _without_mask(tensors):
    """Sets the mask to None; `_store_passes` and `_where_passed` handle it row by row."""
    return _with_grad(tensors, tensors.grad)


@jitted
def _with_grad(tensors, grad):
    """Replaces the gradient by one that has passed the mask, and the mask by None."""
    return Tensors(
        tensors.x, tensors.residual, tensors.y, None, grad, tensors.grad_x, tensors.grad_before_relu
    )


@jitted
def _normalize(task, tensors, coefficients, first, last, lanes, vectors):
    width = coefficients.shape[1]
    wide = _columns_of_wide(width, lanes)
    streamed = is_streamed(tensors.x, tensors.y, task.collected)
    options = ForwardOptions(task.relu != 0, task.mask != 0, streamed)
    for r in range(first, last):
        for k in range(0, wide, lanes[0]):
            stripes.normalize(tensors, coefficients, options, r, k, 0, vectors[0])
        for left in range(wide, width, lanes[1]):
            k = min(left, width - lanes[1])
            stripes.normalize(tensors, coefficients, options, r, k, left - k, vectors[1])
    if streamed:
        finish_streams()


@jitted
def grad_sums(task, tensors, partials, coefficients, work, slab):
    """Sums the gradient before the ReLU; with a mask, writes it to ``grad_before_relu``."""
    x = tensors.x
    gated = task.relu != 0 and tensors.mask is None
    if x.shape[1] >= FEW:
        vectors = zero_vector_like(x, LANES), zero_vector_like(x, FEW)
        _grad_sums(task, gated, tensors, partials, coefficients, work, slab, (LANES, FEW), vectors)
        return
    first, last = _rows_of(slab, len(partials), x)
    grad = _where_passed(tensors.grad, tensors.mask, tensors.grad_before_relu, first, last)
    one, passed = number_like(x, 0), _with_grad(tensors, grad)
    _grad_sums(task, gated, passed, partials, coefficients, work, slab, (1, 1), (one, one))


@jitted
def _where_passed(grad, mask, result, first, last):
    """Writes the gradient that passes the mask to ``result``; without a mask, it is ``grad``."""
    if mask is not None:
        for row in range(first, last):
            rows.where_passed(grad[row], mask[row], result[row])
        return result
    return grad


@jitted
def _grad_sums(task, gated, tensors, partials, coefficients, work, slab, lanes, vectors):
    x, partial = tensors.x, partials[slab]
    first, last = _rows_of(slab, len(partials), x)
    width = work.shape[1]
    wide = _columns_of_wide(width, lanes)
    streamed = tensors.mask is not None and is_streamed(x, tensors.grad_before_relu, task.collected)
    options = BackwardOptions(gated, task.fixed != 0, streamed)
    partial[:] = 0
    for start in range(first, last, FLOAT32_ROWS):
        stop = min(start + FLOAT32_ROWS, last)
        work[:] = 0
        for row in range(start, stop, UNROLL):
            end = min(row + UNROLL, stop)
            for k in range(0, wide, lanes[0]):
                stripes.add_grads(tensors, coefficients, options, row, end, k, 0, work, vectors[0])
            for left in range(wide, width, lanes[1]):
                k = min(left, width - lanes[1])
                stripes.add_grads(
                    tensors, coefficients, options, row, end, k, left - k, work, vectors[1]
                )
        for k in range(width):
            partial[SUM_GRAD, k] += work[0, k]
            partial[SUM_GRAD_X_HAT, k] += work[1, k]
    if streamed:
        finish_streams()


@jitted
def grad_input(task, tensors, coefficients, slab):
    """Writes ``grad_x`` of one slab. With a mask, `grad_sums` has written the gradient to use."""
    x = tensors.x
    passed = _with_grad(tensors, tensors.grad_before_relu if task.mask else tensors.grad)
    if x.shape[1] < FEW:
        one = number_like(x, 0)
        _grad_input(task, passed, coefficients, slab, (1, 1), (one, one))
    else:
        vectors = zero_vector_like(x, LANES), zero_vector_like(x, FEW)
        _grad_input(task, passed, coefficients, slab, (LANES, FEW), vectors)


@jitted
def _grad_input(task, tensors, coefficients, slab, lanes, vectors):
    first, last = _rows_of(slab, task.slabs, tensors.x)
    width = coefficients.shape[1]
    wide = _columns_of_wide(width, lanes)
    streamed = is_streamed(tensors.x, tensors.grad_x, task.collected)
    options = BackwardOptions(task.relu != 0 and task.mask == 0, task.fixed != 0, streamed)
    for r in range(first, last):
        for k in range(0, wide, lanes[0]):
            stripes.grad_input(tensors, coefficients, options, r, k, vectors[0])
        for left in range(wide, width, lanes[1]):
            k = min(left, width - lanes[1])
            stripes.grad_input(tensors, coefficients, options, r, k, vectors[1])
    if streamed:
        finish_streams()


@jitted
def _rows_of(slab, slabs, x):
    return len(x) * slab // slabs, len(x) * (slab + 1) // slabs


@jitted
def _columns_of_wide(width, lanes):
    """Returns how many columns stripes of the wider kind cover."""
    return width - width % lanes[0]
