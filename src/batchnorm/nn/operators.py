"""The two operators that torch sees: ``torch.ops.batchnorm.forward`` and ``.backward``.

They are functional: they return new tensors and change none, so that ``torch.compile`` may move
them. Only the plain function `forward` moves running statistics, if it is given any. Inside,
`kernels.dispatch` decides who computes. Gradients stand around them, in
`batchnorm.nn.autograd`.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels import dispatch
from batchnorm.kernels.contract import ReluGate, Running, statistics_dtype
from batchnorm.kernels.geometry import mask_size

_LIBRARY = torch.library.Library("batchnorm", "DEF")
_LIBRARY.define(
    "forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual,"
    " Tensor? fixed_mean, Tensor? fixed_var, float eps, bool relu, str? backend)"
    " -> (Tensor y, Tensor mean, Tensor var, Tensor mask)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "backward(Tensor grad_output, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var,"
    " Tensor? mask, float eps, bool relu, bool fixed, str? backend)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)",
    tags=(torch.Tag.pt2_compliant_tag,),
)

_LARGEST_FLOAT32 = torch.finfo(torch.float32).max


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    fixed_mean: Tensor | None,
    fixed_var: Tensor | None,
    eps: float,
    relu: bool,
    backend: str | None,
    running: Running | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Normalizes plain tensors by the moments of ``x`` (training), or by fixed ones (inference).

    Args:
        x: Input of shape (N, C, ...).
        weight: The scale.
        bias: The shift.
        residual: Added before the activation.
        fixed_mean: With ``fixed_var``, what normalizes instead of the moments.
        fixed_var: Biased.
        eps: Added to the variance.
        relu: Whether a ReLU is fused.
        backend: Name of the kernels that must compute this; None chooses.
        running: What the kernels may move towards the moments.

    Returns:
        ``y`` in the layout of ``torch.empty_like(x)``; copies of the mean and variance that made
        it, so that a backward pass stays right even if the running statistics have moved on since;
        and, with a residual and a ReLU, the mask of `batchnorm.kernels.geometry`.
    """
    stages = dispatch.choose(x, backend)
    if fixed_mean is None or fixed_var is None:
        y, batch, mask = stages.forward(x, weight, bias, eps, residual, relu=relu, running=running)
        mean, var = batch.mean, batch.var
    else:
        mean = fixed_mean.to(statistics_dtype(x), copy=True)
        var = fixed_var.to(statistics_dtype(x), copy=True)
        y, mask = stages.normalize(x, mean, var, eps, weight, bias, residual, relu=relu)
    return _in_layout_of(x, y), mean, var, mask


def inference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    fixed_mean: Tensor,
    fixed_var: Tensor,
    eps: float,
    relu: bool,
    backend: str | None,
) -> Tensor:
    """``y`` of `forward` by fixed statistics, where nothing is kept for a backward pass."""
    y, _ = dispatch.choose(x, backend).normalize(
        x, fixed_mean, fixed_var, eps, weight, bias, residual, relu=relu
    )
    return _in_layout_of(x, y)


def backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    mask: Tensor | None,
    eps: float,
    relu: bool,
    fixed: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `forward`.

    Args:
        grad_output: Gradient of ``y``.
        x: What `forward` took, in the same memory layout.
        weight: What `forward` took.
        bias: What `forward` took; needed with a ReLU and no mask.
        mean: What `forward` returned.
        var: What `forward` returned.
        mask: What `forward` returned.
        eps: What `forward` took.
        relu: Whether a ReLU was fused.
        fixed: Whether mean and variance were fixed.
        backend: Name of the kernels that must compute this; None chooses.

    Returns:
        Gradients of ``x``, ``weight``, ``bias`` and ``residual``, the first and the last in the
        layouts of ``torch.empty_like(x)`` and ``torch.empty_like(grad_output)``; the last one is
        None without a mask: then it is ``grad_output``.
    """
    gate = ReluGate(bias, mask) if relu else None
    grads = dispatch.choose(x, backend).backward(
        grad_output, x, mean, var, eps, weight, gate, fixed=fixed
    )
    behind_relu = grads.residual
    if behind_relu is not None:
        behind_relu = _in_layout_of(grad_output, behind_relu)
    return _in_layout_of(x, grads.x), grads.weight, grads.bias, behind_relu


def _in_layout_of(like: Tensor, result: Tensor) -> Tensor:
    if result.stride() == like.stride():
        return result
    promised = torch.empty_like(like)
    return result if result.stride() == promised.stride() else promised.copy_(result)


def warn_of_overflow(x: Tensor, var: Tensor) -> None:
    """Warns if float32 running statistics cannot hold a variance."""
    if x.dtype == torch.float64 or x.device.type != "cpu":
        return
    largest = var.nan_to_num(nan=0, posinf=math.inf).max().item()
    if largest > _LARGEST_FLOAT32:
        warnings.warn(
            f"batch_norm: the variance of a channel is {largest:.1e}, more than float32 can hold: "
            "the output is right, but a float32 running_var becomes inf; scale the input down.",
            RuntimeWarning,
            stacklevel=2,
        )


def _operator_forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`forward`; an operator cannot return None."""
    y, mean, var, mask = forward(x, *arguments)
    fixed_mean = arguments[3]
    if fixed_mean is None:
        warn_of_overflow(x, var)
    return y, mean, var, x.new_empty(0, dtype=torch.uint8) if mask is None else mask


def _operator_backward(
    grad_output: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`backward`; an operator cannot return None."""
    grad_x, grad_weight, grad_bias, grad_residual = backward(grad_output, *arguments)
    mean = arguments[3]
    grad_weight, grad_bias = grad_weight.to(mean.dtype), grad_bias.to(mean.dtype)
    if grad_residual is None:
        grad_residual = grad_output.new_empty(0)
    return grad_x, grad_weight, grad_bias, grad_residual


def _fake_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    fixed_mean: Tensor | None,
    fixed_var: Tensor | None,
    eps: float,
    relu: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[1], dtype=statistics_dtype(x))
    size = mask_size(x) if relu and residual is not None else 0
    mask = x.new_empty(size, dtype=torch.uint8)
    return torch.empty_like(x), mean, torch.empty_like(mean), mask


def _fake_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    mask: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    behind_relu = grad_output.new_empty(0) if mask is None else torch.empty_like(grad_output)
    return torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean), behind_relu


for _name, _implementation, _fake in (
    ("forward", _operator_forward, _fake_forward),
    ("backward", _operator_backward, _fake_backward),
):
    _LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"batchnorm::{_name}", _fake, lib=_LIBRARY)
