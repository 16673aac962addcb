"""A matrix of few rows and many columns, cut into *tiles*: each some neighboring channels.

A tile is a task of its own, a copy whose addresses begin at the tile's first channel. A thread does
all steps for one tile after the other, while its caches hold the tile's rows, sums and
coefficients. Tiles begin at a whole vector, so that no two threads write to the same cache line.
docs/decisions/0012: tiles
"""

from __future__ import annotations

import ctypes

import numpy as np
from llvmlite import ir
from numba.extending import intrinsic, overload

from batchnorm.kernels.compiled.numba_internals import jitted, llvm_function
from batchnorm.kernels.compiled.task import Task, share, task_at
from batchnorm.kernels.compiled.vectors import LANES


def by_tiles(compute, element, number):
    """Makes the kernel that computes each tile, or the whole matrix where it is not cut."""
    of_element, of_number = np.dtype(element).itemsize, np.dtype(number).itemsize

    def kernel(pointer, thread, team):
        task = task_at(pointer)
        tiled = task.tiles > 1
        first, last = share(task.tiles, thread, team) if tiled else (0, 1)
        for index in range(first, last):
            # One call, so that LLVM does not compile it twice.
            part = _tile_of(task, index, thread, of_element, of_number) if tiled else task
            compute(part, 0 if tiled else thread, 1 if tiled else team)
            if part.overflowed:
                task.overflowed = 1

    return kernel


@jitted
def _tile_of(task, index, thread, of_element, of_number):
    """Returns the task of one tile, whose scratch memory is the thread's."""
    scratch = task.scratch + thread * task.scratch_of_tile
    tile = _copied(task, scratch + task.tile)
    tile.scratch = scratch
    first, last = first_channel(task, index), first_channel(task, index + 1)
    tile.channels = last - first
    elements = first * task.repeat * of_element
    tile.x += elements
    tile.residual += elements
    tile.y += elements
    tile.grad += elements
    tile.grad_x += elements
    tile.grad_before_relu += elements
    tile.mask = _moved(task.mask, first * task.repeat // 8)
    tile.weight = _moved(task.weight, first * of_number)
    tile.bias = _moved(task.bias, first * of_number)
    of_statistic = 4 if task.statistics_in_float32 else 8
    tile.mean += first * of_statistic
    tile.var += first * of_statistic
    of_running = 8 if task.running_in_float64 else 4
    tile.running_mean = _moved(task.running_mean, first * of_running)
    tile.running_var = _moved(task.running_var, first * of_running)
    tile.counter = 0 if index > 0 else task.counter
    of_sum = of_number if task.sums_as_number else 8
    tile.sum_grad += first * of_sum
    tile.sum_grad_x_hat += first * of_sum
    tile.mean_grad += first * 8
    tile.mean_grad_x_hat += first * 8
    return tile


@jitted
def first_channel(task, index):
    """Returns the first channel of a tile, or the end of the last."""
    if index == task.tiles:
        return task.all_channels
    return task.all_channels * index // task.tiles // LANES * LANES


@jitted
def _moved(address, by):
    """Moves an address, but not one of zero, which means that there is no such tensor."""
    return address + by if address else 0


def _copied(task, address):
    """Copies a task to ``address``."""
    ctypes.memmove(address, ctypes.addressof(task), ctypes.sizeof(task))
    return Task.from_address(address)


@overload(_copied)
def _copied_record(task, address):
    return lambda task, address: _copied_bytes(task, address)


@intrinsic
def _copied_bytes(context, task, address):
    def code(context, builder, signature, args):
        source, place = args[0], builder.inttoptr(args[1], args[0].type)
        size, flag = ir.IntType(64), ir.IntType(1)
        kind = ir.FunctionType(ir.VoidType(), [source.type, source.type, size, flag])
        copy = llvm_function(builder, kind, "llvm.memcpy.p0.p0.i64")
        builder.call(copy, [place, source, size(ctypes.sizeof(Task)), flag(0)])
        return place

    return task(task, address), code
