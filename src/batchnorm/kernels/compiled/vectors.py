"""Vectors of `LANES` numbers: neighbouring columns of one row, held in registers.

The kernels of columns keep their sums and coefficients in registers while they go down the rows,
which no compiler finds out by itself. A vector is made by `load`, takes ``+ - *``, and is rounded
back by `store`. Every function also takes single numbers, for matrices narrower than a vector:
what a kernel works with is decided by the type of its ``zero``.

When Numba's JIT is disabled, a vector is a NumPy array.
"""

from __future__ import annotations

import operator

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, overload, register_model

from batchnorm.kernels.compiled.elements import narrow, widen

LANES = 64
# Bytes of a cache line.
LINE = 64
REAL = {32: ir.FloatType(), 64: ir.DoubleType()}
WORD = ir.IntType(32)


class Vector(types.Type):
    """`LANES` numbers of a floating type."""

    def __init__(self, number: types.Float) -> None:
        self.number = number
        super().__init__(f"Vector({number})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        super().__init__(manager, vector, lanes_of(REAL[vector.number.bitwidth]))


def lanes_of(kind):
    """LLVM's type of a vector."""
    return ir.VectorType(kind, LANES)


def _all(kind, value):
    return ir.Constant(lanes_of(kind), [ir.Constant(kind, value)] * LANES)


def element_at(context, builder, signature, args):
    """Pointer to ``array[row, column]``, the first three arguments."""
    array_type = signature.args[0]
    array = context.make_array(array_type)(context, builder, args[0])
    return cgutils.get_item_pointer(context, builder, array_type, array, args[1:3], False)


def _place(context, builder, signature, args):
    """Pointer to the vector that begins at ``array[row, column]``."""
    place = element_at(context, builder, signature, args)
    return builder.bitcast(place, lanes_of(place.type.pointee).as_pointer())


def zeros(array):
    """A vector of zeros, of the numbers in which the elements of ``array`` are computed."""
    return np.zeros(LANES, np.float64 if array.dtype == np.float64 else np.float32)


@overload(zeros)
def _zeros(array):
    number = types.float64 if array.dtype == types.float64 else types.float32

    @intrinsic
    def zero(context):
        kind = lanes_of(REAL[number.bitwidth])
        return Vector(number)(), lambda *_: ir.Constant(kind, None)

    return lambda array: zero()


def load(array, row, column, zero):
    """What stands at ``array[row, column]`` and, if ``zero`` is a vector, right of it."""
    if not isinstance(zero, np.ndarray):
        return widen(array[row, column])
    elements = array[row, column : column + LANES]
    if array.dtype == np.uint16:
        return (elements.astype(np.uint32) << 16).view(np.float32)
    return elements.view(np.float16).astype(np.float32) if array.dtype == np.int16 else elements


@overload(load)
def _load(array, row, column, zero):
    if isinstance(zero, Vector):
        return lambda array, row, column, zero: _load_vector(array, row, column)
    return lambda array, row, column, zero: widen(array[row, column])


@intrinsic
def _load_vector(context, array, row, column):
    element = array.dtype
    number = element if isinstance(element, types.Float) else types.float32

    def code(context, builder, signature, args):
        place = _place(context, builder, signature, args)
        return _widened(builder, builder.load(place, align=element.bitwidth // 8), element)

    return Vector(number)(array, row, column), code


def store(array, row, column, value, streamed=False):
    """Writes what `load` reads, rounded to the nearest element.

    If ``streamed``, past the caches: then the place must be a multiple of `LINE` bytes.
    """
    if isinstance(value, np.ndarray):
        array[row, column : column + LANES] = [narrow(number, array) for number in value]
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
        place = _place(context, builder, signature, args)
        elements = _narrowed(builder, args[3], array.dtype)
        builder.store(elements, place, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, row, column, value), code


@intrinsic
def _stream_vector(context, array, row, column, value):
    def code(context, builder, signature, args):
        place = _place(context, builder, signature, args)
        written = builder.store(_narrowed(builder, args[3], array.dtype), place, align=LINE)
        written.set_metadata("nontemporal", builder.module.add_metadata([WORD(1)]))
        return context.get_dummy_value()

    return types.void(array, row, column, value), code


def finish_streams():
    """Makes streamed stores visible to the other threads."""


@overload(finish_streams)
def _finish_streams():
    return lambda: _fence()


@intrinsic
def _fence(context):
    def code(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), code


def rounded(value, like):
    """``value``, as it will be read once it is stored in the array ``like``."""
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
        return _widened(builder, _narrowed(builder, args[0], like.dtype), like.dtype)

    return value(value, like), code


def _widened(builder, elements, dtype):
    if dtype == types.int16:
        return builder.fpext(builder.bitcast(elements, lanes_of(ir.HalfType())), lanes_of(REAL[32]))
    if dtype != types.uint16:
        return elements
    bits = builder.shl(builder.zext(elements, lanes_of(WORD)), _all(WORD, 16))
    return builder.bitcast(bits, lanes_of(REAL[32]))


def _narrowed(builder, value, dtype):
    if dtype == types.int16:
        halves = builder.fptrunc(value, lanes_of(ir.HalfType()))
        return builder.bitcast(halves, lanes_of(ir.IntType(16)))
    if dtype != types.uint16:
        return value
    bits = builder.bitcast(value, lanes_of(WORD))
    odd = builder.and_(builder.lshr(bits, _all(WORD, 16)), _all(WORD, 1))
    nearest = builder.add(builder.add(bits, _all(WORD, 0x7FFF)), odd)
    is_nan = builder.fcmp_unordered("uno", value, value)
    chosen = builder.select(is_nan, _all(WORD, 0x7FC00000), nearest)
    return builder.trunc(builder.lshr(chosen, _all(WORD, 16)), lanes_of(ir.IntType(16)))


def fused(a, b, c):
    """``a * b + c``, rounded once where the processor can."""
    return a * b + c


@overload(fused)
def _fused(a, b, c):
    if isinstance(a, Vector):
        return lambda a, b, c: _fused_vectors(a, b, c)
    return lambda a, b, c: a * b + c


@intrinsic
def _fused_vectors(context, a, b, c):
    def code(context, builder, signature, args):
        kind = ir.FunctionType(args[0].type, [args[0].type] * 3)
        name = f"llvm.fmuladd.v{LANES}f{a.number.bitwidth}"
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)

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
