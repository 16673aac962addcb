"""Machine code in this process: LLVM's just-in-time linker, and addresses of functions."""

from __future__ import annotations

import ctypes
from typing import Any

import llvmlite.binding as llvm


def engine(assembly: str = "") -> llvm.ExecutionEngine:
    """Compiles LLVM assembly for this processor; its functions live as long as the result."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
    return llvm.create_mcjit_compiler(llvm.parse_assembly(assembly), machine)


def address_of(function: Any) -> int:
    """Returns the address of the code of a C function that ctypes has loaded."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0
