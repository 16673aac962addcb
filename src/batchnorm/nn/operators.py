"""The two operators that torch sees: ``torch.ops.batchnorm.forward`` and ``.backward``.

They are functional: they return new tensors and change none, so that ``torch.compile`` may move
them. What they compute is `batchnorm.kernels.dispatch.forward` and ``backward``; an operator cannot
return None, so it returns an empty tensor instead. `batchnorm.nn.autograd` adds the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels import dispatch
from batchnorm.kernels.contract import statistics_dtype
from batchnorm.kernels.dispatch import Call
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

_Four = tuple[Tensor, Tensor, Tensor, Tensor]


def _forward(*arguments: Any) -> _Four:
    call = Call(*arguments)
    if call.x.numel() == 0:  # No backend takes it.
        y, mean, var, mask = _fake_forward(*arguments)
        for vector, fixed in ((mean, call.fixed_mean), (var, call.fixed_var)):
            vector.zero_() if fixed is None else vector.copy_(fixed)
        return y, mean, var, mask
    y, mean, var, mask = dispatch.forward(call)
    if call.fixed_mean is None:
        dispatch.warn_of_overflow(call.x, var)
    return y, mean, var, call.x.new_empty(0, dtype=torch.uint8) if mask is None else mask


def _fake_forward(*arguments: Any) -> _Four:
    call = Call(*arguments)
    x = call.x
    mean = x.new_empty(x.shape[1], dtype=statistics_dtype(x.device))
    size = mask_size(x) if call.relu and call.residual is not None else 0
    mask = x.new_empty(size, dtype=torch.uint8)
    return torch.empty_like(x), mean, torch.empty_like(mean), mask


def _backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    *rest: Any,
) -> _Four:
    if x.numel() == 0:
        one, two, three, four = _fake_backward(grad_output, x, weight, bias, mean, *rest)
        return one.zero_(), two.zero_(), three.zero_(), four.zero_()
    grad_x, grad_weight, grad_bias, grad_residual = dispatch.backward(
        grad_output, x, weight, bias, mean, *rest
    )
    if grad_residual is None:
        grad_residual = grad_output.new_empty(0)
    return grad_x, grad_weight.to(mean.dtype), grad_bias.to(mean.dtype), grad_residual


def _fake_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    mask: Tensor | None,
    *_: Any,
) -> _Four:
    grad_residual = grad_output.new_empty(0) if mask is None else torch.empty_like(grad_output)
    return torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean), grad_residual


for _name, _implementation, _fake in (
    ("forward", _forward, _fake_forward),
    ("backward", _backward, _fake_backward),
):
    _LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"batchnorm::{_name}", _fake, lib=_LIBRARY)
