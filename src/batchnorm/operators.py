"""The two operators that torch sees: ``torch.ops.batchnorm.forward`` and ``.backward``.

They are functional: they return new tensors and change none, so that ``torch.compile`` may move
them. Inside, `kernels.dispatch` decides who computes. Gradients stand around them, in
`batchnorm.autograd`.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels import dispatch
from batchnorm.kernels.contract import statistics_dtype

_LIBRARY = torch.library.Library("batchnorm", "DEF")
_LIBRARY.define(
    "forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual,"
    " Tensor? fixed_mean, Tensor? fixed_var, float eps, bool relu, str? kernels)"
    " -> (Tensor y, Tensor mean, Tensor var)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "backward(Tensor grad_output, Tensor x, Tensor? weight, Tensor mean, Tensor var,"
    " Tensor? output, float eps, bool fixed, str? kernels)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    fixed_mean: Tensor | None,
    fixed_var: Tensor | None,
    eps: float,
    relu: bool,
    kernels: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalizes by the moments of ``x`` (training), or by fixed ones (inference).

    Returns:
        ``y``, and copies of the mean and variance that made it. A backward pass that uses the
        copies stays right even if the running statistics have moved on since.
    """
    stages = dispatch.choose(x, kernels)
    if fixed_mean is None or fixed_var is None:
        y, batch = stages.forward(x, weight, bias, eps, residual, relu=relu)
        return y, batch.mean, batch.var
    mean = fixed_mean.to(statistics_dtype(x), copy=True)
    var = fixed_var.to(statistics_dtype(x), copy=True)
    y = stages.normalize(x, mean, (var + eps).rsqrt(), weight, bias, residual, relu=relu)
    return y, mean, var


def backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    output: Tensor | None,
    eps: float,
    fixed: bool,
    kernels: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `forward`; differentiable itself where ``kernels`` is ``"reference"``.

    Returns:
        Gradients of ``x``, ``weight``, ``bias`` and ``residual``; the last one is empty without a
        fused ReLU, where it is ``grad_output``.
    """
    stages = dispatch.choose(x, kernels)
    inv_std = (var + eps).rsqrt()
    if not fixed:
        grads = stages.backward(grad_output, x, mean, inv_std, weight, output)
        return grads.x, grads.weight, grads.bias, _or_empty(grads.residual, x)
    grad_bias, grad_weight = stages.grad_sums(grad_output, x, mean, inv_std, output)
    behind_relu = None if output is None else grad_output.masked_fill(output <= 0, 0)
    grad = grad_output if behind_relu is None else behind_relu
    grad_x = stages.normalize(grad, torch.zeros_like(mean), inv_std, weight, None)
    return grad_x.to(x.dtype), grad_weight, grad_bias, _or_empty(behind_relu, x)


def _or_empty(grad: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(0) if grad is None else grad


def _forward_of_tensors(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`forward` for plain tensors, whose values may be looked at, in the layout promised."""
    y, mean, var = forward(x, *arguments)
    _warn_of_overflow(x, var)
    return _in_layout_of(x, y), mean, var


def _backward_of_tensors(
    grad_output: Tensor, x: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`backward` for plain tensors, in the layout promised."""
    grad_x, grad_weight, grad_bias, grad_residual = backward(grad_output, x, *arguments)
    if grad_residual.numel() > 0:
        grad_residual = _in_layout_of(grad_output, grad_residual)
    return _in_layout_of(x, grad_x), grad_weight, grad_bias, grad_residual


def _in_layout_of(like: Tensor, result: Tensor) -> Tensor:
    if result.stride() == like.stride():
        return result
    promised = torch.empty_like(like)
    return result if result.stride() == promised.stride() else promised.copy_(result)


def _warn_of_overflow(x: Tensor, var: Tensor) -> None:
    if x.device.type != "cpu" or x.dtype == torch.float64:
        return
    beyond = var > torch.finfo(torch.float32).max
    if beyond.any():
        warnings.warn(
            f"batch_norm: the variance of a channel is {var[beyond].max().item():.1e}, more than "
            "float32 can hold: the output is right, but a float32 running_var becomes inf; scale "
            "the input down.",
            RuntimeWarning,
            stacklevel=2,
        )


def _fake_forward(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[1], dtype=statistics_dtype(x))
    return torch.empty_like(x), mean, torch.empty_like(mean)


def _fake_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    output: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_residual = x.new_empty(0) if output is None else torch.empty_like(grad_output)
    return torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean), grad_residual


for _name, _implementation, _fake in (
    ("forward", _forward_of_tensors, _fake_forward),
    ("backward", _backward_of_tensors, _fake_backward),
):
    _LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"batchnorm::{_name}", _fake, lib=_LIBRARY)
