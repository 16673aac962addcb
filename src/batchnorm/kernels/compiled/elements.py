"""Single elements: the dtype of their storage, and the dtype of the arithmetic on them.

Numba and NumPy know no bfloat16, and Numba computes no float16 on a CPU. So their bits are stored
as integers: an array of ``uint16`` contains bfloat16, one of ``int16`` contains float16. `widen`
converts an element to float32, `narrow` rounds it back, to the nearest and ties to even. float32
and float64 are computed as they are stored.

Each function has two bodies: the Python one runs when Numba's JIT is disabled, the overload is
compiled.
"""

from __future__ import annotations

import ctypes

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import (
    intrinsic,
    lower_builtin,
    overload,
    register_jitable,
    type_callable,
)

from batchnorm.kernels.compiled.numba_internals import array_of_memory, jitted

# Bits of float32, except NAN: bits of bfloat16.
NAN = np.uint32(0x7FC0)
HALF = np.uint32(0x7FFF)
INFINITY = np.uint32(0x7F800000)
MAGNITUDE = np.uint32(0x7FFFFFFF)
ONE = np.uint32(1)
SIXTEEN = np.uint32(16)


@intrinsic
def _float32_of_bits(context, bits):
    def code(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), code


@intrinsic
def _bits_of_float32(context, value):
    def code(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), code


@intrinsic
def _float32_of_half(context, bits):
    def code(context, builder, signature, args):
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.int16), code


@intrinsic
def _half_of_float32(context, value):
    def code(context, builder, signature, args):
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.int16(types.float32), code


def array_at(address, shape, dtype):
    """Returns the array of ``shape`` and ``dtype`` that begins at ``address``."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = (ctypes.c_char * size).from_address(int(address))
    return np.frombuffer(memory, dtype).reshape(shape)


@type_callable(array_at)
def _type_of_array(context):
    return lambda address, shape, dtype: types.Array(dtype.dtype, len(shape), "C")


@lower_builtin(array_at, types.Integer, types.UniTuple, types.Any)
def _make_array(context, builder, signature, args):
    address, shape, _ = args
    return array_of_memory(context, builder, signature.return_type, address, shape)


@jitted
def address_of(matrix, column):
    """Returns the address of a column of a contiguous matrix."""
    return matrix.ctypes.data + matrix.itemsize * column


@jitted
def no_array(address, shape, dtype):
    """Returns None. Takes the place of `array_at` in kernels that have no such array."""
    return None


def widen(element):
    """Converts a stored element to the number that it encodes."""
    if isinstance(element, np.uint16):
        return np.uint32(int(element) << 16).view(np.float32)
    if isinstance(element, np.int16):
        return np.float32(element.view(np.float16))
    return element


@overload(widen)
def _widen(element):
    if element == types.uint16:
        return lambda element: _float32_of_bits(np.uint32(element) << SIXTEEN)
    if element == types.int16:
        return lambda element: _float32_of_half(element)
    return lambda element: element


def narrow(value, like):
    """Rounds ``value`` to the nearest element of the array ``like``."""
    if like.dtype == np.uint16:
        return np.uint16(_round_to_bfloat16(int(np.float32(value).view(np.uint32))))
    if like.dtype == np.int16:
        with np.errstate(over="ignore"):
            return np.float16(value).view(np.int16)
    return value


@register_jitable
def _round_to_bfloat16(bits):
    if (bits & MAGNITUDE) > INFINITY:
        return NAN
    return (bits + HALF + ((bits >> SIXTEEN) & ONE)) >> SIXTEEN


@overload(narrow)
def _narrow(value, like):
    if like.dtype == types.uint16:
        return lambda value, like: np.uint16(_round_to_bfloat16(_bits_of_float32(value)))
    if like.dtype == types.int16:
        return lambda value, like: _half_of_float32(value)
    return lambda value, like: value


def number_like(array, value):
    """Converts ``value`` to the dtype of the arithmetic on elements of ``array``."""
    return np.float64(value) if array.dtype == np.float64 else np.float32(value)


@overload(number_like)
def _number_like(array, value):
    if array.dtype == types.float64:
        return lambda array, value: np.float64(value)
    return lambda array, value: np.float32(value)
