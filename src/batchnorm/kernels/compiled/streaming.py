"""Hints about caches: stores that go past them, and prefetching into them."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from batchnorm.kernels.compiled.numba_internals import jitted, llvm_function, pointer_to_element
from batchnorm.kernels.compiled.vectors import CACHE_LINE, LANES, Vector

# Bytes of a result from which on it is written past the caches, in training and in evaluation. In
# training it would replace what is read twice; below 16 MiB, in evaluation, the next layer may
# still find it in the L3 cache. docs/decisions/0007: streaming
STREAMED_IN_TRAINING, STREAMED_IN_EVALUATION = 1 << 22, 1 << 24


@jitted
def is_streamed(x, result, collected):
    """Returns whether ``result`` is large enough to stream, and its rows are whole cache lines."""
    least = STREAMED_IN_TRAINING if collected else STREAMED_IN_EVALUATION
    aligned = result.ctypes.data % CACHE_LINE == 0 and result.strides[0] % CACHE_LINE == 0
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


def prefetch(array, row, column, zero):
    """Starts to bring what `load` would read into the L2 cache, without waiting for it.

    The place may lie outside the array.
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
        function = llvm_function(builder, kind, "llvm.prefetch.p0")
        place = builder.bitcast(pointer_to_element(context, builder, signature, args), byte)
        # Flags: for reading; into the L2 cache; data, not code.
        read, second_level, data = flag(0), flag(2), flag(1)
        for start in range(0, zero.lanes * array.dtype.bitwidth // 8, CACHE_LINE):
            address = builder.gep(place, [flag(start)])
            builder.call(function, [address, read, second_level, data])
        return context.get_dummy_value()

    return types.void(array, row, column, zero), code
