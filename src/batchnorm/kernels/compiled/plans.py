"""Plans: how the steps of a call spread over threads, worked out once for each kind of call."""

from __future__ import annotations

import math
import struct
import threading
from functools import lru_cache
from itertools import accumulate
from typing import Literal, NamedTuple

import numpy as np
import torch

from batchnorm.kernels import parallel
from batchnorm.kernels.compiled import coefficients, planes
from batchnorm.kernels.compiled.channel_sums import SUMS
from batchnorm.kernels.compiled.compiling import Kernel, kernel
from batchnorm.kernels.compiled.task import (
    CALL,
    CONSTANTS,
    STEPS,
    Addresses,
    Constants,
    RunningUpdate,
    Task,
)
from batchnorm.kernels.compiled.vectors import CACHE_LINE
from batchnorm.kernels.contract import Running
from batchnorm.kernels.geometry import Geometry, geometry_of_shape

Pass = Literal["forward", "backward"]

# Channels a thread. With fewer, some threads would wait for the others, unless their number
# divides the channels.
MIN_CHANNELS = 4
# Tensors that a pass reads twice, and the most bytes of them that the L3 cache (32 MiB where it
# was measured) is expected to return the second time. Beyond, threads share channels.
# docs/decisions/0007: planes
READ_TWICE: dict[Pass, int] = {"forward": 1, "backward": 2}
MAX_CACHED = 1 << 25
# Parts of the scratch memory, fields of `task.Constants`.
SCRATCH = ("partials", "coefficients", "spread", "work", "recent", "tile")
# Steps that read or write whole tensors.
SHARED = ("collect", "apply")

# Bytes of a task.
SIZE = CALL.size + CONSTANTS.size
_OVERFLOWED = struct.Struct("q")
_NO_UPDATE = RunningUpdate()
_of_thread = threading.local()


class Options(NamedTuple):
    """Flags of a task; see the fields of the same names in `task.Constants`."""

    relu: bool = False
    fixed: bool = False
    sums_as_number: bool = False
    statistics_in_float32: bool = False


