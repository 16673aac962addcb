"""The four kernels: forward and backward, of planes and of columns, in one stage or in several.

Each function here makes the kernel for one dtype: ``element`` is stored, ``number`` is computed.
``optional_at`` is `array_at` if there may be a residual and a mask, else `no_array`; then nothing
is compiled for them.
"""

from __future__ import annotations

import numpy as np

from batchnorm.kernels.compiled import columns, planes
from batchnorm.kernels.compiled.channel_sums import (
    SUMS,
    gather_columns,
    gather_grads,
    gather_grads_of_columns,
    gather_moments,
    merge_moments,
)
from batchnorm.kernels.compiled.coefficients import (
    OFFSET,
    ROWS,
    X_HAT_FACTOR,
    prepare,
    spread,
    take_means,
)
from batchnorm.kernels.compiled.elements import array_at
from batchnorm.kernels.compiled.maps import Tensors
from batchnorm.kernels.compiled.numba_internals import jitted
from batchnorm.kernels.compiled.rows import Sums
from batchnorm.kernels.compiled.task import (
    APPLY,
    COLLECT,
    MERGE,
    PREPARE,
    TAKE_MEANS,
    steps_of,
    task_at,
)
from batchnorm.kernels.compiled.vectors import FEW, zero_vector_like


def _arrays_of(element, number, optional_at):
    """Makes the functions that turn the addresses of a task into arrays."""

    @jitted
    def tensors_of(task, rows, width):
        shape = (rows, width)
        return Tensors(
            array_at(task.x, shape, element),
            optional_at(task.residual, shape, element),
            array_at(task.y, shape, element),
            optional_at(task.mask, (rows, (width + 7) // 8), np.uint8),
            array_at(task.grad, shape, element),
            array_at(task.grad_x, shape, element),
            array_at(task.grad_before_relu, shape, element),
        )

    @jitted
    def vectors_of(task):
        """Weight and bias."""
        shape = (1, task.channels)
        return array_at(task.weight, shape, number), array_at(task.bias, shape, number)

    @jitted
    def scratch_of(task, width, thread):
        """Partial sums and coefficients of as many columns, and sums of some rows of a thread.

        The first two are the team's, or a thread's own if threads share tiles.
        """
        own = thread * task.widest if task.tiles > 1 else 0
        at = task.scratch + task.partials + 8 * own * task.slabs * SUMS
        partials = array_at(at, (task.slabs, SUMS, width), np.float64)
        at = task.scratch + task.coefficients + 8 * own * ROWS
        numbers = array_at(at, (ROWS, width), number)
        at = task.scratch + task.work + 8 * thread * task.widest * columns.WORK_ROWS
        return partials, numbers, array_at(at, (columns.WORK_ROWS, width), number)

    return tensors_of, vectors_of, scratch_of


def _sums_of(number):
    @jitted
    def sums_of(task, thread, team):
        work = array_at(task.scratch + task.work, (team, *planes.WORK), np.float64)
        recent = array_at(task.scratch + task.recent, (team, *planes.RECENT), number)
        return Sums(work[thread], recent[thread])

    return sums_of


def forward_of_planes(element, number, optional_at):
    """Makes the forward kernel of planes."""
    tensors_of, vectors_of, scratch_of = _arrays_of(element, number, optional_at)
    sums_of = _sums_of(number)

    def forward(pointer, thread, team):
        task = task_at(pointer)
        tensors = tensors_of(task, task.rows * task.channels, task.length)
        weight, bias = vectors_of(task)
        partials, numbers, _ = scratch_of(task, task.channels, 0)
        sums, steps = sums_of(task, thread, team), steps_of(task)
        channels, of_slabs, of_pieces = planes.shares(task, steps, tensors.x, thread, team)
        group = planes.channels_at_a_time(task, steps, tensors.x, 1)
        for first in range(channels[0], channels[1], group):
            last = min(first + group, channels[1])
            if steps & COLLECT:
                planes.collect(tensors.x, task.channels, partials, sums, first, last, of_slabs)
            if steps & MERGE:
                samples = array_at(task.x, (task.rows, task.channels, task.length), element)
                gather_moments(partials, first, last, 0.0)
                merge_moments(task, samples, partials[0], first, last, 0, 0.0)
            if steps & PREPARE:
                prepare(task, numbers, weight, bias, first, last, 0, 0.0)
            if steps & APPLY:
                planes.normalize(task, tensors, numbers, first, last, of_pieces)

    return forward


def backward_of_planes(element, number, optional_at):
    """Makes the backward kernel of planes."""
    tensors_of, vectors_of, scratch_of = _arrays_of(element, number, optional_at)
    sums_of = _sums_of(number)

    def backward(pointer, thread, team):
        task = task_at(pointer)
        tensors = tensors_of(task, task.rows * task.channels, task.length)
        weight, bias = vectors_of(task)
        partials, numbers, _ = scratch_of(task, task.channels, 0)
        sums, steps = sums_of(task, thread, team), steps_of(task)
        channels, of_slabs, of_pieces = planes.shares(task, steps, tensors.x, thread, team)
        group = planes.channels_at_a_time(task, steps, tensors.x, 2)
        for first in range(channels[0], channels[1], group):
            last = min(first + group, channels[1])
            if steps & PREPARE:
                prepare(task, numbers, weight, bias, first, last, 0, 0.0)
            if steps & COLLECT:
                planes.grad_sums(task, tensors, partials, numbers, sums, first, last, of_slabs)
            if steps & MERGE:
                gather_grads(partials, first, last, 0.0)
            if steps & (MERGE | TAKE_MEANS):
                merges = steps & MERGE != 0
                take_means(task, partials[0], numbers, weight, first, last, 0, merges, 0.0)
            if steps & APPLY:
                planes.grad_input(task, tensors, numbers, first, last, of_pieces)

    return backward


def forward_of_columns(element, number, optional_at):
    """Makes the forward kernel of columns."""
    tensors_of, vectors_of, scratch_of = _arrays_of(element, number, optional_at)

    def forward(pointer, thread, team):
        task = task_at(pointer)
        tensors = tensors_of(task, task.rows, task.fold * task.channels * task.repeat)
        weight, bias = vectors_of(task)
        steps, tiles = steps_of(task), columns.tiles_of(task, thread, team)
        for tile in range(tiles[0], tiles[1]):
            origin, end = columns.channels_of(task, tile)
            begin, channels = origin * task.repeat, end - origin
            width = task.fold * channels * task.repeat
            # What a channel has one of is in the last columns of the scratch memory.
            home = origin - (width - channels)
            partials, numbers, work = scratch_of(task, width, thread)
            zero = zero_vector_like(partials, FEW)
            slabs, own = columns.shares(task, width, thread, team)
            first, last = columns.channels_in(task, origin, own)
            spreads = first < last and width > channels
            if steps & COLLECT:
                for slab in range(slabs[0], slabs[1]):
                    columns.collect(tensors.x, begin, partials, work, slab)
            if steps & MERGE:
                gather_moments(partials, own[0], own[1], zero)
                if spreads:
                    gather_columns(partials[0], channels, task.repeat, zero)
                shape = (task.rows * task.fold, task.channels, task.repeat)
                samples = array_at(task.x, shape, element)
                merge_moments(task, samples, partials[0], first, last, home, zero)
            if steps & PREPARE:
                prepare(task, numbers, weight, bias, first, last, home, zero)
                if spreads:
                    spread(numbers, 0, OFFSET + 1, channels, task.repeat)
            if steps & APPLY:
                for slab in range(slabs[1] - 1, slabs[0] - 1, -1):
                    columns.normalize(task, tensors, begin, numbers, slab)

    return forward


def backward_of_columns(element, number, optional_at):
    """Makes the backward kernel of columns."""
    tensors_of, vectors_of, scratch_of = _arrays_of(element, number, optional_at)

    def backward(pointer, thread, team):
        task = task_at(pointer)
        tensors = tensors_of(task, task.rows, task.fold * task.channels * task.repeat)
        weight, bias = vectors_of(task)
        steps, tiles = steps_of(task), columns.tiles_of(task, thread, team)
        for tile in range(tiles[0], tiles[1]):
            origin, end = columns.channels_of(task, tile)
            begin, channels = origin * task.repeat, end - origin
            width = task.fold * channels * task.repeat
            # What a channel has one of is in the last columns of the scratch memory.
            home = origin - (width - channels)
            partials, numbers, work = scratch_of(task, width, thread)
            zero = zero_vector_like(partials, FEW)
            slabs, own = columns.shares(task, width, thread, team)
            first, last = columns.channels_in(task, origin, own)
            spreads = first < last and width > channels
            if steps & PREPARE:
                prepare(task, numbers, weight, bias, first, last, home, zero)
                if spreads:
                    spread(numbers, 0, OFFSET + 1, channels, task.repeat)
            if steps & COLLECT:
                for slab in range(slabs[0], slabs[1]):
                    columns.grad_sums(task, tensors, begin, partials, numbers, work, slab)
            if steps & MERGE:
                gather_grads(partials, own[0], own[1], zero)
                if spreads:
                    gather_grads_of_columns(partials[0], channels, task.repeat)
            if steps & (MERGE | TAKE_MEANS):
                merges = steps & MERGE != 0
                take_means(task, partials[0], numbers, weight, first, last, home, merges, zero)
                if spreads:
                    spread(numbers, X_HAT_FACTOR, ROWS, channels, task.repeat)
            if steps & APPLY:
                for slab in range(slabs[1] - 1, slabs[0] - 1, -1):
                    columns.grad_input(task, tensors, begin, numbers, slab)

    return backward
