"""The forward kernels: collect, merge and apply, in one call or in several."""

from __future__ import annotations

import numpy as np
from numba import njit

from batchnorm.kernels.compiled import columns, planes
from batchnorm.kernels.compiled.elements import array_at
from batchnorm.kernels.compiled.merging import merge_moments, prepare
from batchnorm.kernels.compiled.task import task_at


@njit
def share(whole, thread, team):
    """First and last of a thread's share."""
    return whole * thread // team, whole * (thread + 1) // team


def of_planes(element, number):
    """The kernel for planes of ``element``, computed as ``number``."""

    def forward(pointer, thread, team):
        task = task_at(pointer)
        samples = (task.rows, task.channels, task.length)
        shape = (task.rows * task.channels, task.length)
        x, y = array_at(task.x, shape, element), array_at(task.y, shape, element)
        residual = array_at(task.residual, shape, element)
        mask = array_at(task.mask, (shape[0], (task.length + 7) // 8), np.uint8)
        weight = array_at(task.weight, (task.channels,), number)
        bias = array_at(task.bias, (task.channels,), number)
        partials = array_at(task.partials, (task.slabs, 7, task.channels), np.float64)
        coefficients = array_at(task.coefficients, (6, task.channels), number)
        work = array_at(task.work, (team, *planes.WORK), np.float64)[thread]
        channels, slabs = (0, task.channels), (0, task.slabs)
        begin, end = planes.share_of_pieces(x, task.channels, 0, 1)
        if task.by_slab:
            slabs = share(task.slabs, thread, team)
            begin, end = planes.share_of_pieces(x, task.channels, thread, team)
        else:
            channels = share(task.channels, thread, team)
        group = (
            planes.group_size(x, task.channels, 1)
            if task.collect and task.apply
            else max(1, task.channels)
        )
        for first in range(channels[0], channels[1], group):
            last = min(first + group, channels[1])
            if task.collect:
                for slab in range(slabs[0], slabs[1]):
                    planes.collect(x, task.channels, partials, work, first, last, slab)
            if task.merge:
                of_channels = array_at(task.x, samples, element)
                merge_moments(task, of_channels, partials, first, last)
            if task.prepare:
                prepare(task, coefficients, weight, bias, first, last)
            if task.apply:
                planes.normalize(task, x, residual, y, mask, coefficients, first, last, begin, end)

    return forward


def of_columns(element, number):
    """The kernel for columns of ``element``, computed as ``number``."""

    def forward(pointer, thread, team):
        task = task_at(pointer)
        width = task.fold * task.channels * task.repeat
        shape = (task.rows, width)
        x, y = array_at(task.x, shape, element), array_at(task.y, shape, element)
        residual = array_at(task.residual, shape, element)
        mask = array_at(task.mask, (task.rows, (width + 7) // 8), np.uint8)
        weight = array_at(task.weight, (task.channels,), number)
        bias = array_at(task.bias, (task.channels,), number)
        partials = array_at(task.partials, (task.slabs, 7, width), np.float64)
        coefficients = array_at(task.coefficients, (6, width), number)
        work = array_at(task.work, (team, 3, width), number)[thread]
        from_slab, to_slab = share(task.slabs, thread, team)
        if task.collect:
            for slab in range(from_slab, to_slab):
                columns.collect(x, partials, work, slab)
        if task.merge:
            samples = (task.rows * task.fold, task.channels, task.repeat)
            columns.gather_moments(partials)
            merge_moments(task, array_at(task.x, samples, element), partials[:1], 0, task.channels)
        if task.prepare:
            prepare(task, coefficients, weight, bias, 0, task.channels)
        if task.apply:
            for slab in range(to_slab - 1, from_slab - 1, -1):
                columns.normalize(task, x, residual, y, mask, coefficients, slab, task.slabs)

    return forward
