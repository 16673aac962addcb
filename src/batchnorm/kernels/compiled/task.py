"""What a kernel is told: one record of addresses and numbers, the same for every kernel.

A kernel is called once or in several *stages*, between which its threads wait for each other. Which
steps a stage consists of is part of the task.
"""

from __future__ import annotations

import ctypes
import struct
from typing import ClassVar, NamedTuple

import numpy as np
from numba import from_dtype, njit
from numba.extending import intrinsic, overload


class Addresses(NamedTuple):
    """Where tensors begin; zero where there is no such tensor."""

    x: int
    residual: int = 0
    y: int = 0
    mask: int = 0
    grad: int = 0
    grad_x: int = 0
    behind_relu: int = 0
    weight: int = 0
    bias: int = 0
    mean: int = 0
    var: int = 0
    sum_grad: int = 0
    sum_grad_x_hat: int = 0


ADDRESSES = (
    *Addresses._fields,
    "scratch",
    # Running statistics to be moved.
    "running_mean",
    "running_var",
    "counter",
)
# Parts of the scratch memory.
SCRATCH = ("partials", "coefficients", "work", "recent")
NUMBERS = (
    # Where these parts begin, in bytes.
    *SCRATCH,
    # Shape: planes are (rows, channels, length), with one column a channel; columns are
    # (rows, fold * channels * repeat).
    "rows",
    "channels",
    "length",
    "fold",
    "repeat",
    "slabs",
    # Elements of a channel.
    "count",
    # The steps of each stage, eight bits for one.
    "stages",
    # How they are done: threads share what lies one after the other in memory, not channels; what
    # is applied was collected before, in this stage or another; a ReLU is fused; mean and variance
    # are constants; the sums are given; the sums are wanted as the elements are computed, not in
    # float64; mean and variance are float32, not float64.
    "by_cell",
    "collected",
    "relu",
    "fixed",
    "given",
    "narrow",
    "single",
)
STEPS = ("prepare", "collect", "merge", "apply")
PREPARE, COLLECT, MERGE, APPLY = (1 << place for place in range(len(STEPS)))
# How a task is packed: ctypes would take ten times as long to fill its structure. What differs from
# call to call comes first.
CALL = struct.Struct(f"2q{len(ADDRESSES)}P2dq")
CONSTANTS = struct.Struct(f"{len(NUMBERS)}q")
SIZE = CALL.size + CONSTANTS.size


class Task(ctypes.Structure):
    """Addresses are zero where there is no such tensor."""

    _fields_: ClassVar = [
        ("stage", ctypes.c_int64),
        # Set by a kernel that finds a variance which float32 cannot hold.
        ("overflown", ctypes.c_int64),
        *((name, ctypes.c_size_t) for name in ADDRESSES),
        ("eps", ctypes.c_double),
        # Of the new batch in the running statistics.
        ("weight_of_batch", ctypes.c_double),
        # Whether these are float64.
        ("wide_running", ctypes.c_int64),
        *((name, ctypes.c_int64) for name in NUMBERS),
    ]


RECORD = from_dtype(np.dtype(Task))


@njit
def share(whole, thread, team):
    """First and last of a thread's share."""
    return whole * thread // team, whole * (thread + 1) // team


@njit
def steps_of(task):
    """Bits of the steps to do now."""
    return task.stages >> (8 * task.stage) & 255


def task_at(pointer):
    """The task behind a pointer; without the JIT the task itself is handed around."""
    return pointer


@overload(task_at)
def _task_at(pointer):
    return lambda pointer: _record(pointer)


@intrinsic
def _record(context, pointer):
    def code(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(pointer.dtype))

    return pointer.dtype(pointer), code
