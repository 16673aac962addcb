"""The forward kernels: collect, merge and apply, in one stage or in several."""

from __future__ import annotations

import numpy as np

from batchnorm.kernels.compiled import columns, planes
from batchnorm.kernels.compiled.elements import array_at
from batchnorm.kernels.compiled.merging import merge_moments, prepare
from batchnorm.kernels.compiled.statistics import SUMS
from batchnorm.kernels.compiled.task import (
    APPLY,
    COLLECT,
    MERGE,
    PREPARE,
    share,
    steps_of,
    task_at,
)


def of_planes(element, number, optional_at):
    """The kernel for planes of ``element``, computed as ``number``.

    ``optional_at`` is `array_at` if there is a residual, and perhaps a mask, else `no_array`.
    """

    def forward(pointer, thread, team):
        task = task_at(pointer)
        samples = (task.rows, task.channels, task.length)
        shape = (task.rows * task.channels, task.length)
        x, y = array_at(task.x, shape, element), array_at(task.y, shape, element)
        residual = optional_at(task.residual, shape, element)
        mask = optional_at(task.mask, (shape[0], (task.length + 7) // 8), np.uint8)
        weight = array_at(task.weight, (task.channels,), number)
        bias = array_at(task.bias, (task.channels,), number)
        partials = array_at(
            task.scratch + task.partials, (task.slabs, SUMS, task.channels), np.float64
        )
        coefficients = array_at(task.scratch + task.coefficients, (6, task.channels), number)
        sums = (
            array_at(task.scratch + task.work, (team, *planes.WORK), np.float64)[thread],
            array_at(task.scratch + task.recent, (team, *planes.RECENT), number)[thread],
        )
        steps = steps_of(task)
        channels, of_slabs, of_pieces = planes.shares(task, steps, x, thread, team)
        group = (
            planes.group_size(x, task.channels, 1)
            if steps & COLLECT and steps & APPLY
            else max(1, task.channels)
        )
        for first in range(channels[0], channels[1], group):
            last = min(first + group, channels[1])
            if steps & COLLECT:
                planes.collect(x, task.channels, partials, sums, first, last, of_slabs)
            if steps & MERGE:
                of_channels = array_at(task.x, samples, element)
                merge_moments(task, of_channels, partials, first, last)
            if steps & PREPARE:
                prepare(task, coefficients, weight, bias, first, last)
            if steps & APPLY:
                planes.normalize(task, x, residual, y, mask, coefficients, first, last, of_pieces)

    return forward


def of_columns(element, number, optional_at):
    """The kernel for columns; its arguments are those of `of_planes`."""

    def forward(pointer, thread, team):
        task = task_at(pointer)
        width = task.fold * task.channels * task.repeat
        shape = (task.rows, width)
        x, y = array_at(task.x, shape, element), array_at(task.y, shape, element)
        residual = optional_at(task.residual, shape, element)
        mask = optional_at(task.mask, (task.rows, (width + 7) // 8), np.uint8)
        weight = array_at(task.weight, (task.channels,), number)
        bias = array_at(task.bias, (task.channels,), number)
        partials = array_at(task.scratch + task.partials, (task.slabs, SUMS, width), np.float64)
        coefficients = array_at(task.scratch + task.coefficients, (6, width), number)
        work = array_at(task.scratch + task.work, (team, 3, width), number)[thread]
        steps = steps_of(task)
        channels, own = columns.shares(task, width, thread, team)
        from_slab, to_slab = share(task.slabs, thread, team)
        if steps & COLLECT:
            for slab in range(from_slab, to_slab):
                columns.collect(x, partials, work, slab)
        if steps & MERGE:
            samples = (task.rows * task.fold, task.channels, task.repeat)
            of_channels = array_at(task.x, samples, element)
            columns.gather_moments(partials, own[0], own[1])
            merge_moments(task, of_channels, partials[:1], channels[0], channels[1])
        if steps & PREPARE:
            prepare(task, coefficients, weight, bias, channels[0], channels[1])
        if steps & APPLY:
            for slab in range(to_slab - 1, from_slab - 1, -1):
                columns.normalize(task, x, residual, y, mask, coefficients, slab, task.slabs)

    return forward
