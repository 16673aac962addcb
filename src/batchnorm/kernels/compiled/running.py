"""The running statistics moved by one compiled call: in torch it takes ten small operations."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import config, types
from torch import Tensor

from batchnorm.kernels.compiled import library
from batchnorm.kernels.compiled.elements import array_at

NUMBERS = {torch.float32: np.float32, torch.float64: np.float64}
SIGNATURE = types.float64(*[types.uintp] * 5, types.intp, types.float64, types.float64)
_Prototype = ctypes.CFUNCTYPE(
    ctypes.c_double, *[ctypes.c_size_t] * 5, ctypes.c_ssize_t, ctypes.c_double, ctypes.c_double
)


def update(
    running_mean: Tensor,
    running_var: Tensor,
    counter: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: object,
    weight: object,
) -> float | None:
    """Moves contiguous buffers of one dtype towards float64 statistics, and counts one more batch.

    Returns:
        The largest variance, or None if the buffers are something else and nothing was done.
    """
    dtype = running_mean.dtype
    if not (
        type(weight) is float
        and type(count) is int
        and dtype in NUMBERS
        and running_var.dtype == dtype
        and mean.dtype == torch.float64
        and running_mean.is_contiguous()
        and running_var.is_contiguous()
        and not running_mean.is_inference()
        and not running_var.is_inference()
        and (counter is None or _counts(counter))
    ):
        return None
    largest = _kernel(dtype)(
        running_mean.data_ptr(),
        running_var.data_ptr(),
        0 if counter is None else counter.data_ptr(),
        mean.data_ptr(),
        var.data_ptr(),
        mean.numel(),
        weight,
        count / (count - 1),
    )
    buffers = (running_mean, running_var)
    torch.autograd.graph.increment_version(buffers if counter is None else (*buffers, counter))
    return largest


def _counts(counter: Tensor) -> bool:
    return counter.dtype == torch.int64 and counter.dim() == 0 and not counter.is_inference()


@cache
def _kernel(dtype: torch.dtype) -> Any:
    function = _of(NUMBERS[dtype])
    if config.DISABLE_JIT:
        return function
    name = f"running_{np.dtype(NUMBERS[dtype]).name}"
    return _Prototype(library.compiled(name, function, SIGNATURE))


def _of(number):
    """The kernel for buffers of ``number``."""

    def move(running_mean, running_var, counter, mean, var, channels, weight, unbiased):
        old_mean = array_at(running_mean, (channels,), number)
        old_var = array_at(running_var, (channels,), number)
        new_mean = array_at(mean, (channels,), np.float64)
        new_var = array_at(var, (channels,), np.float64)
        if counter:
            array_at(counter, (1,), np.int64)[0] += 1
        largest = 0.0
        for c in range(channels):
            old_mean[c] = (1 - weight) * float(old_mean[c]) + weight * new_mean[c]
            old_var[c] = (1 - weight) * float(old_var[c]) + weight * (new_var[c] * unbiased)
            if new_var[c] > largest:
                largest = new_var[c]
        return largest

    return move
