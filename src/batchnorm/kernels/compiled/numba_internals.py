"""The names of Numba that its public API does not promise, each behind a function with its reason.

Everything else that the kernels use of Numba is in `numba.extending`. A test compiles a function
through every name in this file, so a version of Numba that renames one is noticed there.
"""

from __future__ import annotations

from typing import Any

from numba import cfunc, njit, types
from numba.core import cgutils
from numba.np.arrayobj import populate_array

# Options of functions that only other compiled functions call: no wrappers for Python and for C.
# Numba documents neither option. They save a quarter of the time of a compilation.
_INNER = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
jitted = njit(**_INNER)
inlined = njit(forceinline=True, **_INNER)


def object_code(function: Any, signature: Any) -> tuple[str, bytes]:
    """Compiles a function; returns its symbol and an object file.

    ``_nrt=False`` switches off the counting of references to arrays, which Numba would do in the
    innermost loops of inlined functions. ``_wrapper_name`` and ``_library`` are the only way to the
    object file: Numba's own cache uses them, too. ``error_model="numpy"`` is public: a division by
    zero gives infinity, as in torch, where an exception would end the loops unseen.
    """
    code = cfunc(signature, error_model="numpy", _nrt=False)(function)
    return code._wrapper_name, code._library._get_compiled_object()


def array_of_memory(context, builder, array_type, address, shape):
    """Builds an array on memory that Numba did not allocate, without a reference count.

    `numba.carray` does this, but needs the reference counts that `object_code` switches off.
    """
    array = context.make_array(array_type)(context, builder)
    shape = cgutils.unpack_tuple(builder, shape)
    itemsize = context.get_abi_sizeof(context.get_data_type(array_type.dtype))
    itemsize = context.get_constant(types.intp, itemsize)
    strides = [itemsize]
    for extent in reversed(shape[1:]):
        strides.insert(0, builder.mul(strides[0], extent))
    data = builder.inttoptr(address, array.data.type)
    populate_array(array, data, shape, strides, itemsize, None)
    return array._getvalue()


def pointer_to_element(context, builder, signature, args):
    """Pointer to ``array[row, column]``, the first three arguments, without a bounds check.

    The public API reaches elements one at a time; vectors are loaded from a pointer.
    """
    array_type = signature.args[0]
    array = context.make_array(array_type)(context, builder, args[0])
    return cgutils.get_item_pointer(context, builder, array_type, array, args[1:3], False)


def llvm_function(builder, kind, name):
    """Declares one of LLVM's own functions, such as ``llvm.prefetch.p0``.

    `numba.types.ExternalFunction` knows no vectors.
    """
    return cgutils.get_or_insert_function(builder.module, kind, name)
