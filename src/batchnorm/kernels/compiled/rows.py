"""A row of one channel, from one vector to the next.

The two sums of channel ``k`` are `FEW` numbers each, in rows ``2 * k`` and ``2 * k + 1`` of two
arrays: ``recent``, in the precision of the elements, from which `keep` adds them to ``work``, in
float64. A row is gone through by `LANES`, what is left by `FEW`. The last few begin further left
where they would stand out on the right, so some elements may be done twice, with the same result. A
row has at least `FEW` elements, but may be called for from anywhere in it.
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


@njit
def clear(sums, first, last):
    """Sets the sums of some channels to zero."""
    work, recent = sums
    work[2 * first : 2 * last, :] = 0
    recent[2 * first : 2 * last, :] = 0


@njit
def keep(sums, first, last):
    """Adds the recent sums of some channels to their sums in float64, and clears them."""
    work, recent = sums
    few, whole = zeros(recent, FEW), zeros(work, FEW)
    for r in range(2 * first, 2 * last):
        store(work, r, 0, load(work, r, 0, whole) + doubled(load(recent, r, 0, few)))
        store(recent, r, 0, few)


@njit
def totals_of(work, k):
    """The two sums of channel ``k``."""
    whole = zeros(work, FEW)
    return total(load(work, 2 * k, 0, whole)), total(load(work, 2 * k + 1, 0, whole))


@njit(forceinline=True)
def _add(recent, k, sums, few):
    """Adds the sums of a row to the recent ones."""
    for place in range(2):
        r = 2 * k + place
        store(recent, r, 0, load(recent, r, 0, few) + sums[place])


@njit(forceinline=True)
def add_deviations(x, r, start, stop, ahead, centre, recent, k, vectors):
    """Adds ``x - centre`` and its square to the recent sums of channel ``k``.

    ``ahead`` is the row and the first element to be prefetched meanwhile.
    """
    wide, few = vectors
    sums = few, few
    end = stop - (stop - start) % LANES
    if start < end:
        of_lanes = wide, wide
        for j in range(start, end, LANES):
            prefetch(x, ahead[0], ahead[1] + j - start, wide)
            of_lanes = maps.add_deviation(x, r, j, 0, filled(centre, wide), of_lanes, wide)
        sums = folded(of_lanes[0], few), folded(of_lanes[1], few)
    of_few, whole = filled(centre, few), stop - (stop - end) % FEW
    for j in range(end, whole, FEW):
        sums = maps.add_deviation(x, r, j, 0, of_few, sums, few)
    if whole < stop:
        left = stop - FEW
        sums = maps.add_deviation(x, r, left, whole - left, of_few, sums, few)
    _add(recent, k, sums, few)


@njit(forceinline=True)
def normalize(x, residual, y, mask, options, r, start, stop, numbers, ahead, vectors):
    """`maps.normalize` of a part of a row, which begins at a byte of the mask."""
    wide, few = vectors
    end = stop - (stop - start) % LANES
    for j in range(start, end, LANES):
        if ahead >= 0:
            prefetch(x, ahead, j, wide)
        maps.normalize(x, residual, y, mask, options, r, j, 0, _filled3(numbers, wide), wide)
    of_few = _filled3(numbers, few)
    whole = stop - (stop - end) % FEW
    for j in range(end, whole, FEW):
        maps.normalize(x, residual, y, mask, options, r, j, 0, of_few, few)
    if whole < stop:
        left = stop - FEW
        maps.normalize(x, residual, y, mask, options, r, left, whole - left, of_few, few)


@njit(forceinline=True)
def add_grads(grad, x, mask, behind_relu, options, r, start, stop, numbers, recent, k, vectors):
    """`maps.add_grads` of a part of a row, to the recent sums of channel ``k``."""
    wide, few = vectors
    sums = few, few
    end = stop - (stop - start) % LANES
    if start < end:
        of_lanes, of_wide = (wide, wide), _filled4(numbers, wide)
        for j in range(start, end, LANES):
            of_lanes = maps.add_grads(
                grad, x, mask, behind_relu, options, r, j, 0, of_wide, of_lanes, wide
            )
        sums = folded(of_lanes[0], few), folded(of_lanes[1], few)
    of_few = _filled4(numbers, few)
    whole = stop - (stop - end) % FEW
    for j in range(end, whole, FEW):
        sums = maps.add_grads(grad, x, mask, behind_relu, options, r, j, 0, of_few, sums, few)
    if whole < stop:
        left = stop - FEW
        sums = maps.add_grads(
            grad, x, mask, behind_relu, options, r, left, whole - left, of_few, sums, few
        )
    _add(recent, k, sums, few)


@njit(forceinline=True)
def grad_input(grad, x, mask, result, options, r, start, stop, numbers, ahead, vectors):
    """`maps.grad_input` of a part of a row.

    With a mask, the gradient is taken through it once more: it is still cached, while what
    `add_grads` wrote behind the ReLU may have been streamed to memory.
    """
    wide, few = vectors
    end = stop - (stop - start) % LANES
    for j in range(start, end, LANES):
        if ahead >= 0:
            prefetch(x, ahead, j, wide)
            prefetch(grad, ahead, j, wide)
        maps.grad_input(grad, x, mask, result, options, r, j, _filled6(numbers, wide), wide)
    of_few = _filled6(numbers, few)
    for j in range(end, stop, FEW):
        left = min(j, stop - FEW)
        maps.grad_input(grad, x, mask, result, options, r, left, of_few, few)


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
