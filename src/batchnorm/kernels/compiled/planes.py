"""Contiguous (N, C, L) with long rows, as a matrix of N * C rows: a channel is every C-th of them.

Long rows are cut into pieces. The pieces of a channel are numbered through all samples; a slab is a
run of them, and a slab is collected block by block. Results are written piece by piece in the
order of memory. What threads share are *cells*, channel after channel: one channel of a slab, or
one piece of a row.
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
from batchnorm.kernels.compiled.task import APPLY, COLLECT, share
from batchnorm.kernels.compiled.vectors import (
    FEW,
    LANES,
    finish_streams,
    is_streamed,
    load,
    total,
    zeros,
)

# The most elements of a row that are gone through at a time.
PIECE = 4096
# Elements of a channel that are summed up in their own precision, 64 in each of `FEW` sums; or one
# piece, if it has more.
NARROW = 1024
# Elements of a channel that are summed up about one centre: of the shape alone, like slabs.
BLOCK = 65536
# Neighbouring channels are gone through together if their rows are short: so many at the most, so
# many bytes of a sample, and so many in all.
TOGETHER, RUN, KEPT = 64, 16384, 1 << 19
# A row that is nowhere, however many are added.
NOWHERE = -(1 << 60)
# Two rows of sums for each channel that is gone through together, and then the centres.
CENTRES = 2 * TOGETHER
WORK = (3 * TOGETHER, FEW)
# Two rows of sums for each, in the precision of the elements.
RECENT = (2 * TOGETHER, FEW)


@njit
def group_size(x, channels, tensors):
    """How many channels are gone through together, so that the L2 cache holds so many tensors."""
    row = x.shape[1] * x.itemsize
    return max(1, min(TOGETHER, RUN // row, KEPT // (tensors * row * (len(x) // channels))))


@njit
def pieces_of(x, channels):
    """How many pieces a channel has."""
    return len(x) // channels * _cuts(x)


@njit
def shares(task, steps, x, thread, team):
    """What a thread does: its channels, and its cells of slabs and of pieces.

    Steps that go through memory share out cells, if the task says so; the others channels.
    """
    channels = task.channels
    slabs, pieces = task.slabs * channels, pieces_of(x, channels) * channels
    if not (task.by_cell and steps & (COLLECT | APPLY)):
        return share(channels, thread, team), (0, slabs), (0, pieces)
    return (0, channels), share(slabs, thread, team), share(pieces, thread, team)


@njit
def _pieces_of_slab(x, channels, slab, slabs):
    pieces = pieces_of(x, channels)
    return pieces * slab // slabs, pieces * (slab + 1) // slabs


@njit
def clipped(first, last, slab, channels, cells):
    """The channels from ``first`` to ``last`` of one slab that are among the cells."""
    begin, end = cells
    return max(first, begin - slab * channels), min(last, end - slab * channels)


@njit
def collect(x, channels, partials, sums, first, last, cells):
    """Sums of the channels from ``first`` to ``last`` in the slabs that are cells."""
    begin, end = cells
    for slab in range(begin // channels, (end + channels - 1) // channels):
        low, high = clipped(first, last, slab, channels, cells)
        _collect_slab(x, channels, partials, sums, low, high, slab)


@njit
def _collect_slab(x, channels, partials, sums, first, last, slab):
    partial = partials[slab]
    partial[:, first:last] = 0
    begin, end = _pieces_of_slab(x, channels, slab, len(partials))
    step, group = _pieces_up_to(BLOCK, x), group_size(x, channels, 1)
    for start in range(first, last, group):
        for piece in range(begin, end, step):
            pieces = piece, min(piece + step, end)
            _collect_block(x, channels, partial, sums, start, min(start + group, last), pieces)


@njit
def _collect_block(x, channels, partial, sums, first, last, pieces):
    """Sums about a first idea of the mean; about the block's own mean if that lies far off."""
    work, count = sums[0], _count(x, channels, pieces)
    for c in range(first, last):
        guess = number_like(x, _guess(x, channels, partial, c, pieces[0]))
        work[CENTRES + c - first, 0] = guess
    _deviate(x, channels, sums, first, first, last, pieces)
    for c in range(first, last):
        k = c - first
        linear, squares = rows.totals_of(work, k)
        if 2 * linear * linear > squares * count:
            work[CENTRES + k, 0] = number_like(x, work[CENTRES + k, 0] + linear / count)
            _deviate(x, channels, sums, first, c, c + 1, pieces)
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
def _deviate(x, channels, sums, origin, first, last, pieces):
    """Sums of ``x - centre`` and its square; ``sums`` begin with channel ``origin``."""
    work, recent = sums
    vectors = zeros(x, LANES), zeros(x, FEW)
    begin, end = pieces
    step = _pieces_up_to(NARROW, x)
    rows.clear(sums, first - origin, last - origin)
    for run in range(begin, end, step):
        for piece in range(run, min(run + step, end)):
            following = min(piece + 1, end - 1)
            for c in range(first, last):
                r, start, stop = _bounds(piece, channels, c, x)
                ahead, ahead_start, _ = _bounds(following, channels, c, x)
                centre = number_like(x, work[CENTRES + c - origin, 0])
                rows.add_deviations(
                    x, r, start, stop, (ahead, ahead_start), centre, recent, c - origin, vectors
                )
        rows.keep(sums, first - origin, last - origin)


