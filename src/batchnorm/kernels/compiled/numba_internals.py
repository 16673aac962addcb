"""The names of Numba that its public API does not promise, each behind a function with its reason.

Everything else that the kernels use of Numba is in `numba.extending`. A test compiles a function
through every name in this file, so a version of Numba that renames one is noticed there.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from numba import njit, types
from numba.core import cgutils, codegen, cpu, descriptors, dispatcher, target_extension, typing
from numba.np.arrayobj import populate_array

_TARGET = "batchnorm"


class _Library(codegen.CPUCodeLibrary):
    """The code of one function: neither optimized nor made machine code by itself.

    Numba optimizes each function with all that it calls, level by level, and loads each one. Ours
    are reached through a kernel only, so `object_code` does both once, for the whole kernel. This
    halves the time of a compilation, and the code becomes smaller.
    """

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_specific(self) -> None:
        pass

    def get_pointer_to_function(self, name: str) -> int:
        """The address of a function that is not loaded: none."""
        self._ensure_finalized()
        return 0

    def object_code(self) -> bytes:
        """Optimizes the function with all that it calls; returns an object file."""
        self._ensure_finalized()
        super()._optimize_final_module()
        return self._codegen._tm.emit_object(self._final_module)


class _Codegen(codegen.JITCPUCodegen):
    _library_class = _Library

    def _add_module(self, module: Any) -> None:
        """Loads nothing."""

    def set_env(self, env_name: str, env: Any) -> None:
        """Does nothing: only code that uses Python objects has an environment."""


class _Context(cpu.CPUContext):
    def init(self) -> None:
        """As for Numba's own target, with our code generator."""
        super().init()
        self._internal_codegen = _Codegen(_TARGET)


class _Descriptor(descriptors.TargetDescriptor):
    options = cpu.CPUTargetOptions

    @cached_property
    def typing_context(self) -> typing.Context:
        return typing.Context()

    @cached_property
    def target_context(self) -> _Context:
        return _Context(self.typing_context, _TARGET)


class _Dispatcher(dispatcher.Dispatcher):
    targetdescr = _Descriptor(_TARGET)


class _Target(target_extension.CPU):
    """A target of our own, so that functions which a user compiles are compiled as always."""


def _decorator(*function: Any, nopython: bool = True, **options: Any) -> Any:
    return njit(*function, _target=_TARGET, **{"no_cpython_wrapper": True, **options})


target_extension.target_registry[_TARGET] = _Target
target_extension.dispatcher_registry[_Target] = _Dispatcher
target_extension.jit_registry[_Target] = _decorator

# Decorators of functions that only kernels call: no wrappers for Python and for C.
jitted = _decorator(no_cfunc_wrapper=True)
inlined = _decorator(no_cfunc_wrapper=True, forceinline=True)


def object_code(function: Any, signature: Any) -> tuple[str, bytes]:
    """Compiles a function; returns its symbol, which C can call, and an object file.

    ``_nrt=False`` switches off the counting of references to arrays, which Numba would do in the
    innermost loops of inlined functions. ``error_model="numpy"`` is public: a division by zero
    gives infinity, as in torch, where an exception would end the loops unseen.
    """
    compiled = _decorator(function, error_model="numpy", _nrt=False)
    compiled.compile(signature)
    (code,) = compiled.overloads.values()
    return code.fndesc.llvm_cfunc_wrapper_name, code.library.object_code()


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
