"""Batch normalization on a CPU, compiled by Numba: memory is read and written once where it can be.

The loops stand in `batchnorm.kernels.compiled`. This module lays out tensors, allocates results and
tells the loops what to do. Statistics are merged in float64 from sums over short runs; no result
depends on the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.kernels import parallel
from batchnorm.kernels.compiled import library, running
from batchnorm.kernels.compiled.library import Options, Tensors
from batchnorm.kernels.contract import Gate, Gradients
from batchnorm.kernels.geometry import geometry_of, is_channels_last, mask_size
from batchnorm.moments import Moments

# Named, because torch.set_default_device may have set another one.
_CPU = torch.device("cpu")


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
    shares = "channels" if library.shares_channels(x, "forward", team) else "rows"
    return f"{text}whose {shares} are shared out to {team} threads of {parallel.backend()}."


def update_running(
    running_mean: Tensor, running_var: Tensor, batch: Moments, weight: float | Tensor
) -> float | None:
    """`batchnorm.moments.update_running` in one call, to the same bits.

    Returns:
        The largest variance of the batch, or None if nothing was done.
    """
    return running.update(running_mean, running_var, batch.mean, batch.var, batch.count, weight)


def moments(x: Tensor) -> Moments:
    """Mean and biased variance of each channel, in float64."""
    x = _laid_out(x)
    mean, var = _new_statistics(x)
    library.run("forward", ("collect", "merge"), x, Tensors(mean=mean, var=var), Options())
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
    """One read and one write."""
    x = _laid_out(x)
    y, mask = torch.empty_like(x), _new_mask(x, residual) if relu else None
    library.run(
        "forward",
        ("prepare", "apply"),
        x,
        Tensors(
            residual=_laid_out_like(x, residual),
            y=y,
            mask=mask,
            weight=_parameter(weight, x),
            bias=_parameter(bias, x),
            mean=mean,
            var=var,
        ),
        Options(relu=relu, eps=eps),
    )
    return y, mask


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
    sums, options = _new_statistics(x), Options(gate is not None, eps=eps)
    steps = ("prepare", "collect", "merge")
    _backward(steps, grad_output, x, mean, var, weight, gate, sums, options)
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
    options = Options(gate is not None, given=True, eps=eps)
    return _backward(steps, grad_output, x, mean, var, weight, gate, sums, options)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    *,
    relu: bool = False,
) -> tuple[Tensor, Moments, Tensor | None]:
    """`moments`, then `normalize` by them, while the channel is in the cache."""
    x = _laid_out(x)
    y, mask = torch.empty_like(x), _new_mask(x, residual) if relu else None
    mean, var = _new_statistics(x)
    library.run(
        "forward",
        ("collect", "merge", "prepare", "apply"),
        x,
        Tensors(
            residual=_laid_out_like(x, residual),
            y=y,
            mask=mask,
            weight=_parameter(weight, x),
            bias=_parameter(bias, x),
            mean=mean,
            var=var,
        ),
        Options(relu=relu, eps=eps),
    )
    return y, Moments(x.numel() // x.shape[1], mean, var), mask


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
    """`grad_sums`, then `grad_input` by them, while the channel is in the cache."""
    steps = ("prepare", "collect", "merge", "apply")
    sums = _new_sums(weight, x)
    narrow = sums[0].dtype != torch.float64
    options = Options(gate is not None, fixed, narrow=narrow, eps=eps)
    grad_x, behind_relu = _backward(steps, grad_output, x, mean, var, weight, gate, sums, options)
    return Gradients(grad_x, sums[1], sums[0], behind_relu)


def _backward(
    steps: tuple[str, ...],
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    gate: Gate | None,
    sums: tuple[Tensor, Tensor],
    options: Options,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``x`` and ``residual``; ``sums`` are filled, or read if they are given."""
    x = _laid_out(x)
    mask, bias = (None, None) if gate is None else (gate.mask, gate.bias)
    grad_x = torch.empty_like(x)
    behind_relu = None if mask is None else torch.empty_like(x)
    tensors = Tensors(
        mask=None if mask is None else _as(torch.uint8, mask),
        grad=_laid_out_like(x, grad_output),
        grad_x=grad_x,
        behind_relu=behind_relu,
        weight=_parameter(weight, x),
        bias=_parameter(bias, x),
        mean=_as(torch.float64, mean),
        var=_as(torch.float64, var),
        sum_grad=sums[0],
        sum_grad_x_hat=sums[1],
    )
    library.run("backward", steps, x, tensors, options)
    return grad_x, behind_relu


def _laid_out(x: Tensor) -> Tensor:
    return x if x.is_contiguous() or is_channels_last(x) else x.contiguous()


def _laid_out_like(x: Tensor, other: Tensor | None) -> Tensor | None:
    if other is None or (other.stride() == x.stride() and other.dtype == x.dtype):
        return other
    return torch.empty_like(x).copy_(other)


def _new_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    first = torch.empty(x.shape[1], dtype=torch.float64, device=_CPU)
    return first, torch.empty_like(first)


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


def _parameter(values: Tensor | None, x: Tensor) -> Tensor | None:
    if values is None:
        return None
    return _as(torch.float64 if x.dtype == torch.float64 else torch.float32, values)


def _as(dtype: torch.dtype, vector: Tensor) -> Tensor:
    """What a kernel can read, also if a hook on saved tensors has given back something else."""
    if vector.dtype == dtype and vector.is_contiguous():
        return vector
    return vector.to(dtype).contiguous()