class Plan(NamedTuple):
    """The part of a call that is the same for every call of its kind.

    Attributes:
        kernel: Computes the steps.
        constants: `task.Constants`, packed.
        scratch: Bytes of scratch memory.
        team: Number of threads to ask for.
        stages: Number of stages.
    """

    kernel: Kernel
    constants: bytes
    scratch: int
    team: int
    stages: int

    def run(self, addresses: Addresses, eps: float, running: Running | None = None) -> None:
        """Computes the steps.

        Args:
            addresses: Addresses of the tensors, which must live until this returns.
            eps: Added to the variance.
            running: Running statistics that the step "merge" updates.
        """
        block = _borrow(SIZE + CACHE_LINE + self.scratch)
        scratch = -(-(block.address + SIZE) // CACHE_LINE) * CACHE_LINE
        update = _NO_UPDATE if running is None else _update_of(running)
        # stage, overflowed, scratch, eps
        CALL.pack_into(block.memory, 0, 0, 0, scratch, eps, *addresses, *update)
        block.memory[CALL.size : SIZE] = self.constants
        if self.team == 1:
            self.kernel.call(block.address, 0, 1)
        elif self.kernel.address is not None:
            parallel.run(self.kernel.address, block.address, self.team, self.stages)
        else:
            self._run_in_turn(block)
        if running is not None:
            _report_update(running, block)
        _of_thread.block = block

    def _run_in_turn(self, block: _Block) -> None:
        """Does on this thread what a team would do; without the JIT."""
        for stage in range(self.stages):
            Task.from_buffer(block.memory).stage = stage
            for thread in range(self.team):
                self.kernel.call(block.address, thread, self.team)


def _update_of(running: Running) -> RunningUpdate:
    return RunningUpdate(
        running_mean=running.mean.data_ptr(),
        running_var=running.var.data_ptr(),
        counter=0 if running.counter is None else running.counter.data_ptr(),
        weight_of_batch=running.weight,
        running_in_float64=running.mean.dtype == torch.float64,
    )


def _report_update(running: Running, block: _Block) -> None:
    (overflowed,) = _OVERFLOWED.unpack_from(block.memory, Task.overflowed.offset)
    running.moved, running.overflowed = True, overflowed != 0
    buffers = (running.mean, running.var)
    torch.autograd.graph.increment_version(
        buffers if running.counter is None else (*buffers, running.counter)
    )


@lru_cache(4096)
def plan(
    which: Pass,
    steps: tuple[str, ...],
    shape: torch.Size,
    channels_last: bool,
    dtype: torch.dtype,
    optional: bool,
    options: Options,
    team: int,
) -> Plan:
    """Makes the plan for some steps, once for each kind of call.

    Where memory is the limit, threads share channels, and each does all steps for some channels
    while the L2 cache holds them. Otherwise each thread takes a contiguous part of memory,
    and all finish a stage before the next begins.

    Args:
        which: The pass to which the steps belong.
        steps: Some of `task.STEPS`, in the order in which they are done.
        shape: Of the input.
        channels_last: Whether the input is channels last; else it is contiguous.
        dtype: Of the input.
        optional: True if there is a residual, forward, or a mask, backward.
        options: Flags of the task.
        team: Number of threads to ask for.
    """
    geometry = geometry_of_shape(shape, channels_last=channels_last)
    collected = "collect" in steps
    size = shape.numel() * dtype.itemsize
    tiled = geometry.tiles > 1
    by_cell = not (tiled or (collected and shares_channels(geometry, which, size, team)))
    stages = _stages(steps) if by_cell and team > 1 else [steps]
    *parts, scratch = _offsets_in_scratch(geometry, 1 if tiled else team)
    constants = Constants(
        **dict(zip(SCRATCH, parts, strict=True)),
        scratch_of_tile=scratch,
        rows=geometry.rows,
        channels=geometry.channels,
        length=geometry.length,
        fold=geometry.fold,
        repeat=geometry.repeat,
        slabs=geometry.slabs,
        tiles=geometry.tiles,
        all_channels=geometry.channels,
        count=shape.numel() // shape[1],
        stages=_bits(stages),
        by_cell=by_cell,
        collected=collected,
        **options._asdict(),
    )
    return Plan(
        kernel=kernel(which, dtype, columns=geometry.columns, optional=optional),
        constants=CONSTANTS.pack(*constants),
        scratch=scratch * team if tiled else scratch,
        team=team,
        stages=len(stages),
    )


def shares_channels(geometry: Geometry, which: Pass, size: int, team: int) -> bool:
    """Returns whether threads that collect and apply ``size`` bytes share channels.

    The pass makes a difference: the backward one reads two tensors twice.
    """
    if geometry.tiles > 1:
        return True
    channels = geometry.channels
    even = channels >= MIN_CHANNELS * team or channels % team == 0
    return even and not geometry.columns and READ_TWICE[which] * size > MAX_CACHED


def _stages(steps: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Groups steps into stages: shared ones alone, others together."""
    stages: list[tuple[str, ...]] = []
    for step in steps:
        if stages and step not in SHARED and stages[-1][-1] not in SHARED:
            stages[-1] += (step,)
        else:
            stages.append((step,))
    return stages


def _bits(stages: list[tuple[str, ...]]) -> int:
    """Encodes stages as in `task.Constants`."""
    return sum(
        1 << 8 * place + STEPS.index(step) for place, stage in enumerate(stages) for step in stage
    )


def _offsets_in_scratch(geometry: Geometry, team: int) -> accumulate[int]:
    """Computes the offsets of `SCRATCH`, and the size of all of them, in bytes.

    Each part begins at a cache line.
    """
    width = geometry.fold * geometry.widest * geometry.repeat
    sums, recent = SUMS * geometry.slabs * width, math.prod(planes.RECENT) * team
    work = max(3 * width, math.prod(planes.WORK)) * team
    numbers = coefficients.ROWS * geometry.widest, coefficients.ROWS * width
    sizes = sums, *numbers, work, recent, SIZE // 8
    return accumulate((-(-8 * size // CACHE_LINE) * CACHE_LINE for size in sizes), initial=0)


class _Block(NamedTuple):
    """Memory for a task, and for its sums and coefficients."""

    address: int
    memory: memoryview


def _borrow(size: int) -> _Block:
    """Returns a block of at least ``size`` bytes that nobody else uses.

    A Python thread reuses one from call to call. While it is in use it cannot be found, because a
    signal handler or a finalizer may call a kernel in between.
    """
    block = _of_thread.__dict__.pop("block", None)
    if block is None or len(block.memory) < size:
        memory = np.empty(size, np.uint8)
        block = _Block(memory.ctypes.data, memory.data)
    return block