@njit
def _count(x, channels, pieces):
    """Elements of a channel in some pieces."""
    count = 0
    for piece in range(pieces[0], pieces[1]):
        _, start, stop = _bounds(piece, channels, 0, x)
        count += stop - start
    return count


@njit
def normalize(task, x, residual, y, mask, coefficients, first, last, cells):
    """``y`` of some channels in the pieces that are cells.

    The last samples come first if they may still be cached.
    """
    streamed = is_streamed(x, y, task.collected)
    options = task.relu != 0, task.mask != 0, streamed
    ahead_by = _ahead(task, first, last)
    vectors = zeros(x, LANES), zeros(x, FEW)
    begin, end = _samples_of(cells, task.channels, x)
    for sample in range(end - 1, begin - 1, -1) if task.collected else range(begin, end):
        for c in range(first, last):
            r = sample * task.channels + c
            numbers = coefficients[CENTRE, c], coefficients[SCALE, c], coefficients[OFFSET, c]
            for piece in _pieces_of_row(r, cells, x):
                start, stop = _part(piece, x)
                rows.normalize(
                    x, residual, y, mask, options, r, start, stop, numbers, r + ahead_by, vectors
                )
    if streamed:
        finish_streams()


@njit
def grad_sums(
    task, grad, x, mask, behind_relu, partials, coefficients, sums, first, last, cells
):  # fmt: skip
    """Sums of the gradient behind the ReLU; a mask's gradient is written to ``behind_relu``."""
    streamed = mask is not None and is_streamed(x, behind_relu, task.collected)
    options = task.relu != 0 and mask is None, streamed
    begin, end = cells
    for slab in range(begin // task.channels, (end + task.channels - 1) // task.channels):
        low, high = clipped(first, last, slab, task.channels, cells)
        _sum_slab(
            grad, x, mask, behind_relu, options, task.channels, partials, coefficients, sums,
            low, high, slab,
        )  # fmt: skip
    if streamed:
        finish_streams()


@njit
def _sum_slab(
    grad, x, mask, behind_relu, options, channels, partials, coefficients, sums, first, last, slab
):
    pieces = _pieces_of_slab(x, channels, slab, len(partials))
    group = group_size(x, channels, 2)
    for start in range(first, last, group):
        stop = min(start + group, last)
        _add_grads(
            grad, x, mask, behind_relu, options, channels, coefficients, sums, start, stop, pieces
        )
        for c in range(start, stop):
            plain, product = rows.totals_of(sums[0], c - start)
            partials[slab, PLAIN, c] = plain
            partials[slab, PRODUCT, c] = product


@njit
def _add_grads(
    grad, x, mask, behind_relu, options, channels, coefficients, sums, first, last, pieces
):
    vectors = zeros(x, LANES), zeros(x, FEW)
    begin, end = pieces
    step = _pieces_up_to(NARROW, x)
    rows.clear(sums, 0, last - first)
    for run in range(begin, end, step):
        for piece in range(run, min(run + step, end)):
            for c in range(first, last):
                r, start, stop = _bounds(piece, channels, c, x)
                numbers = (
                    coefficients[CENTRE, c], coefficients[INV_STD, c],
                    coefficients[SCALE, c], coefficients[OFFSET, c],
                )  # fmt: skip
                rows.add_grads(
                    grad, x, mask, behind_relu, options,
                    r, start, stop, numbers, sums[1], c - first, vectors,
                )  # fmt: skip
        rows.keep(sums, 0, last - first)


@njit
def grad_input(task, grad, x, mask, result, coefficients, first, last, cells):
    """Gradient of the input, of some channels in the pieces that are cells; see `normalize`."""
    streamed = is_streamed(x, result, task.collected)
    options = task.fixed != 0, task.relu != 0 and mask is None, streamed
    ahead_by = _ahead(task, first, last)
    vectors = zeros(x, LANES), zeros(x, FEW)
    begin, end = _samples_of(cells, task.channels, x)
    for sample in range(end - 1, begin - 1, -1) if task.collected else range(begin, end):
        for c in range(first, last):
            r = sample * task.channels + c
            numbers = (
                coefficients[CENTRE, c], coefficients[INV_STD, c], coefficients[SCALE, c],
                coefficients[OFFSET, c], coefficients[TILT, c], coefficients[LEVEL, c],
            )  # fmt: skip
            for piece in _pieces_of_row(r, cells, x):
                start, stop = _part(piece, x)
                rows.grad_input(
                    grad, x, mask, result, options, r, start, stop, numbers, r + ahead_by, vectors
                )
    if streamed:
        finish_streams()


@njit
def _samples_of(cells, channels, x):
    """First and last of the samples to which some pieces belong."""
    size = channels * _cuts(x)
    return cells[0] // size, (cells[1] + size - 1) // size


@njit
def _pieces_of_row(r, cells, x):
    """The pieces of a row that are among the cells, numbered from its first."""
    cuts = _cuts(x)
    return range(max(0, cells[0] - r * cuts), min(cuts, cells[1] - r * cuts))


@njit
def _part(piece, x):
    """First and last element of a piece of any row."""
    return piece * PIECE, min(piece * PIECE + PIECE, x.shape[1])


@njit
def _ahead(task, first, last):
    """How many rows ahead to prefetch: to the channels that are collected next, if any are."""
    return last - first if task.collected and not task.by_cell else NOWHERE


@njit
def _pieces_up_to(elements, x):
    """How many pieces have so many elements, at least one."""
    return max(1, elements // min(PIECE, x.shape[1]))


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
