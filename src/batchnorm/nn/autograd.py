"""The gradient of batch normalization, right to any order and in any direction.

The first gradient of an ordinary training step is a backend's ``backward``. Everything above it
(gradients of gradients, tangents, ``torch.func``) goes through the reference's formula in ordinary
torch operations, which computes the moments from ``x`` again: no derivative ever passes through a
saved statistic. See ``docs/decisions/0002-higher-derivatives.md``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from batchnorm import torch_internals
from batchnorm.kernels import dispatch, reference
from batchnorm.kernels.contract import ReluGate, Running, statistics_dtype
from batchnorm.kernels.dispatch import Call
from batchnorm.kernels.geometry import is_channels_last
from batchnorm.nn import operators as operators  # Defines torch.ops.batchnorm.
from batchnorm.nn.route import Route, choose


def by_backend(route: Route, call: Call, running: Running | None) -> tuple[Tensor, Tensor, Tensor]:
    """Computes a call by a backend, differentiable in ``x``, ``weight``, ``bias``, ``residual``.

    Args:
        route: `Route.DIRECT` or `Route.OPERATOR`.
        call: The arguments of the call.
        running: Running statistics that the backend may update; None on the operator's route.

    Returns:
        ``y``, and the mean and variance that made it.
    """
    if route is Route.OPERATOR:
        if torch.is_grad_enabled():
            if call.residual is call.x:  # Torch's compiler refuses one tensor in two places.
                call = call._replace(residual=call.x.view_as(call.x))
            return BatchNorm.apply(None, *call)  # pyright: ignore[reportReturnType]
        return torch.ops.batchnorm.forward(*call)[:3]
    if not torch.is_grad_enabled():
        mean, var = call.fixed_mean, call.fixed_var
        if mean is not None and var is not None:
            return dispatch.inference(call, mean, var), mean, var
        return dispatch.forward(call, running)[:3]
    if running is not None and _may_fail_to_save(call.x, call.weight, call.bias):
        running = None
    direct = _DirectCall(running, [])
    y: Any = _apply(direct, *call)
    return y, *direct.statistics  # pyright: ignore[reportReturnType]


def by_formula(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Computes a call in ordinary torch operations, which every transform can look into."""
    x, weight, bias, residual, mean, var, eps, relu, _ = call
    if mean is None or var is None:
        batch = reference.moments(x)
        mean, var = batch.mean, batch.var
    else:
        mean, var = (v.to(statistics_dtype(x.device), copy=True) for v in (mean, var))
    y = reference.formula(x, mean, var, eps, weight, bias, residual, relu=relu)
    return y, mean.detach(), var.detach()


def _may_fail_to_save(*tensors: Tensor | None) -> bool:
    """Tells if saving tensors for a backward pass may raise; nothing may have been updated by then.

    torch refuses to save tensors of inference mode, and a hook on saved tensors may do anything, as
    in activation checkpointing that stops early.
    """
    if torch_internals.has_saved_tensor_hooks():
        return True
    return any(tensor is not None and tensor.is_inference() for tensor in tensors)


class _DirectCall(NamedTuple):
    """Side channel of a direct call, for what would cost as an argument or output of a `Function`.

    Attributes:
        running: Running statistics that the backend may update.
        statistics: Empty; the forward pass puts the batch's mean and variance here.
    """

    running: Running | None
    statistics: list[Tensor]


class _Saved(NamedTuple):
    """Arguments and results of a forward pass that are no tensors, saved for the backward pass.

    Attributes:
        direct: True if the forward pass took the direct route.
        options: eps, relu, whether the statistics were fixed, and backend.
        weight_dtype: Of the gradient of ``weight``; None if there is no weight.
        bias_dtype: Of the gradient of ``bias``; None if there is no bias.
        has_residual: True if a residual was added.
        masked: True if a mask holds the decisions of the ReLU.
        channels_last: The layout of ``x`` where it matters: with a ReLU.
    """

    direct: bool
    options: tuple[float, bool, bool, str | None]
    weight_dtype: torch.dtype | None
    bias_dtype: torch.dtype | None
    has_residual: bool
    masked: bool
    channels_last: bool | None


