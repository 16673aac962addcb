"""Vectors of numbers: neighbouring elements of one row of an array, held in registers.

The kernels keep their sums and coefficients in registers while they go through the rows, which no
compiler finds out by itself. A vector is made by `load`, takes ``+ - *``, and is rounded back by
`store`. It has `LANES` numbers, several registers full, so that sums do not wait for one another;
or `FEW` for what is left of a row. Every function also takes single numbers, for matrices narrower
than a vector: what a kernel works with is decided by the type of its ``zero``.

When Numba's JIT is disabled, a vector is a NumPy array.
"""

from __future__ import annotations

import functools
import operator

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, overload, register_model

from batchnorm.kernels.compiled.elements import narrow, widen

LANES, FEW = 64, 16
# Bytes of a cache line.
LINE = 64
# Bytes of an array from which on results are written past the caches, because the next layer would
# not find them there anyway: sooner in training, where they would take the place of what is read
# twice.
STREAMED, STREAMED_ALONE = 1 << 22, 1 << 24
REAL = {32: ir.FloatType(), 64: ir.DoubleType()}
WORD = ir.IntType(32)


class Vector(types.Type):
    """Some numbers of a floating type."""

    def __init__(self, number: types.Float, lanes: int) -> None:
        self.number = number
        self.lanes = lanes
        super().__init__(f"Vector({number}, {lanes})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        super().__init__(manager, vector, lanes_of(vector, REAL[vector.number.bitwidth]))


def lanes_of(vector, kind):
    """LLVM's type of as many numbers of ``kind`` as the vector has."""
    return ir.VectorType(kind, vector.lanes)


def _all(vector, kind, value):
    return ir.Constant(lanes_of(vector, kind), [ir.Constant(kind, value)] * vector.lanes)


def element_at(context, builder, signature, args):
    """Pointer to ``array[row, column]``, the first three arguments."""
    array_type = signature.args[0]
    array = context.make_array(array_type)(context, builder, args[0])
    return cgutils.get_item_pointer(context, builder, array_type, array, args[1:3], False)


def _place(vector, context, builder, signature, args):
    """Pointer to the vector that begins at ``array[row, column]``."""
    place = element_at(context, builder, signature, args)
    return builder.bitcast(place, lanes_of(vector, place.type.pointee).as_pointer())


def zeros(array, lanes):
    """Zeros, of the numbers in which the elements of ``array`` are computed.

    ``lanes`` is `LANES` or `FEW`, by its name.
    """
    return np.zeros(lanes, np.float64 if array.dtype == np.float64 else np.float32)


@overload(zeros, prefer_literal=True)
def _zeros(array, lanes):
    number = types.float64 if array.dtype == types.float64 else types.float32
    vector = Vector(number, lanes.literal_value)

    @intrinsic
    def zero(context):
        kind = lanes_of(vector, REAL[number.bitwidth])
        return vector(), lambda *_: ir.Constant(kind, None)

    return lambda array, lanes: zero()


def filled(value, zero):
    """``value`` in every place of a vector like ``zero``."""
    return np.full_like(zero, value)


@overload(filled)
def _filled(value, zero):
    return lambda value, zero: _filled_vector(value, zero)


@intrinsic
def _filled_vector(context, value, zero):
    def code(context, builder, signature, args):
        return _spread(builder, args[0], zero)

    return zero(zero.number, zero), code


def _spread(builder, number, vector):
    first = builder.insert_element(
        ir.Constant(lanes_of(vector, number.type), None), number, WORD(0)
    )
    return builder.shuffle_vector(first, first, ir.Constant(lanes_of(vector, WORD), None))


def folded(wide, few):
    """Sums of the numbers of a vector, as many as ``few`` has: each of every so manieth number."""
    return wide.reshape(-1, len(few)).sum(0)


@overload(folded)
def _folded(wide, few):
    return lambda wide, few: _folded_vector(wide, few)


@intrinsic
def _folded_vector(context, wide, few):
    def code(context, builder, signature, args):
        parts = []
        for start in range(0, wide.lanes, few.lanes):
            places = [WORD(start + lane) for lane in range(few.lanes)]
            places = ir.Constant(lanes_of(few, WORD), places)
            parts.append(builder.shuffle_vector(args[0], args[0], places))
        return functools.reduce(builder.fadd, parts)

    return few(wide, few), code


def doubled(vector):
    """The same numbers in float64."""
    return vector.astype(np.float64)


@overload(doubled)
def _doubled(vector):
    if vector.number == types.float64:
        return lambda vector: vector
    return lambda vector: _doubled_vector(vector)


@intrinsic
def _doubled_vector(context, vector):
    double = Vector(types.float64, vector.lanes)

    def code(context, builder, signature, args):
        return builder.fpext(args[0], lanes_of(double, REAL[64]))

    return double(vector), code


def total(vector):
    """Sum of the numbers of a vector, in float64."""
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
        add = cgutils.get_or_insert_function(builder.module, kind, name)
        return builder.call(add, [double(-0.0), numbers], fastmath=("reassoc",))

    return types.float64(vector), code


def load(array, row, column, zero):
    """What stands at ``array[row, column]`` and, if ``zero`` is a vector, right of it."""
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
    """Writes what `load` reads, rounded to the nearest element.

    If ``streamed``, past the caches: then the place must be a multiple of `LINE` bytes.
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
        align = min(LINE, value.lanes * array.dtype.bitwidth // 8)
        written = builder.store(elements, place, align=align)
        written.set_metadata("nontemporal", builder.module.add_metadata([WORD(1)]))
        return context.get_dummy_value()

    return types.void(array, row, column, value), code


@njit
def is_streamed(x, result, collected):
    """Whether ``result`` is worth it and fit for it: its rows are whole lines of the cache."""
    least = STREAMED if collected else STREAMED_ALONE
    aligned = result.ctypes.data % LINE == 0 and result.strides[0] % LINE == 0
    return x.nbytes >= least and x.shape[1] >= LANES and aligned


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
    bits = builder.shl(words, _all(vector, WORD, 16))
    return builder.bitcast(bits, lanes_of(vector, REAL[32]))


def _narrowed(builder, vector, value, dtype):
    if dtype == types.int16:
        halves = builder.fptrunc(value, lanes_of(vector, ir.HalfType()))
        return builder.bitcast(halves, lanes_of(vector, ir.IntType(16)))
    if dtype != types.uint16:
        return value
    every = functools.partial(_all, vector, WORD)
    bits = builder.bitcast(value, lanes_of(vector, WORD))
    odd = builder.and_(builder.lshr(bits, every(16)), every(1))
    nearest = builder.add(builder.add(bits, every(0x7FFF)), odd)
    is_nan = builder.fcmp_unordered("uno", value, value)
    chosen = builder.select(is_nan, every(0x7FC00000), nearest)
    return builder.trunc(builder.lshr(chosen, every(16)), lanes_of(vector, ir.IntType(16)))


def prefetch(array, row, column, zero):
    """Asks for what `load` would read to be brought into the L2 cache, and does not wait for it.

    The place may lie outside of the array.
    """


@overload(prefetch)
def _prefetch(array, row, column, zero):
    if isinstance(zero, Vector):
        return lambda array, row, column, zero: _prefetch_vector(array, row, column, zero)
    return lambda array, row, column, zero: None


@intrinsic
def _prefetch_vector(context, array, row, column, zero):
    def code(context, builder, signature, args):
        byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        place = builder.bitcast(element_at(context, builder, signature, args), byte)
        for line in range(0, zero.lanes * array.dtype.bitwidth // 8, LINE):
            address = builder.gep(place, [flag(line)])
            builder.call(function, [address, flag(0), flag(2), flag(1)])
        return context.get_dummy_value()

    return types.void(array, row, column, zero), code


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
        name = f"llvm.fmuladd.v{a.lanes}f{a.number.bitwidth}"
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
