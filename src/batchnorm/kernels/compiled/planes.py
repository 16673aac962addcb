"""Contiguous (N, C, L) with long rows, as a matrix of N * C rows: a channel is every C-th of them.

Long rows are cut into *pieces*. The pieces of a channel are numbered through all samples. A *slab*
is a run of pieces, collected in *blocks*. Results are written piece by piece in the order of
memory. Threads share *cells*, channel after channel: one channel of a slab, or one piece of a row.
"""

from __future__ import annotations

from batchnorm.kernels.compiled import rows
from batchnorm.kernels.compiled.channel_sums import (
    COUNT,
    LINEAR,
    SHIFT,
    SUM_GRAD,
    SUM_GRAD_X_HAT,
    ShiftedSums,
    add_moments,
)
from batchnorm.kernels.compiled.coefficients import of_channel
from batchnorm.kernels.compiled.elements import number_like
from batchnorm.kernels.compiled.maps import BackwardOptions, ForwardOptions
from batchnorm.kernels.compiled.numba_internals import jitted
from batchnorm.kernels.compiled.streaming import finish_streams, is_streamed
from batchnorm.kernels.compiled.task import APPLY, COLLECT, share
from batchnorm.kernels.compiled.vectors import FEW, LANES, load, total, zero_vector_like

# The longest piece of a row, in elements. docs/decisions/0007: sums
PIECE = 4096
# Elements of a channel that are summed in the dtype of the arithmetic, in `FEW` sums of 64 values;
# a longer piece has 64 sums of as many. Beyond them, float32 would lose digits.
# docs/decisions/0007: sums
FLOAT32_RUN = 1024
# Elements of a channel that are summed about one center. docs/decisions/0007: sums
BLOCK = 65536
# Limits of a group of neighboring channels with short rows, which are computed together: their
# number, their bytes in one sample, and their bytes in all tensors that are read, which have to
# fit into an L2 cache (1 MiB where it was measured). docs/decisions/0007: planes
MAX_CHANNELS, MAX_BYTES_PER_SAMPLE, MAX_BYTES = 64, 16384, 1 << 19
# Sentinel: adding any row index leaves it negative, which switches prefetching off.
NO_PREFETCH = -(1 << 60)
# Shapes of `rows.Sums`: two rows for each channel of a group; after them, in ``work``, the centers.
CENTERS = 2 * MAX_CHANNELS
WORK = (3 * MAX_CHANNELS, FEW)
RECENT = (2 * MAX_CHANNELS, FEW)


