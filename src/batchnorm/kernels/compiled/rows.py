"""A part of a row of one channel, vector by vector.

The two sums of channel ``k`` are `FEW` numbers each, in rows ``2 * k`` and ``2 * k + 1`` of the two
arrays of `Sums`. A row is computed in steps of `LANES`, its rest in steps of `FEW`. The last step
begins further left where it would cross the end, so some elements may be computed twice, with the
same result. A row has at least `FEW` elements, but the part may begin anywhere in it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from batchnorm.kernels.compiled import maps
from batchnorm.kernels.compiled.coefficients import in_all_lanes
from batchnorm.kernels.compiled.elements import number_like, widen
from batchnorm.kernels.compiled.numba_internals import inlined, jitted
from batchnorm.kernels.compiled.streaming import prefetch
from batchnorm.kernels.compiled.vectors import (
    FEW,
    LANES,
    broadcast,
    fold_to,
    load,
    store,
    to_float64,
    total,
    zero_vector_like,
)


class Sums(NamedTuple):
    """Sums of some channels.

    Attributes:
        work: In float64.
        recent: In the dtype of the arithmetic; `flush` adds them to ``work``.
    """

    work: Any
    recent: Any


@jitted
def clear(sums, first, last):
    """Sets the sums of some channels to zero."""
    sums.work[2 * first : 2 * last, :] = 0
    sums.recent[2 * first : 2 * last, :] = 0


@jitted
def flush(sums, first, last):
    """Adds the recent sums of some channels to those in float64, and clears them."""
    work, recent = sums.work, sums.recent
    few, whole = zero_vector_like(recent, FEW), zero_vector_like(work, FEW)
    for r in range(2 * first, 2 * last):
        store(work, r, 0, load(work, r, 0, whole) + to_float64(load(recent, r, 0, few)))
        store(recent, r, 0, few)


@jitted
def totals_of(work, k):
    """Returns the two sums of channel ``k``."""
    whole = zero_vector_like(work, FEW)
    return total(load(work, 2 * k, 0, whole)), total(load(work, 2 * k + 1, 0, whole))


@inlined
def _add(recent, k, sums, few):
    """Adds the sums of a row to the recent ones."""
    for place in range(2):
        r = 2 * k + place
        store(recent, r, 0, load(recent, r, 0, few) + sums[place])


@inlined
def add_deviations(x, r, start, stop, ahead, center, recent, k, vectors):
    """Adds ``x - center`` and its square to the recent sums of channel ``k``.

    ``ahead`` is the row and the first element to prefetch.
    """
    wide, few = vectors
    sums = few, few
    end = stop - (stop - start) % LANES
    if start < end:
        of_lanes = wide, wide
        for j in range(start, end, LANES):
            prefetch(x, ahead[0], ahead[1] + j - start, wide)
            of_lanes = maps.add_deviation(x, r, j, 0, broadcast(center, wide), of_lanes, wide)
        sums = fold_to(of_lanes[0], few), fold_to(of_lanes[1], few)
    of_few, whole = broadcast(center, few), stop - (stop - end) % FEW
    for j in range(end, whole, FEW):
        sums = maps.add_deviation(x, r, j, 0, of_few, sums, few)
    if whole < stop:
        left = stop - FEW
        sums = maps.add_deviation(x, r, left, whole - left, of_few, sums, few)
    _add(recent, k, sums, few)


@inlined
def normalize(tensors, options, r, start, stop, coefficients, ahead, vectors):
    """Applies `maps.normalize` to a part of a row, which begins at a byte of the mask."""
    wide, few = vectors
    end = stop - (stop - start) % LANES
    for j in range(start, end, LANES):
        if ahead >= 0:
            prefetch(tensors.x, ahead, j, wide)
        # LLVM moves the broadcast out of the loop, but not into rows that are too short for it.
        maps.normalize(tensors, options, r, j, 0, in_all_lanes(coefficients, wide), wide)
    of_few = in_all_lanes(coefficients, few)
    whole = stop - (stop - end) % FEW
    for j in range(end, whole, FEW):
        maps.normalize(tensors, options, r, j, 0, of_few, few)
    if whole < stop:
        left = stop - FEW
        maps.normalize(tensors, options, r, left, whole - left, of_few, few)


@inlined
def add_grads(tensors, options, r, start, stop, coefficients, recent, k, vectors):
    """Adds `maps.add_grads` of a part of a row to the recent sums of channel ``k``."""
    wide, few = vectors
    sums = few, few
    end = stop - (stop - start) % LANES
    if start < end:
        sums_of_lanes, of_lanes = (wide, wide), in_all_lanes(coefficients, wide)
        for j in range(start, end, LANES):
            sums_of_lanes = maps.add_grads(tensors, options, r, j, 0, of_lanes, sums_of_lanes, wide)
        sums = fold_to(sums_of_lanes[0], few), fold_to(sums_of_lanes[1], few)
    of_few = in_all_lanes(coefficients, few)
    whole = stop - (stop - end) % FEW
    for j in range(end, whole, FEW):
        sums = maps.add_grads(tensors, options, r, j, 0, of_few, sums, few)
    if whole < stop:
        left = stop - FEW
        sums = maps.add_grads(tensors, options, r, left, whole - left, of_few, sums, few)
    _add(recent, k, sums, few)


@inlined
def grad_input(tensors, options, r, start, stop, coefficients, ahead, vectors):
    """Applies `maps.grad_input` to a part of a row.

    With a mask, the gradient passes it once more: ``grad`` is still cached, while the result of
    `add_grads` may have been streamed to memory.
    """
    wide, few = vectors
    end = stop - (stop - start) % LANES
    for j in range(start, end, LANES):
        if ahead >= 0:
            prefetch(tensors.x, ahead, j, wide)
            prefetch(tensors.grad, ahead, j, wide)
        maps.grad_input(tensors, options, r, j, in_all_lanes(coefficients, wide), wide)
    of_few = in_all_lanes(coefficients, few)
    for j in range(end, stop, FEW):
        left = min(j, stop - FEW)
        maps.grad_input(tensors, options, r, left, of_few, few)


@jitted
def store_passes(y, bits):
    """Writes one bit an element: set where ReLU passed it. For rows narrower than `FEW`."""
    zero = number_like(y, 0)
    for k in range(bits.size):
        byte = 0
        for j in range(8 * k, min(8 * k + 8, y.size)):
            byte |= int(not widen(y[j]) <= zero) << (j - 8 * k)
        bits[k] = byte


@jitted
def where_passed(grad, bits, result):
    """Writes ``grad`` where the bit is set, else zero. For rows narrower than `FEW`."""
    zero = result.dtype.type(0)
    for j in range(grad.size):
        result[j] = grad[j] if (bits[j // 8] >> (j % 8)) & 1 else zero