class BatchNorm(Function):
    """Reverse mode around a backend.

    It has ``forward(ctx, ...)`` and no ``setup_context``: for the latter torch binds the arguments
    by name, which costs more than a small kernel. ``setup_context`` serves transforms, which take
    the route of the formula.
    """

    @staticmethod
    def forward(ctx: Any, direct: _DirectCall | None, *arguments: Any) -> Any:
        """Saves what the backward pass needs: of the large tensors ``x``, of ``y`` at most a mask.

        A direct call returns mean and variance in a list: each output of a `Function` costs as much
        as a small operation.
        """
        call = Call(*arguments)
        x, weight, bias, residual, fixed_mean, _, eps, relu, backend = call
        if direct is not None:
            y, mean, var, mask = dispatch.forward(call, direct.running)
        else:
            y, mean, var, mask = torch.ops.batchnorm.forward(*call)
        masked = relu and residual is not None
        saved_bias = bias if relu and not masked else None
        ctx.save_for_backward(x, weight, saved_bias, mean, var, mask if masked else None)
        ctx.set_materialize_grads(False)
        ctx.saved = _Saved(
            direct is not None,
            (eps, relu, fixed_mean is not None, backend),
            None if weight is None else weight.dtype,
            None if bias is None else bias.dtype,
            residual is not None,
            masked,
            (not x.is_contiguous() and is_channels_last(x)) if relu else None,
        )
        if direct is not None:
            direct.statistics.extend((mean, var))
            return y
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        """Gradients of ``x``, ``weight``, ``bias`` and ``residual``."""
        grad_output = grad_outputs[0]
        if grad_output is None:
            return (None,) * 10
        saved: _Saved = ctx.saved
        # Unpacked once: activation checkpointing allows no second time.
        grad_x, grad_weight, grad_bias, grad_before_relu = _gradients(
            saved, grad_output, *ctx.saved_tensors
        )
        grad_residual = None
        if saved.has_residual:
            grad_residual = grad_before_relu if saved.masked else grad_output
        grad_weight = _rounded(grad_weight, saved.weight_dtype)
        grad_bias = _rounded(grad_bias, saved.bias_dtype)
        return None, grad_x, grad_weight, grad_bias, grad_residual, None, None, None, None, None


_apply = torch_internals.direct_apply(BatchNorm)


def _rounded(gradient: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    if dtype is None:
        return None
    return gradient if gradient.dtype == dtype else gradient.to(dtype)


def _gradients(
    saved: _Saved,
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    mask: Tensor | None,
) -> Any:
    eps, relu, fixed, backend = saved.options
    if saved.channels_last is not None:
        x = _laid_out(x, channels_last=saved.channels_last)
    if weight is not None and saved.bias_dtype not in (None, weight.dtype):
        weight = weight.to(mean.dtype)  # Backends round both gradients to the weight's dtype.
    route = choose(grad_output, x, differentiable=torch.is_grad_enabled())
    if route is Route.FORMULA:
        if not fixed:
            batch = reference.moments(x)
            mean, var = batch.mean, batch.var
        gate = ReluGate(bias, mask) if relu else None
        return reference.backward(grad_output, x, mean, var, eps, weight, gate, fixed=fixed)
    by_python = saved.direct and route is Route.DIRECT
    backward: Any = dispatch.backward if by_python else torch.ops.batchnorm.backward
    return backward(grad_output, x, weight, bias, mean, var, mask, eps, relu, fixed, backend)


def _laid_out(x: Tensor, *, channels_last: bool) -> Tensor:
    """``x`` in the layout that it had in the forward pass, which made the mask.

    A hook on saved tensors may return it in another one.
    """
    if is_channels_last(x) == channels_last:
        return x
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x.contiguous()