@jitted
def group_size(x, channels, tensors):
    """Returns how many channels of ``tensors`` tensors are computed together."""
    row = x.shape[1] * x.itemsize
    in_all = MAX_BYTES // (tensors * row * (len(x) // channels))
    return max(1, min(MAX_CHANNELS, MAX_BYTES_PER_SAMPLE // row, in_all))


@jitted
def channels_at_a_time(task, steps, x, tensors):
    """Returns a group's size if it is collected and applied at once, else all channels."""
    if steps & COLLECT and steps & APPLY:
        return group_size(x, task.channels, tensors)
    return max(1, task.channels)


@jitted
def pieces_of(x, channels):
    """Returns the number of pieces of a channel."""
    return len(x) // channels * _cuts(x)


@jitted
def shares(task, steps, x, thread, team):
    """Returns a thread's channels, and its cells of slabs and of pieces.

    Steps that read all of memory share cells, if the task says so; the other steps share channels.
    """
    channels = task.channels
    slabs, pieces = task.slabs * channels, pieces_of(x, channels) * channels
    if not (task.by_cell and steps & (COLLECT | APPLY)):
        return share(channels, thread, team), (0, slabs), (0, pieces)
    return (0, channels), share(slabs, thread, team), share(pieces, thread, team)


@jitted
def _pieces_of_slab(x, channels, slab, slabs):
    pieces = pieces_of(x, channels)
    return pieces * slab // slabs, pieces * (slab + 1) // slabs


@jitted
def clipped(first, last, slab, channels, cells):
    """Returns the channels from ``first`` to ``last`` of one slab that are among the cells."""
    begin, end = cells
    return max(first, begin - slab * channels), min(last, end - slab * channels)


@jitted
def collect(x, channels, partials, sums, first, last, cells):
    """Collects sums of the channels from ``first`` to ``last`` in the slabs that are cells."""
    begin, end = cells
    for slab in range(begin // channels, (end + channels - 1) // channels):
        low, high = clipped(first, last, slab, channels, cells)
        _collect_slab(x, channels, partials, sums, low, high, slab)


@jitted
def _collect_slab(x, channels, partials, sums, first, last, slab):
    partial = partials[slab]
    partial[:, first:last] = 0
    begin, end = _pieces_of_slab(x, channels, slab, len(partials))
    step, group = _pieces_up_to(BLOCK, x), group_size(x, channels, 1)
    for start in range(first, last, group):
        for piece in range(begin, end, step):
            pieces = piece, min(piece + step, end)
            _collect_block(x, channels, partial, sums, start, min(start + group, last), pieces)


@jitted
def _collect_block(x, channels, partial, sums, first, last, pieces):
    """Accumulates deviations from a provisional mean.

    It repeats with the block's own mean if the two are more than a standard deviation apart.
    """
    work, count = sums.work, _count(x, channels, pieces)
    for c in range(first, last):
        guess = number_like(x, _guess(x, channels, partial, c, pieces[0]))
        work[CENTERS + c - first, 0] = guess
    _deviate(x, channels, sums, first, first, last, pieces)
    for c in range(first, last):
        k = c - first
        linear, squares = rows.totals_of(work, k)
        if 2 * linear * linear > squares * count:
            work[CENTERS + k, 0] = number_like(x, work[CENTERS + k, 0] + linear / count)
            _deviate(x, channels, sums, first, c, c + 1, pieces)
            linear, squares = rows.totals_of(work, k)
        add_moments(partial, c, ShiftedSums(float(count), work[CENTERS + k, 0], linear, squares))


@jitted
def _guess(x, channels, partial, c, piece):
    """Returns the mean so far, or that of a few elements at the beginning of a piece."""
    if partial[COUNT, c] > 0:
        return partial[SHIFT, c] + partial[LINEAR, c] / partial[COUNT, c]
    r, start, _ = _bounds(piece, channels, c, x)
    return total(load(x, r, min(start, x.shape[1] - FEW), zero_vector_like(x, FEW))) / FEW


@jitted
def _deviate(x, channels, sums, origin, first, last, pieces):
    """Sums ``x - center`` and its square; ``sums`` begin with channel ``origin``."""
    vectors = zero_vector_like(x, LANES), zero_vector_like(x, FEW)
    begin, end = pieces
    step = _pieces_up_to(FLOAT32_RUN, x)
    rows.clear(sums, first - origin, last - origin)
    for run in range(begin, end, step):
        for piece in range(run, min(run + step, end)):
            following = min(piece + 1, end - 1)
            for c in range(first, last):
                r, start, stop = _bounds(piece, channels, c, x)
                ahead, ahead_start, _ = _bounds(following, channels, c, x)
                center = number_like(x, sums.work[CENTERS + c - origin, 0])
                rows.add_deviations(
                    x, r, start, stop, (ahead, ahead_start),
                    center, sums.recent, c - origin, vectors,
                )  # fmt: skip
        rows.flush(sums, first - origin, last - origin)


@jitted
def _count(x, channels, pieces):
    """Returns the number of elements of a channel in some pieces."""
    count = 0
    for piece in range(pieces[0], pieces[1]):
        _, start, stop = _bounds(piece, channels, 0, x)
        count += stop - start
    return count


@jitted
def normalize(task, tensors, coefficients, first, last, cells):
    """Writes ``y`` of some channels in the pieces that are cells.

    The last samples come first if they may still be cached.
    """
    x = tensors.x
    options = ForwardOptions(
        task.relu != 0, task.mask != 0, is_streamed(x, tensors.y, task.collected)
    )
    ahead_by = _ahead(task, first, last)
    vectors = zero_vector_like(x, LANES), zero_vector_like(x, FEW)
    begin, end = _samples_of(cells, task.channels, x)
    for sample in range(end - 1, begin - 1, -1) if task.collected else range(begin, end):
        for c in range(first, last):
            r = sample * task.channels + c
            numbers = of_channel(coefficients, c)
            for piece in _pieces_of_row(r, cells, x):
                start, stop = _part(piece, x)
                rows.normalize(tensors, options, r, start, stop, numbers, r + ahead_by, vectors)
    if options.streamed:
        finish_streams()


@jitted
def grad_sums(task, tensors, partials, coefficients, sums, first, last, cells):
    """Sums the gradient before the ReLU; with a mask, writes it to ``grad_before_relu``."""
    has_mask = tensors.mask is not None
    streamed = has_mask and is_streamed(tensors.x, tensors.grad_before_relu, task.collected)
    options = BackwardOptions(task.relu != 0 and not has_mask, task.fixed != 0, streamed)
    begin, end = cells
    for slab in range(begin // task.channels, (end + task.channels - 1) // task.channels):
        low, high = clipped(first, last, slab, task.channels, cells)
        _sum_slab(task, tensors, options, partials, coefficients, sums, low, high, slab)
    if streamed:
        finish_streams()


@jitted
def _sum_slab(task, tensors, options, partials, coefficients, sums, first, last, slab):
    pieces = _pieces_of_slab(tensors.x, task.channels, slab, len(partials))
    group = group_size(tensors.x, task.channels, 2)
    for start in range(first, last, group):
        stop = min(start + group, last)
        _add_grads(task, tensors, options, coefficients, sums, start, stop, pieces)
        for c in range(start, stop):
            sum_grad, sum_grad_x_hat = rows.totals_of(sums.work, c - start)
            partials[slab, SUM_GRAD, c] = sum_grad
            partials[slab, SUM_GRAD_X_HAT, c] = sum_grad_x_hat


@jitted
def _add_grads(task, tensors, options, coefficients, sums, first, last, pieces):
    x = tensors.x
    vectors = zero_vector_like(x, LANES), zero_vector_like(x, FEW)
    begin, end = pieces
    step = _pieces_up_to(FLOAT32_RUN, x)
    rows.clear(sums, 0, last - first)
    for run in range(begin, end, step):
        for piece in range(run, min(run + step, end)):
            for c in range(first, last):
                r, start, stop = _bounds(piece, task.channels, c, x)
                numbers = of_channel(coefficients, c)
                rows.add_grads(
                    tensors, options, r, start, stop, numbers, sums.recent, c - first, vectors
                )
        rows.flush(sums, 0, last - first)


@jitted
def grad_input(task, tensors, coefficients, first, last, cells):
    """Writes ``grad_x`` of some channels in the pieces that are cells; see `normalize`."""
    x = tensors.x
    gated = task.relu != 0 and tensors.mask is None
    options = BackwardOptions(
        gated, task.fixed != 0, is_streamed(x, tensors.grad_x, task.collected)
    )
    ahead_by = _ahead(task, first, last)
    vectors = zero_vector_like(x, LANES), zero_vector_like(x, FEW)
    begin, end = _samples_of(cells, task.channels, x)
    for sample in range(end - 1, begin - 1, -1) if task.collected else range(begin, end):
        for c in range(first, last):
            r = sample * task.channels + c
            numbers = of_channel(coefficients, c)
            for piece in _pieces_of_row(r, cells, x):
                start, stop = _part(piece, x)
                rows.grad_input(tensors, options, r, start, stop, numbers, r + ahead_by, vectors)
    if options.streamed:
        finish_streams()


@jitted
def _samples_of(cells, channels, x):
    """Returns the first and last sample to which some pieces belong."""
    size = channels * _cuts(x)
    return cells[0] // size, (cells[1] + size - 1) // size


@jitted
def _pieces_of_row(r, cells, x):
    """Returns the pieces of a row that are among the cells, numbered from its first."""
    cuts = _cuts(x)
    return range(max(0, cells[0] - r * cuts), min(cuts, cells[1] - r * cuts))


@jitted
def _part(piece, x):
    """Returns the first and last element of a piece of any row."""
    return piece * PIECE, min(piece * PIECE + PIECE, x.shape[1])


@jitted
def _ahead(task, first, last):
    """Returns how many rows ahead to prefetch: to the channels that are collected next, if any."""
    return last - first if task.collected and not task.by_cell else NO_PREFETCH


@jitted
def _pieces_up_to(elements, x):
    """Returns how many pieces have ``elements`` elements together, at least one."""
    return max(1, elements // min(PIECE, x.shape[1]))


@jitted
def _cuts(x):
    return (x.shape[1] + PIECE - 1) // PIECE


@jitted
def _bounds(piece, channels, c, x):
    """Returns row, first and last element of a piece of channel ``c``."""
    if x.shape[1] <= PIECE:
        return piece * channels + c, 0, x.shape[1]
    cuts = _cuts(x)
    start = piece % cuts * PIECE
    return piece // cuts * channels + c, start, min(start + PIECE, x.shape[1])
