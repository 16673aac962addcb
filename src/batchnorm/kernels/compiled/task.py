"""The record that a kernel is called with: addresses and numbers, the same for every kernel.

A kernel is called once, or in several *stages* between which its threads wait for each other. The
record says which *steps* a stage consists of.

The named tuples here are the only description of the record. They are filled by name; their fields
lie in the record in the order in which they are written here.
"""

from __future__ import annotations

import ctypes
import struct
from typing import ClassVar, NamedTuple, get_type_hints

import numpy as np
from numba import from_dtype
from numba.extending import intrinsic, overload

from batchnorm.kernels.compiled.numba_internals import jitted


class Addresses(NamedTuple):
    """Addresses of the tensors of one call; zero where there is no such tensor."""

    x: int
    residual: int = 0
    y: int = 0
    mask: int = 0
    grad: int = 0
    grad_x: int = 0
    grad_before_relu: int = 0
    weight: int = 0
    bias: int = 0
    mean: int = 0
    var: int = 0
    sum_grad: int = 0
    sum_grad_x_hat: int = 0
    mean_grad: int = 0
    mean_grad_x_hat: int = 0


class RunningUpdate(NamedTuple):
    """Addresses of the running statistics that the step "merge" updates; zeros for none."""

    running_mean: int = 0
    running_var: int = 0
    counter: int = 0
    # Weight of the new batch.
    weight_of_batch: float = 0.0
    # Whether the running statistics are float64, not float32.
    running_in_float64: int = 0


class Constants(NamedTuple):
    """The part of a record that is the same in every call of a plan."""

    # Where the parts of the scratch memory begin, in bytes.
    partials: int
    coefficients: int
    spread: int
    work: int
    recent: int
    tile: int
    # Bytes of the scratch memory of a thread's tile.
    scratch_of_tile: int
    # Shape: planes are (rows, channels, length), with one column a channel; columns are
    # (rows, fold * channels * repeat).
    rows: int
    channels: int
    length: int
    fold: int
    repeat: int
    slabs: int
    # Parts of the columns, see `batchnorm.kernels.compiled.tiles`; 1 if they are not cut.
    tiles: int
    # Channels of a row in memory; a tile has some of them.
    all_channels: int
    # Elements of a channel.
    count: int
    # The steps of each stage, eight bits a stage.
    stages: int
    # Each thread takes one contiguous part of memory; if 0, each takes whole channels.
    by_cell: int
    # The steps include "collect", so the end of ``x`` may still be in a cache for "apply".
    collected: int
    # A ReLU is fused.
    relu: int
    # Mean and variance are constants, so no gradient passes through them.
    fixed: int
    # The sums of the gradient are stored in the dtype of the arithmetic, not in float64.
    sums_as_number: int
    # Mean and variance are float32, not float64.
    statistics_in_float32: int


_KINDS = {int: ctypes.c_int64, float: ctypes.c_double}
_FORMATS = {ctypes.c_int64: "q", ctypes.c_double: "d"}


def _fields(record: type[tuple]) -> list[tuple[str, type]]:
    return [(name, _KINDS[kind]) for name, kind in get_type_hints(record).items()]


_OF_CALL = [
    ("stage", ctypes.c_int64),
    # Set by a kernel if a running statistic becomes larger than float32 can hold.
    ("overflowed", ctypes.c_int64),
    # Address of the scratch memory.
    ("scratch", ctypes.c_int64),
    ("eps", ctypes.c_double),
    *_fields(Addresses),
    *_fields(RunningUpdate),
]


class Task(ctypes.Structure):
    """The whole record: first what differs from call to call, then `Constants`."""

    _fields_: ClassVar = [*_OF_CALL, *_fields(Constants)]


# `struct` packs a call in a tenth of the time that ctypes takes to fill its structure.
CALL = struct.Struct("".join(_FORMATS[kind] for _, kind in _OF_CALL))
CONSTANTS = struct.Struct("".join(_FORMATS[kind] for _, kind in _fields(Constants)))
RECORD = from_dtype(np.dtype(Task))
# "prepare" computes the coefficients of the map; "collect" sums over memory; "merge" merges the
# sums, and in the backward pass divides them by the count; "take_means" reads means that the caller
# gives instead; "apply" applies the map.
STEPS = ("prepare", "collect", "merge", "take_means", "apply")
PREPARE, COLLECT, MERGE, TAKE_MEANS, APPLY = (1 << place for place in range(len(STEPS)))


@jitted
def share(whole, thread, team):
    """First and last of a thread's share."""
    return whole * thread // team, whole * (thread + 1) // team


@jitted
def steps_of(task):
    """Returns the bits of the steps in the current stage."""
    return task.stages >> (8 * task.stage) & 255


def task_at(pointer):
    """Returns the task behind a pointer; without the JIT, the task itself is passed around."""
    return pointer


@overload(task_at)
def _task_at(pointer):
    return lambda pointer: _record(pointer)


@intrinsic
def _record(context, pointer):
    def code(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(pointer.dtype))

    return pointer.dtype(pointer), code
