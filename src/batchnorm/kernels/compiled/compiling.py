"""Kernels as machine code: read from disk, or compiled now."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import config, types

from batchnorm.kernels.compiled import passes, storage
from batchnorm.kernels.compiled.elements import array_at, no_array
from batchnorm.kernels.compiled.numba_internals import object_code
from batchnorm.kernels.compiled.task import RECORD, Task

# Dtypes of the arrays that represent a tensor, see `batchnorm.kernels.compiled.elements`.
ELEMENTS = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.bfloat16: np.uint16,
    torch.float16: np.int16,
}
SIGNATURE = types.void(types.CPointer(RECORD), types.intp, types.intp)
MAKERS = {
    ("forward", False): passes.forward_of_planes,
    ("forward", True): passes.forward_of_columns,
    ("backward", False): passes.backward_of_planes,
    ("backward", True): passes.backward_of_columns,
}

_Prototype = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)


class Kernel(NamedTuple):
    """A kernel that is ready to run.

    Attributes:
        call: Runs one share on this thread: of the task at an address, share, size of the team.
        address: Address of its machine code; None without the JIT.
    """

    call: Callable[[int, int, int], None]
    address: int | None


@cache
def kernel(which: str, dtype: torch.dtype, *, columns: bool, optional: bool) -> Kernel:
    """Returns the kernel of a pass and a dtype; compiles it where it is new.

    Args:
        which: ``"forward"`` or ``"backward"``.
        dtype: Dtype of the input, a key of `ELEMENTS`.
        columns: True for columns, False for planes.
        optional: True if there may be a residual and a mask.
    """
    element = ELEMENTS[dtype]
    number = np.float64 if dtype == torch.float64 else np.float32
    function = MAKERS[which, columns](element, number, array_at if optional else no_array)
    if config.DISABLE_JIT:
        return Kernel(lambda task, *share: function(Task.from_address(task), *share), None)
    family, suffix = "columns" if columns else "planes", "_and_more" if optional else ""
    name = f"{which}_{family}_{np.dtype(element).name}{suffix}"
    address = compiled(name, function, SIGNATURE)
    return Kernel(_Prototype(address), address)


def compiled(name: str, function: Any, signature: Any) -> int:
    """Returns the address of a function's machine code, read from disk or compiled now."""
    name = f"{name}-{storage.fingerprint()}"
    stored = storage.read(name)
    if stored is None:
        with storage.one_at_a_time(name):
            stored = storage.read(name) or _compiled_now(name, function, signature)
    return storage.link(stored)


def _compiled_now(name: str, function: Any, signature: Any) -> storage.MachineCode:
    logging.getLogger("batchnorm.kernels").info("compiling %s", name)
    code = storage.MachineCode(*object_code(function, signature))
    storage.write(name, code)
    return code
