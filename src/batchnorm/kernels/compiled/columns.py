"""A matrix whose columns belong to channels: channels last, (N, C), and planes of a few elements.

Rows are read in the order in which they lie in memory, because the hardware prefetches that order:
in stripes of `LANES` columns, then of `FEW`. The last stripe begins further left where it would
cross the right edge, so some columns may be computed twice, with the same result. A matrix narrower
than `FEW` is computed column by column.

The kernels apply slabs in reverse: the last rows are still cached.

A matrix of few rows and many columns is cut into *tiles*, each some neighboring channels. A thread
does all steps for one tile after the other, while its caches hold the tile's rows, sums and
coefficients. Sums and coefficients of a tile begin at column 0 of their arrays.
"""

from __future__ import annotations

from batchnorm.kernels.compiled import rows, stripes
from batchnorm.kernels.compiled.channel_sums import (
    ShiftedSums,
    add_grads,
    merged,
    set_moments,
    sums_of_columns,
)
from batchnorm.kernels.compiled.channels import count_larger, load_few, store_few
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
# Sums of some rows: their centers, and two sums.
WORK_ROWS = 3


@jitted
def collect(x, begin, partials, work, slab):
    """Collects sums of one slab of rows, in the tile that begins at column ``begin``."""
    if x.shape[1] < FEW:
        one = number_like(x, 0)
        _collect(x, begin, partials, work, slab, (1, 1), (one, one))
    else:
        vectors = zero_vector_like(x, LANES), zero_vector_like(x, FEW)
        _collect(x, begin, partials, work, slab, (LANES, FEW), vectors)


@jitted
def _collect(x, begin, partials, work, slab, lanes, vectors):
    """Accumulates deviations from provisional means.

    It repeats with the means of the rows if the two are more than a standard deviation apart.
    """
    first, last = _rows_of(slab, len(partials), x)
    partial, zero = partials[slab], zero_vector_like(partials, FEW)
    for start in range(first, last, FLOAT32_ROWS):
        stop = min(start + FLOAT32_ROWS, last)
        if start == first:
            few = min(start + PROBE_ROWS, stop)
            work[0, :] = 0
            _deviate(x, begin, start, few, work, lanes, vectors)
            _move_centers(work, few - start, zero)
        else:
            _center_on_means(partial, work, zero)
        _deviate(x, begin, start, stop, work, lanes, vectors)
        if _is_far_off(work, stop - start, zero):
            _move_centers(work, stop - start, zero)
            _deviate(x, begin, start, stop, work, lanes, vectors)
        _merge_rows(partial, work, stop - start, start == first, zero)


@jitted
def _deviate(x, begin, start, stop, work, lanes, vectors):
    """Sums ``x - work[0]`` and its square over some rows, in ``work[1]`` and ``work[2]``."""
    width = work.shape[1]
    wide = _columns_of_wide(width, lanes)
    work[1:, :] = 0
    for row in range(start, stop, UNROLL):
        end = min(row + UNROLL, stop)
        for k in range(0, wide, lanes[0]):
            stripes.add_deviations(x, begin, row, end, k, 0, work, vectors[0])
        for left in range(wide, width, lanes[1]):
            k = min(left, width - lanes[1])
            stripes.add_deviations(x, begin, row, end, k, left - k, work, vectors[1])


@jitted
def _move_centers(work, count, zero):
    """Moves the centers to the means of ``count`` rows whose sums are known."""
    width, rows = work.shape[1], float(count)
    for k in range(0, width, FEW):
        few = min(FEW, width - k)
        rest = load_few(work, 1, k, few, zero) / rows
        store_few(work, 0, k, few, load_few(work, 0, k, few, zero) + rest)


@jitted
def _center_on_means(partial, work, zero):
    """Sets the centers to the means of the rows that have been merged."""
    width = work.shape[1]
    for k in range(0, width, FEW):
        few = min(FEW, width - k)
        sums = sums_of_columns(partial, k, few, zero)
        store_few(work, 0, k, few, sums.shift + sums.linear / sums.count)


