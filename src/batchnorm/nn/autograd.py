"""The gradient around the operators, right to any order and in any direction.

The first gradient of a plain training step is the fast operator. Everything above it (gradients of
gradients, tangents, ``torch.func``) goes through the reference formula in ordinary torch
operations, in which the moments are computed from ``x`` again: no derivative ever passes through a
saved statistic. See ``docs/decisions/0002-higher-derivatives.md``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from batchnorm.kernels import dispatch, reference
from batchnorm.kernels.contract import ReluGate, Running, statistics_dtype
from batchnorm.kernels.geometry import is_channels_last
from batchnorm.nn import operators

_PLAIN = (Tensor, torch.nn.Parameter)
_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks  # pyright: ignore[reportAttributeAccessIssue]


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
    *,
    plain: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`batchnorm.nn.operators.forward`, differentiable in ``x, weight, bias, residual``.

    ``plain`` is what `is_plain` says of all the tensors. Only then may ``running`` be moved.
    """
    arguments = (x, weight, bias, residual, fixed_mean, fixed_var, eps, relu, backend)
    if not plain and is_transformed():
        dispatch.refuse(backend, "it is inside a transform (torch.func, vmap or forward mode)")
        return by_formula(*arguments[:-1])
    if not torch.is_grad_enabled():
        if plain and fixed_mean is not None and fixed_var is not None:
            y = operators.inference(
                x, weight, bias, residual, fixed_mean, fixed_var, eps, relu, backend
            )
            return y, fixed_mean, fixed_var
        if plain:
            return operators.forward(*arguments, running)[:3]
        return torch.ops.batchnorm.forward(*arguments)[:3]
    if not plain:
        return BatchNorm.apply(None, *arguments)  # pyright: ignore[reportReturnType]
    if running is not None and _may_fail_to_save(x, weight, bias):
        running = None
    aside = _Aside(running, [])
    y: Any = _apply(aside, *arguments)
    return y, *aside.statistics  # pyright: ignore[reportReturnType]


def _may_fail_to_save(*tensors: Tensor | None) -> bool:
    """Whether keeping tensors for a backward pass may raise; nothing may have moved by then.

    Tensors of inference mode are refused, and a hook on saved tensors may do anything, as in
    checkpointing that stops early. torch has no public way to ask for hooks.
    """
    if _top_hooks(True) is not None:
        return True
    return any(tensor is not None and tensor.is_inference() for tensor in tensors)


