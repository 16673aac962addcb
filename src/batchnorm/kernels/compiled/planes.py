"""Contiguous (N, C, L) with long rows, as a matrix of N * C rows: a channel is every C-th of them.

Long rows are cut into pieces. The pieces of a channel are numbered through all samples; a slab is a
run of them, and a slab is collected block by block.
"""

from __future__ import annotations

from numba import njit

from batchnorm.kernels.compiled import rows
from batchnorm.kernels.compiled.elements import number_like
from batchnorm.kernels.compiled.statistics import (
    CENTRE,
    COUNT,
    INV_STD,
    LEVEL,
    LINEAR,
    OFFSET,
    PLAIN,
    PRODUCT,
    SCALE,
    SHIFT,
    TILT,
    add_moments,
)
from batchnorm.kernels.compiled.vectors import (
    FEW,
    LANES,
    finish_streams,
    is_streamed,
    load,
    total,
    zeros,
)

# The most elements of a row that are summed up in their own precision, 64 in each lane.
PIECE = 4096
# Elements of a channel that are summed up about one centre: of the shape alone, like slabs.
BLOCK = 65536
# Neighbouring channels are gone through together if their rows are short: so many at the most, so
# many bytes of a sample, and so many in all.
TOGETHER, RUN, KEPT = 64, 16384, 1 << 19
# A row that is nowhere, however many are added.
NOWHERE = -(1 << 60)
# Where the centres begin in ``work``; before them are two rows of sums for each channel.
CENTRES = 2 * TOGETHER
WORK = (3 * TOGETHER, FEW)


