"""The gradient around the operators, right to any order and in any direction.

The first gradient of a plain training step is the fast operator. Everything above it (gradients of
gradients, tangents, ``torch.func``) goes through the reference formula in ordinary torch
operations, in which the moments are computed from ``x`` again: no derivative ever passes through a
saved statistic. See ``docs/decisions/0002-higher-derivatives.md``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from batchnorm import operators
from batchnorm.kernels import reference


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
    """`batchnorm.operators.forward`, differentiable in ``x, weight, bias, residual``."""
    arguments = (x, weight, bias, residual, fixed_mean, fixed_var, eps, relu)
    if is_transformed():
        y, mean, var = operators.forward(*arguments, "reference")
        return y, mean.detach(), var.detach()
    if torch.is_grad_enabled():
        return BatchNorm.apply(*arguments, kernels)  # pyright: ignore[reportReturnType]
    return torch.ops.batchnorm.forward(*arguments, kernels)


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` or a forward-mode level is active.

    Neither can look into an operator, and a ``torch.autograd.Function`` with a ``jvp`` gives wrong
    second tangents without an error. torch has no public way to ask; `torch.autograd.Function`
    itself asks the first question like this.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class BatchNorm(Function):
    """Reverse mode around the operators."""

    @staticmethod
    def forward(*args: Any) -> Any:
        """Calls the operator."""
        return torch.ops.batchnorm.forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keeps what backward needs: of the large tensors ``x``, and ``y`` if a ReLU is fused."""
        x, weight, bias, residual, fixed_mean, _, eps, relu, kernels = inputs
        y, mean, var = output
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, mean, var, y if relu else None)
        ctx.options = (eps, fixed_mean is not None, kernels)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (weight, bias)]
        ctx.has_residual = residual is not None

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        """Gradients of ``x, weight, bias, residual``."""
        grad_output = grad_outputs[0]
        if grad_output is None:
            return (None,) * 9
        # Unpacked once: activation checkpointing allows no second time.
        saved = ctx.saved_tensors
        grad_x, *grad_affine, behind_relu = _gradients(ctx.options, saved, grad_output)
        grad_weight, grad_bias = (
            None if dtype is None else grad.to(dtype)
            for grad, dtype in zip(grad_affine, ctx.dtypes, strict=True)
        )
        *_, output = saved
        grad_residual = None
        if ctx.has_residual:
            grad_residual = grad_output if output is None else behind_relu
        return grad_x, grad_weight, grad_bias, grad_residual, None, None, None, None, None


def _gradients(options: Any, saved: Any, grad_output: Tensor) -> tuple[Tensor, ...]:
    x, weight, mean, var, output = saved
    eps, fixed, kernels = options
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() or is_transformed()):
        return torch.ops.batchnorm.backward(
            grad_output, x, weight, mean, var, output, eps, fixed, kernels
        )
    if not fixed:
        batch = reference.moments(x)
        mean, var = batch.mean, batch.var
    return operators.backward(grad_output, x, weight, mean, var, output, eps, fixed, "reference")
