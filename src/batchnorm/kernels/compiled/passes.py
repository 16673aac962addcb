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
    CENTER,
    OFFSET,
    ROWS,
    X_HAT_FACTOR,
    merge_grads,
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
    share,
    steps_of,
    task_at,
)
from batchnorm.kernels.compiled.tiles import by_tiles


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
    def scratch_of(task, width):
        """Partial sums of as many columns, coefficients of the channels, and of the columns.

        The last two are the same if each channel has one column.
        """
        partials = array_at(task.scratch + task.partials, (task.slabs, SUMS, width), np.float64)
        numbers = array_at(task.scratch + task.coefficients, (ROWS, task.channels), number)
        at = task.coefficients if width == task.channels else task.spread
        return partials, numbers, array_at(task.scratch + at, (ROWS, width), number)

    return tensors_of, scratch_of


def _sums_of(number):
    @jitted
    def sums_of(task, thread, team):
        work = array_at(task.scratch + task.work, (team, *planes.WORK), np.float64)
        recent = array_at(task.scratch + task.recent, (team, *planes.RECENT), number)
        return Sums(work[thread], recent[thread])

    return sums_of


def forward_of_planes(element, number, optional_at):
    """Makes the forward kernel of planes."""
    tensors_of, scratch_of = _arrays_of(element, number, optional_at)
    sums_of = _sums_of(number)

    def forward(pointer, thread, team):
        task = task_at(pointer)
        tensors = tensors_of(task, task.rows * task.channels, task.length)
        partials, numbers, _ = scratch_of(task, task.channels)
        sums, steps = sums_of(task, thread, team), steps_of(task)
        channels, of_slabs, of_pieces = planes.shares(task, steps, tensors.x, thread, team)
        group = planes.channels_at_a_time(task, steps, tensors.x, 1)
        for first in range(channels[0], channels[1], group):
            last = min(first + group, channels[1])
            if steps & COLLECT:
                planes.collect(tensors.x, task.channels, partials, sums, first, last, of_slabs)
            if steps & MERGE:
                samples = array_at(task.x, (task.rows, task.channels, task.length), element)
                gather_moments(partials, first, last)
                merge_moments(task, samples, partials[0], first, last)
            if steps & PREPARE:
                prepare(task, numbers, first, last)
            if steps & APPLY:
                planes.normalize(task, tensors, numbers, first, last, of_pieces)

    return forward


def backward_of_planes(element, number, optional_at):
    """Makes the backward kernel of planes."""
    tensors_of, scratch_of = _arrays_of(element, number, optional_at)
    sums_of = _sums_of(number)

    def backward(pointer, thread, team):
        task = task_at(pointer)
        tensors = tensors_of(task, task.rows * task.channels, task.length)
        partials, numbers, _ = scratch_of(task, task.channels)
        sums, steps = sums_of(task, thread, team), steps_of(task)
        channels, of_slabs, of_pieces = planes.shares(task, steps, tensors.x, thread, team)
        group = planes.channels_at_a_time(task, steps, tensors.x, 2)
        for first in range(channels[0], channels[1], group):
            last = min(first + group, channels[1])
            if steps & PREPARE:
                prepare(task, numbers, first, last)
            if steps & COLLECT:
                planes.grad_sums(task, tensors, partials, numbers, sums, first, last, of_slabs)
            if steps & MERGE:
                gather_grads(partials, first, last)
                merge_grads(task, partials[0], numbers, first, last)
            if steps & TAKE_MEANS:
                take_means(task, numbers, first, last)
            if steps & APPLY:
                planes.grad_input(task, tensors, numbers, first, last, of_pieces)

    return backward


def forward_of_columns(element, number, optional_at):
    """Makes the forward kernel of columns."""
    tensors_of, scratch_of = _arrays_of(element, number, optional_at)

    @jitted
    def forward(task, thread, team):
        width = task.fold * task.channels * task.repeat
        of_row = task.fold * task.all_channels * task.repeat
        tensors = tensors_of(task, task.rows, of_row)
        partials, numbers, of_columns = scratch_of(task, width)
        work = array_at(task.scratch + task.work, (team, 3, width), number)[thread]
        steps = steps_of(task)
        channels, own = columns.shares(task, width, thread, team)
        spreads = channels[1] > 0 and width > task.channels
        from_slab, to_slab = share(task.slabs, thread, team)
        if steps & COLLECT:
            for slab in range(from_slab, to_slab):
                columns.collect(tensors.x, partials, work, slab)
        if steps & MERGE:
            gather_moments(partials, own[0], own[1])
            if spreads:
                gather_columns(partials[0], task.channels, task.repeat)
            shape = (task.rows * task.fold, task.all_channels, task.repeat)
            samples = array_at(task.x, shape, element)
            merge_moments(task, samples, partials[0], channels[0], channels[1])
        if steps & PREPARE:
            prepare(task, numbers, channels[0], channels[1])
            if spreads:
                spread(numbers, of_columns, CENTER, OFFSET + 1, task.repeat)
        if steps & APPLY:
            for slab in range(to_slab - 1, from_slab - 1, -1):
                columns.normalize(task, tensors, of_columns, slab)

    return by_tiles(forward, element, number)


def backward_of_columns(element, number, optional_at):
    """Makes the backward kernel of columns."""
    tensors_of, scratch_of = _arrays_of(element, number, optional_at)

    @jitted
    def backward(task, thread, team):
        width = task.fold * task.channels * task.repeat
        of_row = task.fold * task.all_channels * task.repeat
        tensors = tensors_of(task, task.rows, of_row)
        partials, numbers, of_columns = scratch_of(task, width)
        work = array_at(task.scratch + task.work, (team, 3, width), number)[thread]
        steps = steps_of(task)
        channels, own = columns.shares(task, width, thread, team)
        spreads = channels[1] > 0 and width > task.channels
        from_slab, to_slab = share(task.slabs, thread, team)
        if steps & PREPARE:
            prepare(task, numbers, channels[0], channels[1])
            if spreads:
                spread(numbers, of_columns, CENTER, OFFSET + 1, task.repeat)
        if steps & COLLECT:
            for slab in range(from_slab, to_slab):
                columns.grad_sums(task, tensors, partials, of_columns, work, slab)
        if steps & MERGE:
            gather_grads(partials, own[0], own[1])
            if spreads:
                gather_grads_of_columns(partials[0], task.channels, task.repeat)
            merge_grads(task, partials[0], numbers, channels[0], channels[1])
        if steps & TAKE_MEANS:
            take_means(task, numbers, channels[0], channels[1])
        if spreads and steps & (MERGE | TAKE_MEANS):
            spread(numbers, of_columns, X_HAT_FACTOR, ROWS, task.repeat)
        if steps & APPLY:
            for slab in range(to_slab - 1, from_slab - 1, -1):
                columns.grad_input(task, tensors, of_columns, slab)

    return by_tiles(backward, element, number)