@jitted
def _is_far_off(work, count, zero):
    """Returns whether a mean is more than a standard deviation from its center.

    The squares would cancel.
    """
    far, width, rows = 0, work.shape[1], float(count)
    for k in range(0, width, FEW):
        few = min(FEW, width - k)
        linear, squares = load_few(work, 1, k, few, zero), load_few(work, 2, k, few, zero)
        far += count_larger(2.0 * linear * linear, rows * squares, few)
    return far > 0


@jitted
def _merge_rows(partial, work, count, is_first, zero):
    """Merges the sums of ``count`` rows about their centers into those of the slab."""
    width = work.shape[1]
    for k in range(0, width, FEW):
        few = min(FEW, width - k)
        center, linear = load_few(work, 0, k, few, zero), load_few(work, 1, k, few, zero)
        squares = load_few(work, 2, k, few, zero)
        sums = ShiftedSums(zero + float(count), center, linear, squares)
        if not is_first:
            sums = merged(sums_of_columns(partial, k, few, zero), sums)
        set_moments(partial, k, few, sums)


@jitted
def tiles_of(task, thread, team):
    """Returns a thread's tiles; the only tile of a matrix belongs to all threads."""
    return (0, 1) if task.tiles == 1 else share(task.tiles, thread, team)


@jitted
def channels_of(task, tile):
    """Returns the first and last channel of a tile, whose columns begin at a cache line."""
    whole = task.channels // LANES
    first = whole * tile // task.tiles * LANES
    last = whole * (tile + 1) // task.tiles * LANES
    return first, last if tile + 1 < task.tiles else task.channels


@jitted
def shares(task, width, thread, team):
    """Returns the slabs that a thread collects and applies, and the columns that it merges.

    All of them if the threads share tiles. One thread merges all columns if a channel has several.
    """
    if task.tiles > 1:
        return (0, task.slabs), (0, width)
    slabs = share(task.slabs, thread, team)
    if width == task.channels:
        return slabs, share(width, thread, team)
    return slabs, (0, width if thread == 0 else 0)


@jitted
def channels_in(task, origin, columns):
    """Returns the channels of some columns of the tile that begins at channel ``origin``."""
    per_channel = task.fold * task.repeat
    return origin + columns[0] // per_channel, origin + columns[1] // per_channel


@jitted
def normalize(task, tensors, begin, coefficients, slab):
    """Writes ``y`` of one slab, in the tile that begins at column ``begin``."""
    x = tensors.x
    first, last = _rows_of(slab, task.slabs, x)
    if x.shape[1] < FEW:
        one = number_like(x, 0)
        passed = _without_mask(tensors)
        _normalize(task, passed, begin, coefficients, first, last, (1, 1), (one, one))
        if task.mask:
            _store_passes(tensors.y, tensors.mask, first, last)
    else:
        vectors = zero_vector_like(x, LANES), zero_vector_like(x, FEW)
        _normalize(task, tensors, begin, coefficients, first, last, (LANES, FEW), vectors)


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
def _normalize(task, tensors, begin, coefficients, first, last, lanes, vectors):
    width = coefficients.shape[1]
    wide = _columns_of_wide(width, lanes)
    streamed = is_streamed(tensors.x, tensors.y, task.collected)
    options = ForwardOptions(task.relu != 0, task.mask != 0, streamed)
    for r in range(first, last):
        for k in range(0, wide, lanes[0]):
            stripes.normalize(tensors, begin, coefficients, options, r, k, 0, vectors[0])
        for left in range(wide, width, lanes[1]):
            k = min(left, width - lanes[1])
            stripes.normalize(tensors, begin, coefficients, options, r, k, left - k, vectors[1])
    if streamed:
        finish_streams()


