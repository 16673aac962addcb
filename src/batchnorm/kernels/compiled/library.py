"""Compiled kernels, and how a task is spread over their threads."""

from __future__ import annotations

import ctypes
import logging
import math
import struct
import threading
from collections.abc import Callable
from functools import cache, lru_cache
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
from batchnorm.kernels.compiled.task import CALL, CONSTANTS, RECORD, SIZE, STEPS, Addresses, Task
from batchnorm.kernels.contract import Running
from batchnorm.kernels.geometry import Geometry, geometry_of_shape, is_channels_last

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
# Tensors that are read twice, and how many bytes of them at most are expected to be in the L3 cache
# when they are read again.
READ: dict[Pass, int] = {"forward": 1, "backward": 2}
CACHED = 1 << 25
# These go through all of memory.
SHARED = ("collect", "apply")
# Parts of the scratch memory begin at a line of the cache.
LINE = 64

_Prototype = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)
_OVERFLOWN = struct.Struct("q")
_kept = threading.local()


class Options(NamedTuple):
    """How a task is done; see `task.NUMBERS`."""

    relu: bool = False
    fixed: bool = False
    given: bool = False
    narrow: bool = False
    single: bool = False


class _Kernel(NamedTuple):
    """A compiled kernel: what calls it on this thread, and where its code lies."""

    call: Callable[[int, int, int], None]
    address: int | None


