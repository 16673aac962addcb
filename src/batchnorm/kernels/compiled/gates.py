"""Vectors of which some numbers are replaced by zero: ReLU, its mask, and columns done before.

Like everything in `batchnorm.kernels.compiled.vectors`, these functions also take single numbers.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from batchnorm.kernels.compiled.vectors import WORD, Vector, element_at, lanes_of


def beyond(skip, value, zero):
    """``value`` with its first ``skip`` numbers replaced by zero."""
    return np.where(np.arange(len(zero)) < skip, zero, value) if skip else value


@overload(beyond)
def _beyond(skip, value, zero):
    if isinstance(value, Vector):
        return lambda skip, value, zero: _beyond_vector(np.int32(skip), value, zero)
    return lambda skip, value, zero: value


@intrinsic
def _beyond_vector(context, skip, value, zero):
    def code(context, builder, signature, args):
        numbers = lanes_of(value, WORD)
        lane = builder.insert_element(ir.Constant(numbers, None), args[0], WORD(0))
        skips = builder.shuffle_vector(lane, lane, ir.Constant(numbers, None))
        places = ir.Constant(numbers, [WORD(lane) for lane in range(value.lanes)])
        return builder.select(builder.icmp_signed("<", places, skips), args[2], args[1])

    return value(skip, value, zero), code


def store_passes(mask, row, column, y, zero):
    """Writes one bit a number: whether ReLU lets it through. ``column`` is a multiple of eight."""
    passes = np.packbits(~(y <= zero), bitorder="little")
    mask[row, column // 8 : column // 8 + len(y) // 8] = passes


@overload(store_passes)
def _store_passes(mask, row, column, y, zero):
    if isinstance(y, Vector):
        return lambda mask, row, column, y, zero: _store_bits(mask, row, column // 8, y, zero)
    return lambda mask, row, column, y, zero: None


@intrinsic
def _store_bits(context, mask, row, byte, y, zero):
    def code(context, builder, signature, args):
        passes = builder.fcmp_unordered(">", args[3], args[4])
        bits = builder.bitcast(passes, ir.IntType(y.lanes))
        place = element_at(context, builder, signature, args)
        builder.store(bits, builder.bitcast(place, bits.type.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(mask, row, byte, y, zero), code


def where_passed(mask, row, column, value, zero):
    """``value`` where `store_passes` has set the bit, else zero."""
    bits = mask[row, column // 8 : column // 8 + len(value) // 8]
    return np.where(np.unpackbits(bits, bitorder="little"), value, zero)


@overload(where_passed)
def _where_passed(mask, row, column, value, zero):
    if isinstance(value, Vector):
        return lambda mask, row, column, value, zero: _where_bits(
            mask, row, column // 8, value, zero
        )
    return lambda mask, row, column, value, zero: value


@intrinsic
def _where_bits(context, mask, row, byte, value, zero):
    def code(context, builder, signature, args):
        bits = ir.IntType(value.lanes)
        place = element_at(context, builder, signature, args)
        loaded = builder.load(builder.bitcast(place, bits.as_pointer()), align=1)
        passes = builder.bitcast(loaded, lanes_of(value, ir.IntType(1)))
        return builder.select(passes, args[3], args[4])

    return value(mask, row, byte, value, zero), code


def where_positive(y, value, zero):
    """``value`` where ``y`` is positive or NaN, else zero: ReLU, and its gradient."""
    return np.where(y <= zero, zero, value) if isinstance(y, np.ndarray) else _gated(y, value, zero)


def _gated(y, value, zero):
    return zero if y <= zero else value


@overload(where_positive)
def _where_positive(y, value, zero):
    if isinstance(y, Vector):
        return lambda y, value, zero: _where_positive_vectors(y, value, zero)
    return _gated


@intrinsic
def _where_positive_vectors(context, y, value, zero):
    def code(context, builder, signature, args):
        return builder.select(builder.fcmp_ordered("<=", args[0], args[2]), args[2], args[1])

    return value(y, value, zero), code