def by_formula(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    fixed_mean: Tensor | None,
    fixed_var: Tensor | None,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in ordinary torch operations, which every transform can look into."""
    if fixed_mean is None or fixed_var is None:
        batch = reference.moments(x)
        mean, var = batch.mean, batch.var
    else:
        mean, var = (v.to(statistics_dtype(x), copy=True) for v in (fixed_mean, fixed_var))
    y = reference.formula(x, mean, var, eps, weight, bias, residual, relu=relu)
    return y, mean.detach(), var.detach()


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` or a forward-mode level is active.

    Neither can look into an operator, and a ``torch.autograd.Function`` with a ``jvp`` gives wrong
    second tangents without an error. torch has no public way to ask; `torch.autograd.Function`
    itself asks the first question like this.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether the operators' functions may be called without torch's dispatcher.

    It costs more than a small kernel, and only has something to do where torch traces or
    transforms, where a mode looks on, where a subclass of `torch.Tensor` wants a say, where a
    tensor only wraps others (as in ``torch.autograd.grad(..., is_grads_batched=True)``) or stands
    for the negative of its memory, and away from the CPU.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_tracing()
        or is_transformed()
    ):
        return False
    for tensor in tensors:
        if tensor is not None and not (
            type(tensor) in _PLAIN
            and tensor.is_cpu
            and torch._C._has_storage(tensor)
            and not tensor.is_neg()
        ):
            return False
    return True


class _Aside(NamedTuple):
    """What a plain forward pass takes and gives beside tensors that torch looks at."""

    running: Running | None
    statistics: list[Tensor]


class _Kept(NamedTuple):
    """What backward needs beside tensors.

    ``options`` are eps, relu, whether statistics were fixed, and backend; ``channels_last`` is the
    layout of ``x`` where it matters: with a ReLU.
    """

    plain: bool
    options: tuple[float, bool, bool, str | None]
    weight_dtype: torch.dtype | None
    bias_dtype: torch.dtype | None
    has_residual: bool
    masked: bool
    channels_last: bool | None


class BatchNorm(Function):
    """Reverse mode around the operators.

    In the style of one ``forward(ctx, ...)``: torch binds the arguments of the other style by
    name, which costs more than a small kernel. That style is there for transforms, which never
    come here.
    """

    @staticmethod
    def forward(
        ctx: Any,
        aside: _Aside | None,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        fixed_mean: Tensor | None,
        fixed_var: Tensor | None,
        eps: float,
        relu: bool,
        backend: str | None,
    ) -> Any:
        """Keeps what backward needs: of the large tensors ``x``, and of ``y`` at most a mask.

        Of plain tensors, mean and variance go into a list: each output of a `Function` costs as
        much as a small operation.
        """
        plain = aside is not None
        arguments = (x, weight, bias, residual, fixed_mean, fixed_var, eps, relu, backend)
        if plain:
            y, mean, var, mask = operators.forward(*arguments, aside.running)
        else:
            y, mean, var, mask = torch.ops.batchnorm.forward(*arguments)
        masked = relu and residual is not None
        kept_bias = bias if relu and not masked else None
        ctx.save_for_backward(x, weight, kept_bias, mean, var, mask if masked else None)
        ctx.set_materialize_grads(False)
        ctx.kept = _Kept(
            plain,
            (eps, relu, fixed_mean is not None, backend),
            None if weight is None else weight.dtype,
            None if bias is None else bias.dtype,
            residual is not None,
            masked,
            is_channels_last(x) if relu else None,
        )
        if plain:
            aside.statistics.extend((mean, var))
            return y
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        """Gradients of ``x, weight, bias, residual``."""
        grad_output = grad_outputs[0]
        if grad_output is None:
            return (None,) * 10
        kept: _Kept = ctx.kept
        # Unpacked once: activation checkpointing allows no second time.
        grad_x, grad_weight, grad_bias, behind_relu = _gradients(
            kept, grad_output, *ctx.saved_tensors
        )
        grad_residual = None
        if kept.has_residual:
            grad_residual = behind_relu if kept.masked else grad_output
        return (
            None,
            grad_x,
            _rounded(grad_weight, kept.weight_dtype),
            _rounded(grad_bias, kept.bias_dtype),
            grad_residual,
            None,
            None,
            None,
            None,
            None,
        )


# What `torch.autograd.Function.apply` calls once it has looked for dead wrappers of transforms,
# which plain tensors are not.
_apply = super(Function, BatchNorm).apply  # pyright: ignore[reportAttributeAccessIssue]


def _rounded(gradient: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    if dtype is None:
        return None
    return gradient if gradient.dtype == dtype else gradient.to(dtype)


def _gradients(
    kept: _Kept,
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    mask: Tensor | None,
) -> Any:
    eps, relu, fixed, backend = kept.options
    if kept.channels_last is not None:
        x = _laid_out(x, channels_last=kept.channels_last)
    if weight is not None and kept.bias_dtype not in (None, weight.dtype):
        weight = weight.to(mean.dtype)  # Kernels round both gradients to the weight's dtype.
    arguments = (weight, bias, mean, var, mask, eps, relu, fixed)
    graded = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if not graded and kept.plain and is_plain(grad_output, x):
        return operators.backward(grad_output, x, *arguments, backend)
    if torch.compiler.is_compiling() or not (graded or is_transformed()):
        return torch.ops.batchnorm.backward(grad_output, x, *arguments, backend)
    if not fixed:
        batch = reference.moments(x)
        mean, var = batch.mean, batch.var
    gate = ReluGate(bias, mask) if relu else None
    return reference.backward(grad_output, x, mean, var, eps, weight, gate, fixed=fixed)


def _laid_out(x: Tensor, *, channels_last: bool) -> Tensor:
    """``x`` in the layout that it had, in which its mask was laid out and its signs were found.

    A hook on saved tensors may give it back in another one.
    """
    if is_channels_last(x) == channels_last:
        return x
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x.contiguous()