class Plan(NamedTuple):
    """All of a task that does not change from call to call."""

    kernel: _Kernel
    constants: bytes
    scratch: int
    team: int
    stages: int

    def run(self, addresses: Addresses, eps: float, running: Running | None = None) -> None:
        """Does the steps.

        Args:
            addresses: Of the tensors, which must live until this returns.
            eps: Added to the variance.
            running: Moved together with the merging.
        """
        block = _borrowed(SIZE + LINE + self.scratch)
        scratch = -(-(block.address + SIZE) // LINE) * LINE
        moved = (0, 0, 0, eps, 0.0, 0) if running is None else _to_be_moved(running, eps)
        CALL.pack_into(block.memory, 0, 0, 0, *addresses, scratch, *moved)
        block.memory[CALL.size : SIZE] = self.constants
        if self.team == 1:
            self.kernel.call(block.address, 0, 1)
        elif self.kernel.address is not None:
            parallel.run(self.kernel.address, block.address, self.team, self.stages)
        else:
            self._run_in_turn(block)
        if running is not None:
            _say_moved(running, block)
        _kept.block = block

    def _run_in_turn(self, block: _Block) -> None:
        """Without the JIT: what a team would do, on this thread."""
        for stage in range(self.stages):
            Task.from_buffer(block.memory).stage = stage
            for thread in range(self.team):
                self.kernel.call(block.address, thread, self.team)


def _to_be_moved(running: Running, eps: float) -> tuple[Any, ...]:
    """The end of `task.CALL`."""
    counter = 0 if running.counter is None else running.counter.data_ptr()
    wide = running.mean.dtype == torch.float64
    return running.mean.data_ptr(), running.var.data_ptr(), counter, eps, running.weight, wide


def _say_moved(running: Running, block: _Block) -> None:
    (overflown,) = _OVERFLOWN.unpack_from(block.memory, Task.overflown.offset)
    running.moved, running.overflown = True, overflown != 0
    buffers = (running.mean, running.var)
    torch.autograd.graph.increment_version(
        buffers if running.counter is None else (*buffers, running.counter)
    )


def plan(
    which: Pass, steps: tuple[str, ...], x: Tensor, options: Options, *, optional: bool = False
) -> Plan:
    """How to do the steps, in their order, on as many threads as the size of ``x`` deserves.

    Args:
        which: The pass to which the steps belong.
        steps: Some of `task.STEPS`.
        x: The input, contiguous or channels last.
        options: How they are done.
        optional: Whether there is a residual, forward, or a mask, backward.
    """
    last, team = is_channels_last(x), team_for(x)
    return _plan(which, steps, x.shape, last, x.dtype, optional, options, team)


def team_for(x: Tensor) -> int:
    """How many threads work on ``x``."""
    return parallel.team_for(x.nbytes)


@lru_cache(4096)
def _plan(
    which: Pass,
    steps: tuple[str, ...],
    shape: torch.Size,
    channels_last: bool,
    dtype: torch.dtype,
    optional: bool,
    options: Options,
    team: int,
) -> Plan:
    """A plan, made once for each kind of call.

    Where memory waits, threads share out channels, and all steps are done for a channel while it is
    in the L2 cache. Else they share out what lies one after the other in memory, one stage after
    the other.
    """
    geometry = geometry_of_shape(shape, channels_last=channels_last)
    collected = "collect" in steps
    size = shape.numel() * dtype.itemsize
    by_cell = not (collected and shares_channels(geometry, which, size, team))
    stages = _stages(steps) if by_cell and team > 1 else [steps]
    *parts, scratch = accumulate(_parts_of_scratch(geometry, team), initial=0)
    count = shape.numel() // shape[1]
    constants = CONSTANTS.pack(
        *parts, *geometry[1:], count, _bits(stages), by_cell, collected, *options
    )
    kernel = _kernel(which, geometry.columns, dtype, optional)
    return Plan(kernel, constants, scratch, team, len(stages))


def shares_channels(geometry: Geometry, which: Pass, size: int, team: int) -> bool:
    """Whether threads that collect and apply ``size`` bytes share out channels.

    ``which`` pass it is makes a difference: the backward one reads two tensors twice.
    """
    channels = geometry.channels
    even = channels >= CHANNELS_A_THREAD * team or channels % team == 0
    return even and not geometry.columns and READ[which] * size > CACHED


def _stages(steps: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Steps between which threads wait for each other: shared ones alone, others together."""
    stages: list[tuple[str, ...]] = []
    for step in steps:
        if stages and step not in SHARED and stages[-1][-1] not in SHARED:
            stages[-1] += (step,)
        else:
            stages.append((step,))
    return stages


def _bits(stages: list[tuple[str, ...]]) -> int:
    """`task.NUMBERS`' stages."""
    return sum(
        1 << 8 * place + STEPS.index(step) for place, stage in enumerate(stages) for step in stage
    )


def _parts_of_scratch(geometry: Geometry, team: int) -> list[int]:
    """Bytes of `task.SCRATCH`, in whole lines."""
    columns = geometry.fold * geometry.channels * geometry.repeat
    sums, recent = SUMS * geometry.slabs * columns, math.prod(planes.RECENT) * team
    sizes = sums, 6 * columns, max(3 * columns, math.prod(planes.WORK)) * team, recent
    return [-(-8 * numbers // LINE) * LINE for numbers in sizes]


class _Block(NamedTuple):
    """Memory for a task, and for sums and coefficients."""

    address: int
    memory: memoryview


def _borrowed(size: int) -> _Block:
    """A block of at least so many bytes, which nobody else has.

    A Python thread keeps one from call to call. While it is in use it is not to be found, because a
    signal handler or a finalizer may call a kernel in between.
    """
    block = _kept.__dict__.pop("block", None)
    if block is None or len(block.memory) < size:
        memory = np.empty(size, np.uint8)
        block = _Block(memory.ctypes.data, memory.data)
    return block


@cache
def _kernel(which: Pass, columns: bool, dtype: torch.dtype, optional: bool) -> _Kernel:
    element = ELEMENTS[dtype]
    number = np.float64 if dtype == torch.float64 else np.float32
    function = MAKERS[which, columns](element, number, array_at if optional else no_array)
    if config.DISABLE_JIT:
        return _Kernel(lambda task, *share: function(Task.from_address(task), *share), None)
    family, suffix = "columns" if columns else "planes", "_and_more" if optional else ""
    name = f"{which}_{family}_{np.dtype(element).name}{suffix}"
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
        with storage.one_at_a_time(name):
            kept = storage.read(name) or _compiled_now(name, function, signature)
    return storage.linked(kept)


def _compiled_now(name: str, function: Any, signature: Any) -> storage.MachineCode:
    logging.getLogger("batchnorm.kernels").info("compiling %s", name)
    code = cfunc(signature, error_model="numpy", _nrt=False)(function)
    kept = storage.MachineCode(code._wrapper_name, code._library._get_compiled_object())
    storage.keep(name, kept)
    return kept
