"""Contiguous (N, C, L) with long rows: a channel is a stack of planes.

Long rows are cut into pieces. The pieces of a channel are numbered through all samples; a slab is a
run of them, and a slab is collected block by block, because each block is gone through twice while
it is in the cache: once for the means, once for the deviations from them.
"""

from __future__ import annotations

from numba import njit

from batchnorm.kernels.compiled import rows
from batchnorm.kernels.compiled.elements import fetch, number_like
from batchnorm.kernels.compiled.gates import store_passes, where_passed
from batchnorm.kernels.compiled.statistics import (
    CENTRE,
    CENTRE_OF_BLOCK,
    INV_STD,
    LEVEL,
    OFFSET,
    PLAIN,
    PRODUCT,
    REST,
    SCALE,
    SPREAD,
    TILT,
    add_moments,
)
from batchnorm.kernels.compiled.vectors import LANES, load, store, zeros

# A multiple of the lanes of a vector.
PIECE = 16384
# Elements of one channel that are summed about one centre: of the shape alone, like slabs.
BLOCK = 65536


@njit
def share_of_pieces(x, part, parts):
    """First and last piece of one of several equal parts."""
    pieces = x.shape[0] * _cuts(x)
    return pieces * part // parts, pieces * (part + 1) // parts


@njit
def collect(x, partials, first, last, slab):
    """Sums of one slab of the channels from ``first`` to ``last``."""
    partial = partials[slab]
    partial[:, first:last] = 0
    begin, end = share_of_pieces(x, slab, len(partials))
    step = max(1, BLOCK // min(PIECE, x.shape[2]))
    for piece in range(begin, end, step):
        _collect_block(x, partial, first, last, piece, min(piece + step, end))


@njit
def _collect_block(x, partial, first, last, begin, end):
    """Sums about the mean of the block's first piece, or its own mean if that lies far off."""
    i, start, stop = _bounds(begin, x)
    for c in range(first, last):
        partial[CENTRE_OF_BLOCK, c] = rows.total(x[i, c, start:stop]) / (stop - start)
    _deviate(x, partial, first, last, begin, end)
    count = _count(x, begin, end)
    for c in range(first, last):
        offset = partial[REST, c] / count
        if offset * offset * count > partial[SPREAD, c] - partial[REST, c] * offset:
            partial[CENTRE_OF_BLOCK, c] += offset
            _deviate(x, partial, c, c + 1, begin, end)
        centre = number_like(x, partial[CENTRE_OF_BLOCK, c])
        add_moments(partial, c, count, centre, partial[REST, c], partial[SPREAD, c])


@njit
def _deviate(x, partial, first, last, begin, end):
    partial[REST, first:last] = 0
    partial[SPREAD, first:last] = 0
    for piece in range(begin, end):
        i, start, stop = _bounds(piece, x)
        for c in range(first, last):
            centre = number_like(x, partial[CENTRE_OF_BLOCK, c])
            rest, spread = rows.deviations(x[i, c, start:stop], centre)
            partial[REST, c] += rest
            partial[SPREAD, c] += spread


@njit
def _count(x, begin, end):
    """Elements of a channel in some pieces."""
    count = 0
    for piece in range(begin, end):
        _, start, stop = _bounds(piece, x)
        count += stop - start
    return count


@njit
def normalize(task, x, residual, y, mask, coefficients, first, last, begin, end):
    """``y`` of some pieces of some channels, the last pieces first: they are still cached."""
    relu = task.relu != 0
    for piece in range(end - 1, begin - 1, -1):
        i, start, stop = _bounds(piece, x)
        for c in range(first, last):
            row, out = x[i, c, start:stop], y[i, c, start:stop]
            if c + last - first < x.shape[1]:
                fetch(x[i, c + last - first, start:stop])
            centre, scale = coefficients[CENTRE, c], coefficients[SCALE, c]
            offset = coefficients[OFFSET, c]
            if task.residual:
                rows.normalize(row, out, centre, scale, offset, residual[i, c, start:stop], relu)
            else:
                rows.normalize(row, out, centre, scale, offset, None, relu)
            if task.mask:
                _pack(y[i], mask[i], c, start, stop)


@njit
def grad_sums(task, grad, x, mask, behind_relu, partials, coefficients, first, last, slab):
    """Sums of the gradient behind the ReLU; a mask's gradient is written to ``behind_relu``."""
    partial = partials[slab]
    partial[:, first:last] = 0
    begin, end = share_of_pieces(x, slab, len(partials))
    for piece in range(begin, end):
        i, start, stop = _bounds(piece, x)
        for c in range(first, last):
            g, row = grad[i, c, start:stop], x[i, c, start:stop]
            if task.mask:
                _unpack(grad[i], mask[i], behind_relu[i], c, start, stop)
                g = behind_relu[i, c, start:stop]
            centre, inv_std = coefficients[CENTRE, c], coefficients[INV_STD, c]
            scale, offset = coefficients[SCALE, c], coefficients[OFFSET, c]
            if task.relu and not task.mask:
                plain, product = rows.grad_sums(g, row, centre, inv_std, scale, offset)
            else:
                plain, product = rows.grad_sums(g, row, centre, inv_std, scale, None)
            partial[PLAIN, c] += plain
            partial[PRODUCT, c] += product


@njit
def grad_input(task, grad, x, result, coefficients, first, last, begin, end):
    """Gradient of the input, the last pieces first. With a mask, ``grad`` lies behind the ReLU."""
    gated = task.relu and not task.mask
    for piece in range(end - 1, begin - 1, -1):
        i, start, stop = _bounds(piece, x)
        for c in range(first, last):
            g, row, out = grad[i, c, start:stop], x[i, c, start:stop], result[i, c, start:stop]
            if c + last - first < x.shape[1]:
                fetch(x[i, c + last - first, start:stop])
                fetch(grad[i, c + last - first, start:stop])
            centre, inv_std = coefficients[CENTRE, c], coefficients[INV_STD, c]
            scale, offset = coefficients[SCALE, c], coefficients[OFFSET, c]
            tilt, level = coefficients[TILT, c], coefficients[LEVEL, c]
            if gated:
                rows.grad_input(
                    task.fixed, g, row, out, centre, inv_std, scale, tilt, level, offset
                )
            else:
                rows.grad_input(task.fixed, g, row, out, centre, inv_std, scale, tilt, level, None)


@njit
def _pack(y, mask, c, start, stop):
    """The bits of a piece of channel ``c``, in vectors as far as they reach."""
    zero = zeros(y)
    end = stop - (stop - start) % LANES
    for j in range(start, end, LANES):
        store_passes(mask, c, j, load(y, c, j, zero), zero)
    rows.pack(y[c, end:stop], mask[c, end // 8 : (stop + 7) // 8])


@njit
def _unpack(grad, mask, behind_relu, c, start, stop):
    """The gradient behind the ReLU, in a piece of channel ``c``."""
    zero = zeros(grad)
    end = stop - (stop - start) % LANES
    for j in range(start, end, LANES):
        store(behind_relu, c, j, where_passed(mask, c, j, load(grad, c, j, zero), zero))
    bits = mask[c, end // 8 : (stop + 7) // 8]
    rows.unpack(grad[c, end:stop], bits, behind_relu[c, end:stop])


@njit
def _cuts(x):
    return (x.shape[2] + PIECE - 1) // PIECE


@njit
def _bounds(piece, x):
    cuts = _cuts(x)
    start = piece % cuts * PIECE
    return piece // cuts, start, min(start + PIECE, x.shape[2])
