"""Compiled kernels, and how a task is spread over their threads."""

from __future__ import annotations

import ctypes
import threading
import zlib
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import llvmlite.binding as llvm
import numpy as np
import torch
from numba import cfunc, config, types
from torch import Tensor

from batchnorm.kernels import parallel
from batchnorm.kernels.compiled import backwards, forwards
from batchnorm.kernels.compiled.task import RECORD, Task
from batchnorm.kernels.geometry import Geometry, geometry_of

Pass = Literal["forward", "backward"]

# The arrays that stand for a tensor, see `batchnorm.kernels.compiled.elements`.
ELEMENTS = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.bfloat16: np.uint16,
    torch.float16: np.int16,
}
SIGNATURE = types.void(types.CPointer(RECORD), types.intp, types.intp)
MAKERS = {
    ("forward", False): forwards.of_planes,
    ("forward", True): forwards.of_columns,
    ("backward", False): backwards.of_planes,
    ("backward", True): backwards.of_columns,
}
# With fewer channels than this, a thread would often wait for the others.
CHANNELS_A_THREAD = 4
# These are done by all threads, the others are short.
SHARED = ("collect", "apply")

_Prototype = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)
_kept = threading.local()


class Tensors(NamedTuple):
    """What a task reads and writes beside ``x``, in the order of `task.ADDRESSES`."""

    residual: Tensor | None = None
    y: Tensor | None = None
    mask: Tensor | None = None
    grad: Tensor | None = None
    grad_x: Tensor | None = None
    behind_relu: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    sum_grad: Tensor | None = None
    sum_grad_x_hat: Tensor | None = None


class Options(NamedTuple):
    """How a task is done; see `task.NUMBERS`."""

    relu: bool = False
    fixed: bool = False
    given: bool = False
    eps: float = 0.0


def run(which: Pass, steps: tuple[str, ...], x: Tensor, tensors: Tensors, options: Options) -> None:
    """Does the steps, in their order, on as many threads as the size of ``x`` deserves.

    Threads share out channels if there are enough of them: then all steps are done for a channel
    while it is in the cache. Else they share out slabs and rows, one step after the other.
    """
    geometry = geometry_of(x)
    kernel, bound = _kernel_and_call(which, geometry.columns, x.dtype)
    team = team_for(x)
    task = _task(geometry, x, team, tensors, options)
    if team == 1:
        _set(task, steps)
        if bound is None:
            kernel(task, 0, 1)
        else:
            bound(ctypes.addressof(task), 0, 1)
    elif "collect" in steps and shares_channels(geometry, team):
        _call(kernel, task, steps, team)
    else:
        task.by_slab = True
        for step in steps:
            _call(kernel, task, (step,), team if step in SHARED else 1)


def team_for(x: Tensor) -> int:
    """How many threads work on ``x``."""
    return parallel.team_for(x.numel() * x.element_size())


def shares_channels(geometry: Geometry, team: int) -> bool:
    """Whether threads share out channels, not slabs."""
    return not geometry.columns and geometry.channels >= CHANNELS_A_THREAD * team


def _set(task: Task, steps: tuple[str, ...]) -> None:
    task.prepare = "prepare" in steps
    task.collect = "collect" in steps
    task.merge = "merge" in steps
    task.apply = "apply" in steps


def _call(kernel: Any, task: Task, steps: tuple[str, ...], team: int) -> None:
    _set(task, steps)
    if config.DISABLE_JIT:
        for thread in range(team):
            kernel(task, thread, team)
    else:
        parallel.run(kernel.address, ctypes.addressof(task), team)


def _task(geometry: Geometry, x: Tensor, team: int, tensors: Tensors, options: Options) -> Task:
    _, rows, channels, length, fold, repeat, slabs = geometry
    columns = fold * channels * repeat
    scratch = _scratch(8 * columns * (7 * slabs + 6 + 3 * team))
    relu, fixed, given, eps = options
    return Task(
        x.data_ptr(),
        *[0 if tensor is None else tensor.data_ptr() for tensor in tensors],
        scratch,
        scratch + 8 * columns * 7 * slabs,
        scratch + 8 * columns * (7 * slabs + 6),
        rows,
        channels,
        length,
        fold,
        repeat,
        slabs,
        x.numel() // channels,
        *(0, 0, 0, 0, 0),
        relu,
        fixed,
        given,
        eps,
    )


def _scratch(size: int) -> int:
    """Memory of this Python thread, kept from call to call."""
    if getattr(_kept, "size", 0) < size:
        _kept.memory = np.empty(size, np.uint8)
        _kept.address, _kept.size = _kept.memory.ctypes.data, size
    return _kept.address


@cache
def _kernel(which: Pass, columns: bool, dtype: torch.dtype) -> Any:
    element = ELEMENTS[dtype]
    number = np.float64 if dtype == torch.float64 else np.float32
    function = MAKERS[which, columns](element, number)
    if config.DISABLE_JIT:
        return function
    family = "columns" if columns else "planes"
    function.__qualname__ = f"{which}_{family}_{np.dtype(element).name}_{_fingerprint():08x}"
    try:
        return cfunc(SIGNATURE, cache=True)(function)
    except RuntimeError:  # No folder for the cache can be written.
        return cfunc(SIGNATURE)(function)


@cache
def _kernel_and_call(which: Pass, columns: bool, dtype: torch.dtype) -> tuple[Any, Any]:
    """A kernel, and what calls it on this thread alone: None where it is not compiled."""
    kernel = _kernel(which, columns, dtype)
    return kernel, None if config.DISABLE_JIT else _Prototype(kernel.address)


@cache
def _fingerprint() -> int:
    """A checksum of the loops and of the processor, which gives each kernel cache files of its own.

    Numba looks only at the file of the outermost function for changes. And two processes that
    cache different kernels under one name at the same time can end up with each other's code.
    """
    processor = llvm.get_host_cpu_name() + llvm.get_host_cpu_features().flatten()
    checksum = zlib.crc32(processor.encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        checksum = zlib.crc32(path.read_bytes(), checksum)
    return checksum
