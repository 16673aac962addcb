"""Batch normalization on a CPU, compiled by Numba: memory is read and written once where it can be.

The loops stand in `batchnorm.kernels.compiled`. This module lays out tensors, allocates results and
tells the loops what to do. Statistics are merged in float64 from sums over short runs; no result
depends on the number of threads.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from batchnorm.kernels import parallel
from batchnorm.kernels.compiled import library
from batchnorm.kernels.compiled.library import Options
from batchnorm.kernels.compiled.task import Addresses
from batchnorm.kernels.contract import Gate, Gradients, Running
from batchnorm.kernels.geometry import geometry_of, is_channels_last, mask_size
from batchnorm.moments import Moments

# What running statistics may be to be moved by the kernels.
_BUFFERS = (torch.float32, torch.float64)
# Up to so many channels, a vector of each size is kept to make others like it.
_USUAL = 4096
# Named, because torch.set_default_device may have set another one.
_CPU = torch.device("cpu")
_ALL_FORWARD = ("collect", "merge", "prepare", "apply")
_ALL_BACKWARD = ("prepare", "collect", "merge", "apply")
_FLAGS = (False, True)
_FORWARD = {key: Options(relu=key[0], single=key[1]) for key in product(_FLAGS, repeat=2)}
_BACKWARD = {
    key: Options(relu=key[0], fixed=key[1], narrow=key[2]) for key in product(_FLAGS, repeat=3)
}


def refusal(x: Tensor) -> str | None:
    """Takes plain CPU tensors of the four usual floating dtypes."""
    if not x.is_cpu:
        return f"it is on {x.device}, and these kernels are for the CPU"
    if x.dtype not in library.ELEMENTS:
        return f"its dtype is {x.dtype}"
    if x.layout != torch.strided:
        return f"its layout is {x.layout}"
    return None


def explain(x: Tensor) -> str:
    """How these kernels go through ``x``, which they take."""
    geometry, team = geometry_of(x), library.team_for(x)
    text = "The Numba kernels compute this input as " + (
        "columns of a matrix, " if geometry.columns else "planes, "
    )
    if _laid_out(x) is not x:
        text += "after copying it into contiguous memory, "
    if team == 1:
        return text + "on the calling thread."
    by_channel = library.shares_channels(geometry, "forward", x.nbytes, team)
    shares = "channels" if by_channel else "rows"
    return f"{text}whose {shares} are shared out to {team} threads of {parallel.backend()}."


def moments(x: Tensor) -> Moments:
    """Mean and biased variance of each channel, in float64."""
    x = _laid_out(x)
    mean, var = _new_statistics(x)
    plan = library.plan("forward", ("collect", "merge"), x, Options())
    plan.run(Addresses(x=x.data_ptr(), mean=mean.data_ptr(), var=var.data_ptr()), 0.0)
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
    """One read and one write; mean and variance of float32 are read as they are."""
    return _normalize(("prepare", "apply"), x, mean, var, eps, weight, bias, residual, relu=relu)


def grad_sums(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    weight: Tensor | None,
    gate: Gate | None = None,
) -> tuple[Tensor, Tensor]:
    """Both sums in one pass."""
    sums, steps = _new_statistics(x), ("prepare", "collect", "merge")
    options = Options(relu=gate is not None)
    _backward(steps, grad_output, x, mean, var, eps, weight, gate, sums, options)
    return sums


def grad_input(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    weight: Tensor | None,
    sum_grad: Tensor,
    sum_grad_x_hat: Tensor,
    gate: Gate | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Two reads and one write."""
    sums = sum_grad, sum_grad_x_hat
    # Where a mask has to be unpacked, that is done together with the sums.
    masked = gate is not None and gate.mask is not None
    steps = ("prepare", "collect", "merge", "apply") if masked else ("prepare", "merge", "apply")
    options = Options(relu=gate is not None, given=True)
    return _backward(steps, grad_output, x, mean, var, eps, weight, gate, sums, options)


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
    """`moments`, then `normalize` by them, while the data is in the cache.

    Usual running statistics are moved: float32 or float64, the weight a number.
    """
    mean, var = _new_statistics(x)
    if running is not None and not _is_usual(running, x, weight, bias):
        running = None
    y, mask = _normalize(
        _ALL_FORWARD, x, mean, var, eps, weight, bias, residual, relu=relu, running=running
    )
    return y, Moments(x.numel() // x.shape[1], mean, var), mask


def _is_usual(running: Running, *read: Tensor | None) -> bool:
    """Whether the kernels can move these while they still read the others."""
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
    """``y`` and perhaps a mask; mean and variance are filled first, if the steps say so."""
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
    plan = library.plan("forward", steps, x, options, optional=residual is not None)
    plan.run(addresses, eps, running)
    return y, mask


def backward(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    weight: Tensor | None,
    gate: Gate | None = None,
    *,
    fixed: bool = False,
) -> Gradients:
    """`grad_sums`, then `grad_input` by them, while the data is in the cache."""
    sums = _new_sums(weight, x)
    options = _BACKWARD[gate is not None, fixed, sums[0].dtype != torch.float64]
    grad_x, behind_relu = _backward(
        _ALL_BACKWARD, grad_output, x, mean, var, eps, weight, gate, sums, options
    )
    return Gradients(grad_x, sums[1], sums[0], behind_relu)


def _backward(
    steps: tuple[str, ...],
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    weight: Tensor | None,
    gate: Gate | None,
    sums: tuple[Tensor, Tensor],
    options: Options,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``x`` and ``residual``; ``sums`` are filled, or read if they are given."""
    x, dtype = _laid_out(x), _number_dtype(x)
    bias, mask = (None, None) if gate is None else gate
    mask = None if mask is None else _as(torch.uint8, mask)
    weight = None if weight is None else _as(dtype, weight)
    bias = None if bias is None else _as(dtype, bias)
    grad_output = _laid_out_like(x, grad_output)
    mean, var = _as(torch.float64, mean), _as(torch.float64, var)
    grad_x = torch.empty_like(x)
    behind_relu = None if mask is None else torch.empty_like(x)
    addresses = Addresses(
        x=x.data_ptr(),
        mask=_address(mask),
        grad=grad_output.data_ptr(),
        grad_x=grad_x.data_ptr(),
        behind_relu=_address(behind_relu),
        weight=_address(weight),
        bias=_address(bias),
        mean=mean.data_ptr(),
        var=var.data_ptr(),
        sum_grad=sums[0].data_ptr(),
        sum_grad_x_hat=sums[1].data_ptr(),
    )
    plan = library.plan("backward", steps, x, options, optional=mask is not None)
    plan.run(addresses, eps)
    return grad_x, behind_relu


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
    like = _usual_statistics(channels) if channels <= _USUAL else _new_statistic(channels)
    return torch.empty_like(like), torch.empty_like(like)


@lru_cache(256)
def _usual_statistics(channels: int) -> Tensor:
    """To make others like it, in half the time."""
    with torch.inference_mode(False):
        return _new_statistic(channels)


def _new_statistic(channels: int) -> Tensor:
    return torch.empty(channels, dtype=torch.float64, device=_CPU)


def _new_sums(weight: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """For the gradients of weight and bias, rounded at once if the weight is of float32."""
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
    """In which numbers elements of ``x`` are computed."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _as(dtype: torch.dtype, vector: Tensor) -> Tensor:
    """What a kernel can read, also if a hook on saved tensors has given back something else."""
    if vector.dtype == dtype and vector.is_contiguous():
        return vector
    return vector.to(dtype).contiguous()
