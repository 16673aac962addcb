"""Channels in float64, one or `FEW` at a time: by the same functions, to the same bits.

``zero`` says how many, as in `batchnorm.kernels.compiled.vectors`: planes have a number, columns a
vector. Where channels end, it has only ``count`` numbers, and the others are undefined. Nothing
here rounds ``a * b + c`` only once, so a channel has the same bits in any vector.
"""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from batchnorm.kernels.compiled.numba_internals import llvm_function
from batchnorm.kernels.compiled.vectors import (
    REAL,
    WORD,
    Vector,
    lanes_of,
    place_of_vector,
    spread_number,
)


def size_of(zero):
    """Returns how many numbers ``zero`` has."""
    return np.size(zero)


@overload(size_of)
def _size_of(zero):
    size = zero.lanes if isinstance(zero, Vector) else 1
    return lambda zero: size


def load_few(array, row, column, count, zero):
    """Reads ``count`` numbers from ``array[row, column]`` on; the array is of a floating dtype."""
    if not isinstance(zero, np.ndarray):
        return np.float64(array[row, column])
    result = np.ones_like(zero)
    result[:count] = array[row, column : column + count]
    return result


@overload(load_few)
def _load_few(array, row, column, count, zero):
    if isinstance(zero, Vector):
        return lambda array, row, column, count, zero: _load_vector(array, row, column, count, zero)
    return lambda array, row, column, count, zero: np.float64(array[row, column])


@intrinsic
def _load_vector(context, array, row, column, count, zero):
    def code(context, builder, signature, args):
        place = place_of_vector(zero, context, builder, signature, args)
        stored = place.type.pointee
        chosen = _first_lanes(builder, zero, args[3])
        parts = [place, WORD(array.dtype.bitwidth // 8), chosen, ir.Constant(stored, None)]
        kind = ir.FunctionType(stored, [part.type for part in parts])
        name = f"llvm.masked.load.v{zero.lanes}f{array.dtype.bitwidth}.p0"
        elements = builder.call(llvm_function(builder, kind, name), parts)
        return elements if array.dtype == zero.number else builder.fpext(elements, args[4].type)

    return zero(array, row, column, count, zero), code


def store_few(array, row, column, count, value):
    """Writes what `load_few` reads, rounded to the dtype of the array."""
    if isinstance(value, np.ndarray):
        array[row, column : column + count] = value[:count]
    else:
        array[row, column] = value


@overload(store_few)
def _store_few(array, row, column, count, value):
    if isinstance(value, Vector):
        return lambda array, row, column, count, value: _store_vector(
            array, row, column, count, value
        )

    def store_number(array, row, column, count, value):
        array[row, column] = value

    return store_number


@intrinsic
def _store_vector(context, array, row, column, count, value):
    def code(context, builder, signature, args):
        place = place_of_vector(value, context, builder, signature, args)
        stored = args[4]
        if array.dtype != value.number:
            stored = builder.fptrunc(stored, place.type.pointee)
        chosen = _first_lanes(builder, value, args[3])
        parts = [stored, place, WORD(array.dtype.bitwidth // 8), chosen]
        kind = ir.FunctionType(ir.VoidType(), [part.type for part in parts])
        name = f"llvm.masked.store.v{value.lanes}f{array.dtype.bitwidth}.p0"
        builder.call(llvm_function(builder, kind, name), parts)
        return context.get_dummy_value()

    return types.void(array, row, column, count, value), code


def _first_lanes(builder, vector, count):
    """Chooses the first lanes, as many as ``count``."""
    places = ir.Constant(lanes_of(vector, WORD), [WORD(lane) for lane in range(vector.lanes)])
    ends = spread_number(builder, builder.trunc(count, WORD), vector)
    return builder.icmp_signed("<", places, ends)


def rounded_like(value, array):
    """Returns ``value`` as `load_few` will read it after `store_few` into the array."""
    return np.float64(value) if array.dtype == np.float64 else np.float64(np.float32(value))


@overload(rounded_like)
def _rounded_like(value, array):
    if array.dtype == types.float64:
        return lambda value, array: value
    if isinstance(value, Vector):
        return lambda value, array: _rounded_vector(value)
    return lambda value, array: np.float64(np.float32(value))


@intrinsic
def _rounded_vector(context, value):
    def code(context, builder, signature, args):
        rounded = builder.fptrunc(args[0], lanes_of(value, REAL[32]))
        return builder.fpext(rounded, args[0].type)

    return value(value), code


def square_root(value):
    """Returns the square root of each number, correctly rounded."""
    return np.sqrt(value)


@overload(square_root)
def _square_root(value):
    if isinstance(value, Vector):
        return lambda value: _square_root_of_vector(value)
    return lambda value: math.sqrt(value)


@intrinsic
def _square_root_of_vector(context, value):
    def code(context, builder, signature, args):
        kind = ir.FunctionType(args[0].type, [args[0].type])
        name = f"llvm.sqrt.v{value.lanes}f{value.number.bitwidth}"
        return builder.call(llvm_function(builder, kind, name), args)

    return value(value), code


def where_zero(test, value, otherwise):
    """Returns ``value`` where ``test`` is zero, else ``otherwise``."""
    return np.where(test == 0, value, otherwise)[()]


@overload(where_zero)
def _where_zero(test, value, otherwise):
    if isinstance(test, Vector):
        return lambda test, value, otherwise: _where_zero_in_vectors(test, value, otherwise)
    return lambda test, value, otherwise: value if test == 0 else otherwise


@intrinsic
def _where_zero_in_vectors(context, test, value, otherwise):
    def code(context, builder, signature, args):
        is_zero = builder.fcmp_ordered("==", args[0], ir.Constant(args[0].type, None))
        return builder.select(is_zero, args[1], args[2])

    return value(test, value, otherwise), code


def count_larger(a, b, count):
    """Returns how many of the first numbers of ``a`` are larger than those of ``b``; NaN is not."""
    return np.count_nonzero(a[:count] > b[:count]) if isinstance(a, np.ndarray) else int(a > b)


@overload(count_larger)
def _count_larger(a, b, count):
    if isinstance(a, Vector):
        return lambda a, b, count: _count_larger_in_vectors(a, b, count)
    return lambda a, b, count: int(a > b)


@intrinsic
def _count_larger_in_vectors(context, a, b, count):
    def code(context, builder, signature, args):
        larger = builder.fcmp_ordered(">", args[0], args[1])
        larger = builder.and_(larger, _first_lanes(builder, a, args[2]))
        bits = builder.bitcast(larger, ir.IntType(a.lanes))
        return builder.zext(builder.ctpop(bits), ir.IntType(64))

    return types.intp(a, b, count), code
