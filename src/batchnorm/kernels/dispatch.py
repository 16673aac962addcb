"""The choice of a backend, and the three calls that every backend serves.

A backend that the user named is obeyed or refused, never replaced.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.kernels import reference
from batchnorm.kernels.contract import LARGEST_FLOAT32, Backend, ReluGate, Running, statistics_dtype

NAMES = ("numba", "reference")

# Imported here and not in the first call that needs it.
try:
    from batchnorm.kernels import numba_cpu
except Exception as error:  # Also what a broken installation raises.
    numba_cpu, _missing = None, f"numba cannot be imported: {error}"
    if importlib.util.find_spec("numba") is None:
        _missing = "numba is not installed; pip install 'batchnorm[cpu]'"
else:
    _missing = None


class Call(NamedTuple):
    """The arguments of one forward call, in the order of the operator's schema.

    Attributes:
        x: Input of shape (N, C, ...).
        weight: The scale; None is one.
        bias: The shift; None is zero.
        residual: Added before the activation.
        fixed_mean: With ``fixed_var``, what normalizes instead of the batch's own moments.
        fixed_var: Biased.
        eps: Added to the variance.
        relu: True if a ReLU is fused.
        backend: Name of the backend that must compute this; None chooses.
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    fixed_mean: Tensor | None
    fixed_var: Tensor | None
    eps: float
    relu: bool
    backend: str | None


def choose(x: Tensor, name: str | None = None) -> Backend:
    """Chooses the backend that computes ``x``: the fastest that can, or the one named.

    Raises:
        ValueError: There is no backend of that name.
        RuntimeError: It cannot take ``x``; the message says why.
    """
    if name is None:
        if numba_cpu is None or numba_cpu.refusal(x) is not None:
            return reference
        return numba_cpu
    backend, reason = _by_name(name)
    if backend is not None:
        reason = backend.refusal(x)
        if reason is None:
            return backend
    raise RuntimeError(f"backend={name!r} cannot take this input: {reason}.")


def refusal(x: Tensor) -> str | None:
    """Returns why no backend is fast for ``x``, so that the reference computes it, or None."""
    return _missing if numba_cpu is None else numba_cpu.refusal(x)


def require_reference(name: str | None, reason: str) -> None:
    """Raises if another backend than the reference is named where only the reference will do.

    Raises:
        ValueError: There is no backend of that name.
        RuntimeError: It is not the reference.
    """
    if name is not None and _by_name(name)[0] is not reference:
        raise RuntimeError(
            f"backend={name!r} cannot take this input: {reason}, and that needs the reference; "
            "leave backend out."
        )


def describe(x: Tensor, name: str | None = None) -> str:
    """Says which backend computes ``x`` and how, or why the fast one cannot.

    Raises:
        ValueError: There is no backend of that name.
        RuntimeError: It cannot take ``x``; the message says why.
    """
    chosen = choose(x, name)
    if numba_cpu is not None and chosen is numba_cpu:
        return numba_cpu.describe(x)
    text = "The reference computes this input, in eager torch and float64."
    if name is not None:
        return text
    return f"{text} The Numba kernels cannot: {refusal(x)}."


def forward(
    call: Call, running: Running | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Normalizes by the moments of ``x`` (training), or by fixed statistics (inference).

    Args:
        call: The arguments of the call.
        running: Running statistics that the backend may update with the batch's moments.

    Returns:
        ``y`` in the layout of ``torch.empty_like(x)``; copies of the mean and variance that made
        it, so that a backward pass stays right even if the running statistics have moved on since;
        and, with a residual and a ReLU, the mask of `batchnorm.kernels.geometry`.
    """
    x, weight, bias, residual, fixed_mean, fixed_var, eps, relu, name = call
    backend = choose(x, name)
    if fixed_mean is None or fixed_var is None:
        y, batch, mask = backend.forward(x, weight, bias, eps, residual, relu=relu, running=running)
        mean, var = batch.mean, batch.var
    else:
        mean = fixed_mean.to(statistics_dtype(x.device), copy=True)
        var = fixed_var.to(statistics_dtype(x.device), copy=True)
        y, mask = backend.normalize(x, mean, var, eps, weight, bias, residual, relu=relu)
    return _in_layout_of(x, y), mean, var, mask


def inference(call: Call, mean: Tensor, var: Tensor) -> Tensor:
    """``y`` of `forward` by fixed statistics, where nothing is saved for a backward pass."""
    x, weight, bias, residual, _, _, eps, relu, name = call
    y, _ = choose(x, name).normalize(x, mean, var, eps, weight, bias, residual, relu=relu)
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
    name: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `forward`.

    Args:
        grad_output: Gradient of ``y``.
        x: Input of `forward`, in the same memory layout.
        weight: Weight of that call.
        bias: Bias of that call; needed with a ReLU and no mask.
        mean: Mean that `forward` returned.
        var: Variance that `forward` returned.
        mask: Mask that `forward` returned.
        eps: ``eps`` of that call.
        relu: True if a ReLU was fused.
        fixed: True if mean and variance were fixed.
        name: Name of the backend that must compute this; None chooses.

    Returns:
        Gradients of ``x``, ``weight``, ``bias`` and ``residual``, the first and the last in the
        layouts of ``torch.empty_like(x)`` and ``torch.empty_like(grad_output)``; the last one is
        None without a mask: then it is ``grad_output``.
    """
    gate = ReluGate(bias, mask) if relu else None
    grads = choose(x, name).backward(grad_output, x, mean, var, eps, weight, gate, fixed=fixed)
    grad_residual = grads.residual
    if grad_residual is not None:
        grad_residual = _in_layout_of(grad_output, grad_residual)
    return _in_layout_of(x, grads.x), grads.weight, grads.bias, grad_residual


def warn_of_overflow(x: Tensor, var: Tensor) -> None:
    """Warns if float32 running statistics cannot hold a variance."""
    if x.dtype == torch.float64 or x.device.type != "cpu":
        return
    largest = var.nan_to_num(nan=0, posinf=math.inf).max().item()
    if largest > LARGEST_FLOAT32:
        warnings.warn(
            f"batch_norm: the variance of a channel is {largest:.1e}, more than float32 can hold: "
            "the output is right, but a float32 running_var becomes inf; scale the input down.",
            RuntimeWarning,
            stacklevel=2,
        )


def _in_layout_of(like: Tensor, result: Tensor) -> Tensor:
    if result.stride() == like.stride():
        return result
    promised = torch.empty_like(like)
    return result if result.stride() == promised.stride() else promised.copy_(result)


def _by_name(name: str) -> tuple[Backend | None, str | None]:
    """The backend of that name, or None and the reason why it is missing."""
    if name == "numba":
        return numba_cpu, _missing
    if name == "reference":
        return reference, None
    raise ValueError(f"backend must be None or one of {', '.join(NAMES)}, got {name!r}.")
