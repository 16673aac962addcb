"""Compiled kernels, and how a task is spread over their threads."""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable
from functools import cache
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numba import cfunc, config, types
from torch import Tensor

from batchnorm.kernels import parallel
from batchnorm.kernels.compiled import backwards, forwards, planes, storage
from batchnorm.kernels.compiled.elements import array_at, no_array
from batchnorm.kernels.compiled.statistics import SUMS
from batchnorm.kernels.compiled.task import LAYOUT, RECORD, Task
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
# With fewer channels than this, some threads would wait for the others, unless it comes out even.
CHANNELS_A_THREAD = 4
_WORK = math.prod(planes.WORK)
# Tensors that are read twice, and how many bytes of them at most are expected to be in the L3 cache
# when they are read again.
READ: dict[Pass, int] = {"forward": 1, "backward": 2}
CACHED = 1 << 25
# These are done by all threads, the others only if there are many channels.
SHARED, MANY = ("collect", "apply"), 512
# Parts of the scratch memory begin at a line of the cache.
LINE = 64

_Prototype = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t)
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
    narrow: bool = False
    eps: float = 0.0


class _Kernel(NamedTuple):
    """A compiled kernel: what calls it on this thread, and where its code lies."""

    call: Callable[[bytes, int, int], None]
    address: int | None


def run(which: Pass, steps: tuple[str, ...], x: Tensor, tensors: Tensors, options: Options) -> None:
    """Does the steps, in their order, on as many threads as the size of ``x`` deserves.

    Where memory waits, threads share out channels, and all steps are done for a channel while it is
    in the L2 cache. Else they share out what lies one after the other in memory, one step after the
    other.
    """
    geometry = geometry_of(x)
    optional = (tensors.residual is not None,) if which == "forward" else ()
    kernel = _kernel(which, geometry.columns, x.dtype, (*optional, tensors.mask is not None))
    team = team_for(x)
    parts = _parts_of_block(geometry, team)
    block = _borrowed(sum(parts))
    addresses = _memory(parts, block, x, tensors)
    collected = "collect" in steps
    by_cell = not collected or not shares_channels(x, which, team)
    place = (*addresses, *geometry[1:], x.numel() // x.shape[1])
    if team == 1:
        kernel.call(LAYOUT.pack(*place, *_flags(steps), by_cell, collected, *options), 0, 1)
    elif not by_cell:
        _share(kernel, LAYOUT.pack(*place, *_flags(steps), False, collected, *options), team)
    else:
        for together in _parts(steps):
            task = LAYOUT.pack(*place, *_flags(together), True, collected, *options)
            _share(kernel, task, team if _is_shared(together, geometry) else 1)
    _kept.block = block


def team_for(x: Tensor) -> int:
    """How many threads work on ``x``."""
    return parallel.team_for(x.numel() * x.element_size())


def shares_channels(x: Tensor, which: Pass, team: int) -> bool:
    """Whether threads that collect and apply share out channels, if they may."""
    geometry = geometry_of(x)
    channels = geometry.channels
    even = channels >= CHANNELS_A_THREAD * team or channels % team == 0
    read = x.numel() * x.element_size() * READ[which]
    return even and not geometry.columns and read > CACHED


def _is_shared(steps: tuple[str, ...], geometry: Geometry) -> bool:
    shared = steps[0] in SHARED
    return shared or (geometry.channels >= MANY and not geometry.columns)


@cache
def _flags(steps: tuple[str, ...]) -> tuple[bool, ...]:
    return tuple(step in steps for step in ("prepare", "collect", "merge", "apply"))


@cache
def _parts(steps: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Steps between which threads wait for each other: shared ones alone, others together."""
    parts: list[tuple[str, ...]] = []
    for step in steps:
        if parts and step not in SHARED and parts[-1][-1] not in SHARED:
            parts[-1] += (step,)
        else:
            parts.append((step,))
    return parts


def _share(kernel: _Kernel, task: bytes, team: int) -> None:
    if kernel.address is None:
        for thread in range(team):
            kernel.call(task, thread, team)
    elif team == 1:
        kernel.call(task, 0, 1)
    else:
        memory = ctypes.create_string_buffer(task, len(task))
        parallel.run(kernel.address, ctypes.addressof(memory), team)


def _columns(geometry: Geometry) -> int:
    return geometry.fold * geometry.channels * geometry.repeat


def _parts_of_block(geometry: Geometry, team: int) -> list[int]:
    """Bytes of `task.ADDRESSES`' last four, in whole lines."""
    columns, recent = _columns(geometry), math.prod(planes.RECENT)
    sizes = (SUMS * geometry.slabs * columns, 6 * columns, max(3 * columns, _WORK) * team)
    return [-(-8 * numbers // LINE) * LINE for numbers in (*sizes, recent * team)]


def _memory(parts: list[int], block: _Block, x: Tensor, tensors: Tensors) -> list[int]:
    """Addresses in the order of `task.ADDRESSES`."""
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    *starts, _ = accumulate(parts, initial=block.address)
    return [x.data_ptr(), *addresses, *starts]


class _Block(NamedTuple):
    """Memory for sums and coefficients."""

    address: int
    size: int
    memory: Any


def _borrowed(size: int) -> _Block:
    """A block of at least so many bytes, which nobody else has.

    A Python thread keeps one from call to call. While it is in use it is not to be found, because a
    signal handler or a finalizer may call a kernel in between.
    """
    block = _kept.__dict__.pop("block", None)
    if block is None or block.size < size:
        memory = np.empty(size + LINE, np.uint8)
        block = _Block(-(-memory.ctypes.data // LINE) * LINE, size, memory)
    return block


@cache
def _kernel(which: Pass, columns: bool, dtype: torch.dtype, given: tuple[bool, ...]) -> _Kernel:
    """The kernel for tensors of which the optional ones are given or not, in their order."""
    element = ELEMENTS[dtype]
    number = np.float64 if dtype == torch.float64 else np.float32
    optional = tuple(array_at if there else no_array for there in given)
    function = MAKERS[which, columns](element, number, optional)
    if config.DISABLE_JIT:
        return _Kernel(lambda task, *share: function(Task.from_buffer_copy(task), *share), None)
    family, with_what = "columns" if columns else "planes", "".join(str(int(g)) for g in given)
    name = f"{which}_{family}_{np.dtype(element).name}_{with_what}"
    address = compiled(name, function, SIGNATURE)
    return _Kernel(_Prototype(address), address)


def compiled(name: str, function: Any, signature: Any) -> int:
    """The address of a function's machine code: kept from an earlier process, or compiled now.

    References to arrays are not counted: Numba would do so in the innermost loops. And a division
    by zero gives infinity, as in torch: an exception would end the loops unseen.
    """
    name = f"{name}-{storage.fingerprint()}"
    kept = storage.read(name)
    if kept is None:
        code = cfunc(signature, error_model="numpy", _nrt=False)(function)
        kept = storage.MachineCode(code._wrapper_name, code._library._get_compiled_object())
        storage.keep(name, kept)
    return storage.linked(kept)
