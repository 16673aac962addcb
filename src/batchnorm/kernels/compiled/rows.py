"""A row of one channel, from one vector to the next.

The two sums of a channel are kept in two rows of ``work``, as `FEW` numbers of float64 each: only
within a row are they in the precision of the elements. A row is gone through by `LANES`, what is
left by `FEW`. The last few begin further left where they would stand
out on the right, so some elements may be done twice, with the same result. A row has at least
`FEW` elements, but may be called for from anywhere in it.
"""

from __future__ import annotations

from numba import njit

from batchnorm.kernels.compiled import maps
from batchnorm.kernels.compiled.elements import number_like, widen
from batchnorm.kernels.compiled.vectors import (
    FEW,
    LANES,
    doubled,
    filled,
    folded,
    load,
    prefetch,
    store,
    total,
    zeros,
)


@njit(forceinline=True)
def add_deviations(x, r, start, stop, ahead, centre, work, k, vectors):
    """Adds ``x - centre`` and its square to the sums of channel ``k`` in ``work``.

    ``ahead`` is the row and the first element to be prefetched meanwhile.
    """
    wide, few = vectors
    of_lanes, sums = (wide, wide), (few, few)
    end = stop - (stop - start) % LANES
    for j in range(start, end, LANES):
        prefetch(x, ahead[0], ahead[1] + j - start, wide)
        of_lanes = maps.add_deviation(x, r, j, 0, filled(centre, wide), of_lanes, wide)
    for j in range(end, stop, FEW):
        prefetch(x, ahead[0], ahead[1] + j - start, few)
        left = min(j, stop - FEW)
        sums = maps.add_deviation(x, r, left, j - left, filled(centre, few), sums, few)
    _keep(work, k, of_lanes, sums, few)


@njit(forceinline=True)
def _keep(work, k, of_lanes, sums, few):
    """Adds the sums of a row to those of its channel."""
    whole = zeros(work, FEW)
    for place in range(2):
        row = sums[place] + folded(of_lanes[place], few)
        r = 2 * k + place
        store(work, r, 0, load(work, r, 0, whole) + doubled(row))


@njit
def totals_of(work, k):
    """The two sums of channel ``k`` in ``work``."""
    whole = zeros(work, FEW)
    return total(load(work, 2 * k, 0, whole)), total(load(work, 2 * k + 1, 0, whole))


@njit(forceinline=True)
def normalize(x, residual, y, mask, options, r, start, stop, numbers, ahead, vectors):
    """`maps.normalize` of a part of a row, which begins at a byte of the mask."""
    wide, few = vectors
    end = stop - (stop - start) % LANES
    for j in range(start, end, LANES):
        if ahead >= 0:
            prefetch(x, ahead, j, wide)
        maps.normalize(x, residual, y, mask, options, r, j, _filled3(numbers, wide), wide)
    has_residual, relu, has_mask, _ = options
    whole = stop - (stop - end) % FEW if has_mask else stop
    for j in range(end, whole, FEW):
        k = min(j, stop - FEW)
        maps.normalize(x, residual, y, mask, options, r, k, _filled3(numbers, few), few)
    if whole < stop:
        alone = has_residual, relu, False, False
        for j in range(whole, stop):
            maps.normalize(x, residual, y, mask, alone, r, j, numbers, number_like(x, 0))
        pack(y[r, whole:stop], mask[r, whole // 8 : (stop + 7) // 8])


@njit(forceinline=True)
def add_grads(arrays, options, r, start, stop, numbers, work, k, vectors):
    """`maps.add_grads` of a part of a row, to the sums of channel ``k`` in ``work``."""
    wide, few = vectors
    of_lanes, sums = (wide, wide), (few, few)
    end = stop - (stop - start) % LANES
    for j in range(start, end, LANES):
        of_lanes = maps.add_grads(arrays, options, r, j, 0, _filled4(numbers, wide), of_lanes, wide)
    gated, has_mask, streamed = options
    whole = stop - (stop - end) % FEW if has_mask else stop
    of_few = _filled4(numbers, few)
    for j in range(end, whole, FEW):
        left = min(j, stop - FEW)
        sums = maps.add_grads(arrays, options, r, left, j - left, of_few, sums, few)
    if whole < stop:
        grad, x, mask, behind_relu = arrays
        bits = mask[r, whole // 8 : (stop + 7) // 8]
        unpack(grad[r, whole:stop], bits, behind_relu[r, whole:stop])
        rest, unmasked = (behind_relu, x, mask, behind_relu), (gated, False, streamed)
        left = stop - FEW
        sums = maps.add_grads(rest, unmasked, r, left, whole - left, of_few, sums, few)
    _keep(work, k, of_lanes, sums, few)


@njit(forceinline=True)
def grad_input(arrays, result, options, r, start, stop, numbers, ahead, vectors):
    """`maps.grad_input` of a part of a row.

    With a mask, the gradient is taken through it once more: it is still cached, while what
    `add_grads` wrote behind the ReLU may have been streamed to memory.
    """
    grad, x, mask, behind_relu = arrays
    fixed, gated, has_mask, streamed = options
    wide, few = vectors
    end = stop - (stop - start) % LANES
    for j in range(start, end, LANES):
        if ahead >= 0:
            prefetch(x, ahead, j, wide)
            prefetch(grad, ahead, j, wide)
        maps.grad_input(grad, x, mask, result, options, r, j, _filled6(numbers, wide), wide)
    whole = stop - (stop - end) % FEW if has_mask else stop
    of_few = _filled6(numbers, few)
    for j in range(end, whole, FEW):
        k = min(j, stop - FEW)
        maps.grad_input(grad, x, mask, result, options, r, k, of_few, few)
    if whole < stop:
        unmasked = fixed, gated, False, streamed
        maps.grad_input(behind_relu, x, mask, result, unmasked, r, stop - FEW, of_few, few)


@njit(forceinline=True)
def _filled3(numbers, zero):
    a, b, c = numbers
    return filled(a, zero), filled(b, zero), filled(c, zero)


@njit(forceinline=True)
def _filled4(numbers, zero):
    a, b, c, d = numbers
    return filled(a, zero), filled(b, zero), filled(c, zero), filled(d, zero)


@njit(forceinline=True)
def _filled6(numbers, zero):
    a, b, c, d, e, f = numbers
    return (*_filled3((a, b, c), zero), *_filled3((d, e, f), zero))


@njit
def pack(y, bits):
    """One bit an element: whether ReLU let it through."""
    zero = number_like(y, 0)
    for k in range(bits.size):
        byte = 0
        for j in range(8 * k, min(8 * k + 8, y.size)):
            byte |= int(not widen(y[j]) <= zero) << (j - 8 * k)
        bits[k] = byte


@njit
def unpack(grad, bits, behind):
    """``behind = grad`` where the bit is set, else zero."""
    zero = behind.dtype.type(0)
    for j in range(grad.size):
        behind[j] = grad[j] if (bits[j // 8] >> (j % 8)) & 1 else zero
