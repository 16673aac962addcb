"""Batch normalization on a CPU in compiled loops, in as few passes over memory as possible.

The loops are in `batchnorm.kernels.compiled`. This module lays out tensors, allocates results and
fills in the record that the loops are called with. Statistics are merged in float64 from sums over
short runs. No result depends on the number of threads.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from batchnorm.kernels import parallel
from batchnorm.kernels.compiled.compiling import ELEMENTS
from batchnorm.kernels.compiled.plans import Options, Pass, Plan, plan, shares_channels
from batchnorm.kernels.compiled.task import Addresses
from batchnorm.kernels.contract import Gradients, ReluGate, Running
from batchnorm.kernels.geometry import geometry_of, is_channels_last, mask_size
from batchnorm.moments import Moments

# Dtypes of running statistics that the kernels can update.
_BUFFERS = (torch.float32, torch.float64)
# Channels up to which `_template` caches one vector of each size: ``empty_like`` of it takes half
# the time of ``empty``.
_MAX_TEMPLATE = 4096
# Given explicitly, because torch.set_default_device may have set another device.
_CPU = torch.device("cpu")
_ALL_FORWARD = ("collect", "merge", "prepare", "apply")
_ALL_BACKWARD = ("prepare", "collect", "merge", "apply")
_FLAGS = (False, True)
# Made once: a named tuple costs as much as a small tensor.
_FORWARD = {
    (relu, single): Options(relu=relu, statistics_in_float32=single)
    for relu, single in product(_FLAGS, repeat=2)
}
_BACKWARD = {
    (relu, fixed, narrow): Options(relu=relu, fixed=fixed, sums_as_number=narrow)
    for relu, fixed, narrow in product(_FLAGS, repeat=3)
}


def refusal(x: Tensor) -> str | None:
    """Returns None for dense CPU tensors of the four usual floating dtypes, else the reason."""
    if not x.is_cpu:
        return f"it is on {x.device}, and these kernels are for the CPU"
    if x.dtype not in ELEMENTS:
        return f"its dtype is {x.dtype}"
    if x.layout != torch.strided:
        return f"its layout is {x.layout}"
    return None


def describe(x: Tensor) -> str:
    """Describes how these kernels compute ``x``, which they take."""
    geometry, team = geometry_of(x), parallel.team_for(x.nbytes)
    text = "The Numba kernels compute this input as " + (
        "columns of a matrix, " if geometry.columns else "planes, "
    )
    if _laid_out(x) is not x:
        text += "after copying it into contiguous memory, "
    if team == 1:
        return text + "on the calling thread."
    by_channel = shares_channels(geometry, "forward", x.nbytes, team)
    shares = "channels" if by_channel else "rows"
    return f"{text}whose {shares} are shared out to {team} threads of {parallel.backend()}."


def moments(x: Tensor) -> Moments:
    """Computes mean and biased variance of each channel, in float64."""
    x = _laid_out(x)
    mean, var = _new_statistics(x)
    _plan("forward", ("collect", "merge"), x, _FORWARD[False, False]).run(
        Addresses(x=x.data_ptr(), mean=mean.data_ptr(), var=var.data_ptr()), 0.0
    )
    return Moments(x.numel() // x.shape[1], mean, var)


def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    *,
    relu: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Normalizes in one read and one write; it reads mean and variance of float32 as they are."""
    return _normalize(("prepare", "apply"), x, mean, var, eps, weight, bias, residual, relu=relu)


