"""Vectors in which some numbers are replaced by zero: ReLU, its mask, and overlapping vectors.

Like everything in `batchnorm.kernels.compiled.vectors`, these functions also take single numbers.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from batchnorm.kernels.compiled.numba_internals import pointer_to_element
from batchnorm.kernels.compiled.vectors import WORD, Vector, lanes_of


def zero_first(skip, value, zero):
    """Replaces the first ``skip`` numbers of ``value`` by zero."""
    return np.where(np.arange(len(zero)) < skip, zero, value) if skip else value


@overload(zero_first)
def _zero_first(skip, value, zero):
    if isinstance(value, Vector):
        return lambda skip, value, zero: _zero_first_of_vector(np.int32(skip), value, zero)
    return lambda skip, value, zero: value


@intrinsic
def _zero_first_of_vector(context, skip, value, zero):
    def code(context, builder, signature, args):
        numbers = lanes_of(value, WORD)
        lane = builder.insert_element(ir.Constant(numbers, None), args[0], WORD(0))
        skips = builder.shuffle_vector(lane, lane, ir.Constant(numbers, None))
        places = ir.Constant(numbers, [WORD(lane) for lane in range(value.lanes)])
        return builder.select(builder.icmp_signed("<", places, skips), args[2], args[1])

    return value(skip, value, zero), code


def store_passes(mask, row, column, skip, y, zero):
    """Writes one bit a number: set where ReLU passes it.

    It leaves out the first ``skip`` numbers. The number after them begins a byte.
    """
    passes = np.packbits(~(y <= zero)[skip:], bitorder="little")
    byte = (column + skip) // 8
    mask[row, byte : byte + len(passes)] = passes


@overload(store_passes)
def _store_passes(mask, row, column, skip, y, zero):
    if not isinstance(y, Vector):
        return lambda mask, row, column, skip, y, zero: None
    lanes = y.lanes

    def store(mask, row, column, skip, y, zero):
        if skip == 0:
            _store_bits(mask, row, column // 8, _passes(y, zero))
            return
        bits, byte = np.uint64(_passes(y, zero)) >> np.uint64(skip), (column + skip) // 8
        for k in range((lanes - skip + 7) // 8):
            mask[row, byte + k] = np.uint8(bits >> np.uint64(8 * k))

    return store


@intrinsic
def _passes(context, y, zero):
    def code(context, builder, signature, args):
        passes = builder.fcmp_unordered(">", args[0], args[1])
        return builder.bitcast(passes, ir.IntType(y.lanes))

    return types.Integer.from_bitwidth(y.lanes, signed=False)(y, zero), code


@intrinsic
def _store_bits(context, mask, row, byte, bits):
    def code(context, builder, signature, args):
        place = pointer_to_element(context, builder, signature, args)
        builder.store(args[3], builder.bitcast(place, args[3].type.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(mask, row, byte, bits), code


def where_passed(mask, row, column, value, zero):
    """Returns ``value`` where `store_passes` has set the bit, else zero."""
    bits = np.unpackbits(mask[row], bitorder="little")[column : column + len(value)]
    return np.where(bits, value, zero)


@overload(where_passed)
def _where_passed(mask, row, column, value, zero):
    if not isinstance(value, Vector):
        return lambda mask, row, column, value, zero: value
    bits_of_vector = types.Integer.from_bitwidth(value.lanes, signed=False)
    lanes = value.lanes

    def where(mask, row, column, value, zero):
        first, shift = column // 8, column % 8
        if shift == 0:
            return _where_bits(_load_bits(mask, row, first, value), value, zero)
        bits = np.uint64(0)
        for byte in range(first, (column + lanes - 1) // 8 + 1):
            bits |= np.uint64(mask[row, byte]) << np.uint64(8 * (byte - first))
        return _where_bits(bits_of_vector(bits >> np.uint64(shift)), value, zero)

    return where


@intrinsic
def _load_bits(context, mask, row, byte, value):
    def code(context, builder, signature, args):
        bits = ir.IntType(value.lanes)
        place = pointer_to_element(context, builder, signature, args)
        return builder.load(builder.bitcast(place, bits.as_pointer()), align=1)

    bits = types.Integer.from_bitwidth(value.lanes, signed=False)
    return bits(mask, row, byte, value), code


@intrinsic
def _where_bits(context, bits, value, zero):
    def code(context, builder, signature, args):
        passes = builder.bitcast(args[0], lanes_of(value, ir.IntType(1)))
        return builder.select(passes, args[1], args[2])

    return value(bits, value, zero), code


def where_positive(y, value, zero):
    """Returns ``value`` where ``y`` is positive or NaN, else zero: ReLU, and its gradient."""
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