@njit
def group_size(x, channels, tensors):
    """How many channels are gone through together, so that the L2 cache holds so many tensors."""
    row = x.shape[1] * x.itemsize
    return max(1, min(TOGETHER, RUN // row, KEPT // (tensors * row * (len(x) // channels))))


@njit
def share_of_pieces(x, channels, part, parts):
    """First and last piece of one of several equal parts."""
    pieces = len(x) // channels * _cuts(x)
    return pieces * part // parts, pieces * (part + 1) // parts


@njit
def collect(x, channels, partials, work, first, last, slab):
    """Sums of one slab of the channels from ``first`` to ``last``."""
    partial = partials[slab]
    partial[:, first:last] = 0
    begin, end = share_of_pieces(x, channels, slab, len(partials))
    step, group = _pieces_of_block(x), group_size(x, channels, 1)
    for start in range(first, last, group):
        for piece in range(begin, end, step):
            pieces = piece, min(piece + step, end)
            _collect_block(x, channels, partial, work, start, min(start + group, last), pieces)


@njit
def _collect_block(x, channels, partial, work, first, last, pieces):
    """Sums about a first idea of the mean; about the block's own mean if that lies far off."""
    count = _count(x, channels, pieces)
    for c in range(first, last):
        guess = number_like(x, _guess(x, channels, partial, c, pieces[0]))
        work[CENTRES + c - first, 0] = guess
    _deviate(x, channels, work, first, first, last, pieces)
    for c in range(first, last):
        k = c - first
        linear, squares = rows.totals_of(work, k)
        if 2 * linear * linear > squares * count:
            work[CENTRES + k, 0] = number_like(x, work[CENTRES + k, 0] + linear / count)
            _deviate(x, channels, work, first, c, c + 1, pieces)
            linear, squares = rows.totals_of(work, k)
        add_moments(partial, c, count, work[CENTRES + k, 0], linear, squares)


@njit
def _guess(x, channels, partial, c, piece):
    """The mean so far, or that of a few elements at the beginning of a piece."""
    if partial[COUNT, c] > 0:
        return partial[SHIFT, c] + partial[LINEAR, c] / partial[COUNT, c]
    r, start, _ = _bounds(piece, channels, c, x)
    return total(load(x, r, min(start, x.shape[1] - FEW), zeros(x, FEW))) / FEW


@njit
def _deviate(x, channels, work, origin, first, last, pieces):
    """Sums of ``x - centre`` and its square; ``work`` begins with channel ``origin``."""
    vectors = zeros(x, LANES), zeros(x, FEW)
    begin, end = pieces
    work[2 * (first - origin) : 2 * (last - origin), :] = 0
    for piece in range(begin, end):
        following = min(piece + 1, end - 1)
        for c in range(first, last):
            r, start, stop = _bounds(piece, channels, c, x)
            ahead, ahead_start, _ = _bounds(following, channels, c, x)
            centre = number_like(x, work[CENTRES + c - origin, 0])
            rows.add_deviations(
                x, r, start, stop, (ahead, ahead_start), centre, work, c - origin, vectors
            )


@njit
def _count(x, channels, pieces):
    """Elements of a channel in some pieces."""
    count = 0
    for piece in range(pieces[0], pieces[1]):
        _, start, stop = _bounds(piece, channels, 0, x)
        count += stop - start
    return count


@njit
def normalize(task, x, residual, y, mask, coefficients, first, last, begin, end):
    """``y`` of some pieces of some channels, the last ones first if they are still cached."""
    streamed = is_streamed(x, y, task.collected)
    options = task.residual != 0, task.relu != 0, task.mask != 0, streamed
    ahead_by = _ahead(task, first, last)
    vectors = zeros(x, LANES), zeros(x, FEW)
    for piece in range(end - 1, begin - 1, -1) if task.collected else range(begin, end):
        for c in range(first, last):
            r, start, stop = _bounds(piece, task.channels, c, x)
            numbers = coefficients[CENTRE, c], coefficients[SCALE, c], coefficients[OFFSET, c]
            ahead = r + ahead_by
            rows.normalize(x, residual, y, mask, options, r, start, stop, numbers, ahead, vectors)
    if streamed:
        finish_streams()


@njit
def grad_sums(task, grad, x, mask, behind_relu, partials, coefficients, work, first, last, slab):
    """Sums of the gradient behind the ReLU; a mask's gradient is written to ``behind_relu``."""
    begin, end = share_of_pieces(x, task.channels, slab, len(partials))
    has_mask = task.mask != 0
    streamed = has_mask and is_streamed(x, behind_relu, task.collected)
    options = task.relu != 0 and not has_mask, has_mask, streamed
    arrays = grad, x, mask, behind_relu
    step, group = _pieces_of_block(x), group_size(x, task.channels, 2)
    partials[slab, : PRODUCT + 1, first:last] = 0
    for start in range(first, last, group):
        stop = min(start + group, last)
        for piece in range(begin, end, step):
            pieces = piece, min(piece + step, end)
            _add_grads(arrays, options, task.channels, coefficients, work, start, stop, pieces)
            for c in range(start, stop):
                plain, product = rows.totals_of(work, c - start)
                partials[slab, PLAIN, c] += plain
                partials[slab, PRODUCT, c] += product
    if streamed:
        finish_streams()


@njit
def _add_grads(arrays, options, channels, coefficients, work, first, last, pieces):
    x = arrays[1]
    vectors = zeros(x, LANES), zeros(x, FEW)
    work[: 2 * (last - first), :] = 0
    for piece in range(pieces[0], pieces[1]):
        for c in range(first, last):
            r, start, stop = _bounds(piece, channels, c, x)
            numbers = (
                coefficients[CENTRE, c], coefficients[INV_STD, c],
                coefficients[SCALE, c], coefficients[OFFSET, c],
            )  # fmt: skip
            rows.add_grads(arrays, options, r, start, stop, numbers, work, c - first, vectors)


@njit
def grad_input(task, arrays, result, coefficients, first, last, begin, end):
    """Gradient of the input, the last pieces first if they are still cached."""
    x = arrays[1]
    streamed, has_mask = is_streamed(x, result, task.collected), task.mask != 0
    options = task.fixed != 0, task.relu != 0 and not has_mask, has_mask, streamed
    ahead_by = _ahead(task, first, last)
    vectors = zeros(x, LANES), zeros(x, FEW)
    for piece in range(end - 1, begin - 1, -1) if task.collected else range(begin, end):
        for c in range(first, last):
            r, start, stop = _bounds(piece, task.channels, c, x)
            numbers = (
                coefficients[CENTRE, c], coefficients[INV_STD, c], coefficients[SCALE, c],
                coefficients[OFFSET, c], coefficients[TILT, c], coefficients[LEVEL, c],
            )  # fmt: skip
            rows.grad_input(arrays, result, options, r, start, stop, numbers, r + ahead_by, vectors)
    if streamed:
        finish_streams()


@njit
def _ahead(task, first, last):
    """How many rows ahead to prefetch: to the channels that are collected next, if any are."""
    return last - first if task.collected else NOWHERE


@njit
def _pieces_of_block(x):
    return BLOCK // min(PIECE, x.shape[1])


@njit
def _cuts(x):
    return (x.shape[1] + PIECE - 1) // PIECE


@njit
def _bounds(piece, channels, c, x):
    """Row, first and last element of a piece of channel ``c``."""
    if x.shape[1] <= PIECE:
        return piece * channels + c, 0, x.shape[1]
    cuts = _cuts(x)
    start = piece % cuts * PIECE
    return piece // cuts * channels + c, start, min(start + PIECE, x.shape[1])