def grad_sums(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    weight: Tensor | None,
    gate: ReluGate | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes both sums in one pass."""
    sums, steps = _new_statistics(x), ("prepare", "collect", "merge")
    options = _BACKWARD[gate is not None, False, False]
    _backward(steps, grad_output, x, mean, var, eps, weight, gate, options, sums=sums)
    return sums


def grad_input(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    weight: Tensor | None,
    mean_grad: Tensor,
    mean_grad_x_hat: Tensor,
    gate: ReluGate | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Computes the gradient in two reads and one write."""
    masked = gate is not None and gate.mask is not None
    # The loops that collect sums also write the gradient that has passed the mask.
    collect = ("collect",) if masked else ()
    steps = ("prepare", *collect, "take_means", "apply")
    options = _BACKWARD[gate is not None, False, False]
    means = _as(torch.float64, mean_grad), _as(torch.float64, mean_grad_x_hat)
    return _backward(steps, grad_output, x, mean, var, eps, weight, gate, options, means=means)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    *,
    relu: bool = False,
    running: Running | None = None,
) -> tuple[Tensor, Moments, Tensor | None]:
    """Composes `moments` and `normalize`, while the data is in the cache.

    It updates running statistics of float32 or float64 if the weight is a number.
    """
    mean, var = _new_statistics(x)
    if running is not None and not _can_update(running, x, weight, bias):
        running = None
    y, mask = _normalize(
        _ALL_FORWARD, x, mean, var, eps, weight, bias, residual, relu=relu, running=running
    )
    return y, Moments(x.numel() // x.shape[1], mean, var), mask


def _can_update(running: Running, *read: Tensor | None) -> bool:
    """Returns whether the kernels can update the statistics while they read the other tensors."""
    mean, var, counter = running.mean, running.var, running.counter
    addresses = [_address(mean), _address(var), *map(_address, read)]
    return (
        type(running.weight) is float
        and addresses[0] not in addresses[1:]
        and addresses[1] not in addresses[2:]
        and mean.dtype == var.dtype
        and mean.dtype in _BUFFERS
        and mean.is_contiguous()
        and var.is_contiguous()
        and not mean.is_inference()
        and not var.is_inference()
        and (
            counter is None
            or (counter.dtype == torch.int64 and counter.dim() == 0 and not counter.is_inference())
        )
    )


def _normalize(
    steps: tuple[str, ...],
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    relu: bool,
    running: Running | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Returns ``y`` and perhaps a mask; fills mean and variance first if the steps include that."""
    x, dtype = _laid_out(x), _number_dtype(x)
    y, mask = torch.empty_like(x), _new_mask(x, residual) if relu else None
    residual = None if residual is None else _laid_out_like(x, residual)
    weight = None if weight is None else _as(dtype, weight)
    bias = None if bias is None else _as(dtype, bias)
    single = mean.dtype == torch.float32 == var.dtype
    kind = torch.float32 if single else torch.float64
    mean, var = _as(kind, mean), _as(kind, var)
    addresses = Addresses(
        x=x.data_ptr(),
        residual=_address(residual),
        y=y.data_ptr(),
        mask=_address(mask),
        weight=_address(weight),
        bias=_address(bias),
        mean=mean.data_ptr(),
        var=var.data_ptr(),
    )
    options = _FORWARD[relu, single]
    _plan("forward", steps, x, options, optional=residual is not None).run(addresses, eps, running)
    return y, mask


def backward(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    weight: Tensor | None,
    gate: ReluGate | None = None,
    *,
    fixed: bool = False,
) -> Gradients:
    """Composes `grad_sums` and `grad_input`, while the data is in the cache."""
    sums = _new_sums(weight, x)
    options = _BACKWARD[gate is not None, fixed, sums[0].dtype != torch.float64]
    grad_x, grad_residual = _backward(
        _ALL_BACKWARD, grad_output, x, mean, var, eps, weight, gate, options, sums=sums
    )
    return Gradients(grad_x, sums[1], sums[0], grad_residual)


def _backward(
    steps: tuple[str, ...],
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    weight: Tensor | None,
    gate: ReluGate | None,
    options: Options,
    *,
    sums: tuple[Tensor, Tensor] | None = None,
    means: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Returns the gradients of ``x`` and ``residual``; fills ``sums``, or reads ``means``."""
    x, dtype = _laid_out(x), _number_dtype(x)
    bias, mask = (None, None) if gate is None else gate
    mask = None if mask is None else _as(torch.uint8, mask)
    weight = None if weight is None else _as(dtype, weight)
    bias = None if bias is None else _as(dtype, bias)
    grad_output = _laid_out_like(x, grad_output)
    mean, var = _as(torch.float64, mean), _as(torch.float64, var)
    grad_x = torch.empty_like(x)
    grad_before_relu = None if mask is None else torch.empty_like(x)
    sum_grad, sum_grad_x_hat = (None, None) if sums is None else sums
    mean_grad, mean_grad_x_hat = (None, None) if means is None else means
    addresses = Addresses(
        x=x.data_ptr(),
        mask=_address(mask),
        grad=grad_output.data_ptr(),
        grad_x=grad_x.data_ptr(),
        grad_before_relu=_address(grad_before_relu),
        weight=_address(weight),
        bias=_address(bias),
        mean=mean.data_ptr(),
        var=var.data_ptr(),
        sum_grad=_address(sum_grad),
        sum_grad_x_hat=_address(sum_grad_x_hat),
        mean_grad=_address(mean_grad),
        mean_grad_x_hat=_address(mean_grad_x_hat),
    )
    _plan("backward", steps, x, options, optional=mask is not None).run(addresses, eps)
    return grad_x, grad_before_relu


def _plan(
    which: Pass, steps: tuple[str, ...], x: Tensor, options: Options, *, optional: bool = False
) -> Plan:
    """The plan for ``x``, which is laid out; the loops get only its shape and address."""
    team = parallel.team_for(x.nbytes)
    return plan(which, steps, x.shape, not x.is_contiguous(), x.dtype, optional, options, team)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _laid_out(x: Tensor) -> Tensor:
    return x if x.is_contiguous() or is_channels_last(x) else x.contiguous()


def _laid_out_like(x: Tensor, other: Tensor) -> Tensor:
    if other.stride() == x.stride() and other.dtype == x.dtype:
        return other
    return torch.empty_like(x).copy_(other)


def _new_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    channels = x.shape[1]
    like = _template(channels) if channels <= _MAX_TEMPLATE else _new_statistic(channels)
    return torch.empty_like(like), torch.empty_like(like)


@lru_cache(256)
def _template(channels: int) -> Tensor:
    """Returns a vector for ``empty_like``."""
    with torch.inference_mode(False):
        return _new_statistic(channels)


def _new_statistic(channels: int) -> Tensor:
    return torch.empty(channels, dtype=torch.float64, device=_CPU)


def _new_sums(weight: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """Allocates the gradients of weight and bias, in float32 if the weight is float32."""
    if weight is None or weight.dtype != torch.float32 or x.dtype == torch.float64:
        return _new_statistics(x)
    return torch.empty_like(weight), torch.empty_like(weight)


def _new_mask(x: Tensor, residual: Tensor | None) -> Tensor | None:
    if residual is None:
        return None
    mask = torch.empty(mask_size(x), dtype=torch.uint8, device=_CPU)
    rows, width = geometry_of(x).matrix
    used = rows * ((width + 7) // 8)
    if used < mask.numel():
        mask[used:] = 0
    return mask


def _number_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype of the arithmetic on elements of ``x``."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _as(dtype: torch.dtype, vector: Tensor) -> Tensor:
    """Makes a vector that a kernel can read; a hook on saved tensors may return any other."""
    if vector.dtype == dtype and vector.is_contiguous():
        return vector
    return vector.to(dtype).contiguous()