@jitted
def grad_sums(task, tensors, begin, partials, coefficients, work, slab):
    """Sums the gradient before the ReLU; with a mask, writes it to ``grad_before_relu``."""
    x = tensors.x
    gated = task.relu != 0 and tensors.mask is None
    if x.shape[1] >= FEW:
        vectors = zero_vector_like(x, LANES), zero_vector_like(x, FEW)
        _grad_sums(
            task, gated, tensors, begin, partials, coefficients, work, slab, (LANES, FEW), vectors
        )
        return
    first, last = _rows_of(slab, len(partials), x)
    grad = _where_passed(tensors.grad, tensors.mask, tensors.grad_before_relu, first, last)
    one, passed = number_like(x, 0), _with_grad(tensors, grad)
    _grad_sums(task, gated, passed, begin, partials, coefficients, work, slab, (1, 1), (one, one))


@jitted
def _where_passed(grad, mask, result, first, last):
    """Writes the gradient that passes the mask to ``result``; without a mask, it is ``grad``."""
    if mask is not None:
        for row in range(first, last):
            rows.where_passed(grad[row], mask[row], result[row])
        return result
    return grad


@jitted
def _grad_sums(task, gated, tensors, begin, partials, coefficients, work, slab, lanes, vectors):
    x, partial = tensors.x, partials[slab]
    first, last = _rows_of(slab, len(partials), x)
    width = work.shape[1]
    wide = _columns_of_wide(width, lanes)
    streamed = tensors.mask is not None and is_streamed(x, tensors.grad_before_relu, task.collected)
    options = BackwardOptions(gated, task.fixed != 0, streamed)
    partial[:2, :] = 0
    for start in range(first, last, FLOAT32_ROWS):
        stop = min(start + FLOAT32_ROWS, last)
        work[:2, :] = 0
        for row in range(start, stop, UNROLL):
            end = min(row + UNROLL, stop)
            for k in range(0, wide, lanes[0]):
                stripes.add_grads(
                    tensors, begin, coefficients, options, row, end, k, 0, work, vectors[0]
                )
            for left in range(wide, width, lanes[1]):
                k = min(left, width - lanes[1])
                stripes.add_grads(
                    tensors, begin, coefficients, options, row, end, k, left - k, work, vectors[1]
                )
        add_grads(partial, work, 0, width, zero_vector_like(partial, FEW))
    if streamed:
        finish_streams()


@jitted
def grad_input(task, tensors, begin, coefficients, slab):
    """Writes ``grad_x`` of one slab. With a mask, `grad_sums` has written the gradient to use."""
    x = tensors.x
    passed = _with_grad(tensors, tensors.grad_before_relu if task.mask else tensors.grad)
    if x.shape[1] < FEW:
        one = number_like(x, 0)
        _grad_input(task, passed, begin, coefficients, slab, (1, 1), (one, one))
    else:
        vectors = zero_vector_like(x, LANES), zero_vector_like(x, FEW)
        _grad_input(task, passed, begin, coefficients, slab, (LANES, FEW), vectors)


@jitted
def _grad_input(task, tensors, begin, coefficients, slab, lanes, vectors):
    first, last = _rows_of(slab, task.slabs, tensors.x)
    width = coefficients.shape[1]
    wide = _columns_of_wide(width, lanes)
    streamed = is_streamed(tensors.x, tensors.grad_x, task.collected)
    options = BackwardOptions(task.relu != 0 and task.mask == 0, task.fixed != 0, streamed)
    for r in range(first, last):
        for k in range(0, wide, lanes[0]):
            stripes.grad_input(tensors, begin, coefficients, options, r, k, vectors[0])
        for left in range(wide, width, lanes[1]):
            k = min(left, width - lanes[1])
            stripes.grad_input(tensors, begin, coefficients, options, r, k, vectors[1])
    if streamed:
        finish_streams()


@jitted
def _rows_of(slab, slabs, x):
    return len(x) * slab // slabs, len(x) * (slab + 1) // slabs


@jitted
def _columns_of_wide(width, lanes):
    """Returns how many columns stripes of the wider kind cover."""
    return width - width % lanes[0]
