"""Vectors of numbers: neighboring elements of one row of an array, in registers.

The kernels leave their sums and coefficients in registers from row to row, which no compiler finds
out by itself. `load` makes a vector, ``+ - *`` compute with it, and `store` rounds it back. A
vector has `LANES` numbers, which fill several registers, so that sums do not wait for one another;
or `FEW` numbers, for the rest of a row. Every function also takes single numbers, for matrices
narrower than a vector: the type of a kernel's ``zero`` decides which of the two it works with.

When Numba's JIT is disabled, a vector is a NumPy array.
"""

from __future__ import annotations

import functools
import operator

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, overload, register_model

from batchnorm.kernels.compiled.elements import narrow, widen
from batchnorm.kernels.compiled.numba_internals import llvm_function, pointer_to_element

# Numbers of a vector: of float32, 64 fill four registers of AVX-512, and 16 fill one.
# docs/decisions/0007: vectors
LANES, FEW = 64, 16
# Bytes of a cache line.
CACHE_LINE = 64
REAL = {32: ir.FloatType(), 64: ir.DoubleType()}
WORD = ir.IntType(32)


class Vector(types.Type):
    """Numba's type of a vector: ``lanes`` numbers of a floating type."""

    def __init__(self, number: types.Float, lanes: int) -> None:
        self.number = number
        self.lanes = lanes
        super().__init__(f"Vector({number}, {lanes})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        super().__init__(manager, vector, lanes_of(vector, REAL[vector.number.bitwidth]))


def lanes_of(vector, kind):
    """Returns LLVM's type of as many numbers of ``kind`` as the vector has."""
    return ir.VectorType(kind, vector.lanes)


def _repeated(vector, kind, value):
    return ir.Constant(lanes_of(vector, kind), [ir.Constant(kind, value)] * vector.lanes)


def _place(vector, context, builder, signature, args):
    """Pointer to the vector that begins at ``array[row, column]``."""
    place = pointer_to_element(context, builder, signature, args)
    return builder.bitcast(place, lanes_of(vector, place.type.pointee).as_pointer())


def zero_vector_like(array, lanes):
    """Returns a vector of zeros, in the dtype of the arithmetic on elements of ``array``.

    ``lanes`` must be the global `LANES` or `FEW`: Numba has to know it when it compiles.
    """
    return np.zeros(lanes, np.float64 if array.dtype == np.float64 else np.float32)


@overload(zero_vector_like, prefer_literal=True)
def _zero_vector_like(array, lanes):
    number = types.float64 if array.dtype == types.float64 else types.float32
    vector = Vector(number, lanes.literal_value)

    @intrinsic
    def zero(context):
        kind = lanes_of(vector, REAL[number.bitwidth])
        return vector(), lambda *_: ir.Constant(kind, None)

    return lambda array, lanes: zero()


def broadcast(value, zero):
    """Returns a vector like ``zero`` with ``value`` in every lane."""
    return np.full_like(zero, value)


@overload(broadcast)
def _broadcast(value, zero):
    return lambda value, zero: _broadcast_vector(value, zero)


@intrinsic
def _broadcast_vector(context, value, zero):
    def code(context, builder, signature, args):
        return _spread(builder, args[0], zero)

    return zero(zero.number, zero), code


def _spread(builder, number, vector):
    first = builder.insert_element(
        ir.Constant(lanes_of(vector, number.type), None), number, WORD(0)
    )
    return builder.shuffle_vector(first, first, ir.Constant(lanes_of(vector, WORD), None))


def fold_to(wide, few):
    """Folds a wide vector to the width of ``few``, adding lanes that are ``len(few)`` apart."""
    return wide.reshape(-1, len(few)).sum(0)


@overload(fold_to)
def _fold_to(wide, few):
    return lambda wide, few: _fold_vector(wide, few)


@intrinsic
def _fold_vector(context, wide, few):
    def code(context, builder, signature, args):
        parts = []
        for start in range(0, wide.lanes, few.lanes):
            places = [WORD(start + lane) for lane in range(few.lanes)]
            places = ir.Constant(lanes_of(few, WORD), places)
            parts.append(builder.shuffle_vector(args[0], args[0], places))
        return functools.reduce(builder.fadd, parts)

    return few(wide, few), code


def to_float64(vector):
    """Returns the same numbers in float64."""
    return vector.astype(np.float64)


@overload(to_float64)
def _to_float64(vector):
    if vector.number == types.float64:
        return lambda vector: vector
    return lambda vector: _vector_to_float64(vector)


@intrinsic
def _vector_to_float64(context, vector):
    double = Vector(types.float64, vector.lanes)

    def code(context, builder, signature, args):
        return builder.fpext(args[0], lanes_of(double, REAL[64]))

    return double(vector), code


def total(vector):
    """Returns the sum of the numbers of a vector, in float64."""
    return float(np.sum(vector, dtype=np.float64))


@overload(total)
def _total(vector):
    return lambda vector: _total_of_vector(vector)


@intrinsic
def _total_of_vector(context, vector):
    def code(context, builder, signature, args):
        double = REAL[64]
        numbers = args[0]
        if vector.number.bitwidth == 32:
            numbers = builder.fpext(numbers, lanes_of(vector, double))
        kind = ir.FunctionType(double, [double, numbers.type])
        name = f"llvm.vector.reduce.fadd.v{vector.lanes}f64"
        return builder.call(
            llvm_function(builder, kind, name), [double(-0.0), numbers], fastmath=("reassoc",)
        )

    return types.float64(vector), code


def load(array, row, column, zero):
    """Reads ``array[row, column]`` and, if ``zero`` is a vector, the elements to its right."""
    if not isinstance(zero, np.ndarray):
        return widen(array[row, column])
    elements = array[row, column : column + len(zero)]
    if array.dtype == np.uint16:
        return (elements.astype(np.uint32) << 16).view(np.float32)
    return elements.view(np.float16).astype(np.float32) if array.dtype == np.int16 else elements


@overload(load)
def _load(array, row, column, zero):
    if isinstance(zero, Vector):
        return lambda array, row, column, zero: _load_vector(array, row, column, zero)
    return lambda array, row, column, zero: widen(array[row, column])


@intrinsic
def _load_vector(context, array, row, column, zero):
    element = array.dtype

    def code(context, builder, signature, args):
        place = _place(zero, context, builder, signature, args)
        return _widened(builder, zero, builder.load(place, align=element.bitwidth // 8), element)

    return zero(array, row, column, zero), code


def store(array, row, column, value, streamed=False):
    """Writes the place that `load` reads, rounding to the nearest element.

    If ``streamed``, it writes past the caches; then the address must be a multiple of `CACHE_LINE`.
    """
    if isinstance(value, np.ndarray):
        array[row, column : column + len(value)] = [narrow(number, array) for number in value]
    else:
        array[row, column] = narrow(value, array)


@overload(store)
def _store(array, row, column, value, streamed=False):
    if isinstance(value, Vector):
        return _store_either_way

    def store_number(array, row, column, value, streamed=False):
        array[row, column] = narrow(value, array)

    return store_number


def _store_either_way(array, row, column, value, streamed=False):
    if streamed:
        _stream_vector(array, row, column, value)
    else:
        _store_vector(array, row, column, value)


@intrinsic
def _store_vector(context, array, row, column, value):
    def code(context, builder, signature, args):
        place = _place(value, context, builder, signature, args)
        elements = _narrowed(builder, value, args[3], array.dtype)
        builder.store(elements, place, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, row, column, value), code


@intrinsic
def _stream_vector(context, array, row, column, value):
    def code(context, builder, signature, args):
        place = _place(value, context, builder, signature, args)
        elements = _narrowed(builder, value, args[3], array.dtype)
        align = min(CACHE_LINE, value.lanes * array.dtype.bitwidth // 8)
        written = builder.store(elements, place, align=align)
        written.set_metadata("nontemporal", builder.module.add_metadata([WORD(1)]))
        return context.get_dummy_value()

    return types.void(array, row, column, value), code


def rounded(value, like):
    """Returns ``value`` as `load` will read it after `store` into the array ``like``."""
    if isinstance(value, np.ndarray):
        return np.array([widen(narrow(number, like)) for number in value])
    return widen(narrow(value, like))


@overload(rounded)
def _rounded(value, like):
    if not isinstance(value, Vector):
        return lambda value, like: widen(narrow(value, like))
    if isinstance(like.dtype, types.Float):
        return lambda value, like: value
    return lambda value, like: _rounded_vector(value, like)


@intrinsic
def _rounded_vector(context, value, like):
    def code(context, builder, signature, args):
        stored = _narrowed(builder, value, args[0], like.dtype)
        return _widened(builder, value, stored, like.dtype)

    return value(value, like), code


def _widened(builder, vector, elements, dtype):
    if dtype == types.int16:
        halves = builder.bitcast(elements, lanes_of(vector, ir.HalfType()))
        return builder.fpext(halves, lanes_of(vector, REAL[32]))
    if dtype != types.uint16:
        return elements
    words = builder.zext(elements, lanes_of(vector, WORD))
    bits = builder.shl(words, _repeated(vector, WORD, 16))
    return builder.bitcast(bits, lanes_of(vector, REAL[32]))


def _narrowed(builder, vector, value, dtype):
    if dtype == types.int16:
        halves = builder.fptrunc(value, lanes_of(vector, ir.HalfType()))
        return builder.bitcast(halves, lanes_of(vector, ir.IntType(16)))
    if dtype != types.uint16:
        return value
    every = functools.partial(_repeated, vector, WORD)
    bits = builder.bitcast(value, lanes_of(vector, WORD))
    odd = builder.and_(builder.lshr(bits, every(16)), every(1))
    nearest = builder.add(builder.add(bits, every(0x7FFF)), odd)
    is_nan = builder.fcmp_unordered("uno", value, value)
    chosen = builder.select(is_nan, every(0x7FC00000), nearest)
    return builder.trunc(builder.lshr(chosen, every(16)), lanes_of(vector, ir.IntType(16)))


def multiply_add(a, b, c):
    """Returns ``a * b + c``, rounded once where the processor can."""
    return a * b + c


@overload(multiply_add)
def _multiply_add(a, b, c):
    if isinstance(a, Vector):
        return lambda a, b, c: _multiply_add_vectors(a, b, c)
    return lambda a, b, c: a * b + c


@intrinsic
def _multiply_add_vectors(context, a, b, c):
    def code(context, builder, signature, args):
        kind = ir.FunctionType(args[0].type, [args[0].type] * 3)
        name = f"llvm.fmuladd.v{a.lanes}f{a.number.bitwidth}"
        return builder.call(llvm_function(builder, kind, name), args)

    return a(a, b, c), code


def _overload_arithmetic(function, instruction):
    @intrinsic
    def vectors(context, a, b):
        def code(context, builder, signature, args):
            return getattr(builder, instruction)(*args)

        return a(a, b), code

    @overload(function)
    def arithmetic(a, b):
        if isinstance(a, Vector) and a == b:
            return lambda a, b: vectors(a, b)
        return None


_overload_arithmetic(operator.add, "fadd")
_overload_arithmetic(operator.sub, "fsub")
_overload_arithmetic(operator.mul, "fmul")
