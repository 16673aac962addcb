"""The public function: validates once, normalizes, and sees that running statistics move once."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from batchnorm.kernels import dispatch, reference
from batchnorm.kernels.contract import Running
from batchnorm.moments import Moments, count_batch, empty, update_running
from batchnorm.nn import autograd, operators, validation

Activation = Literal["relu"] | None


def batch_norm(
    x: Float[Tensor, "n c *spatial"],
    running_mean: Float[Tensor, " c"] | None,
    running_var: Float[Tensor, " c"] | None,
    weight: Float[Tensor, " c"] | None = None,
    bias: Float[Tensor, " c"] | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    residual: Float[Tensor, "n c *spatial"] | None = None,
    activation: Activation = None,
    backend: str | None = None,
) -> Float[Tensor, "n c *spatial"]:
    r"""Batch normalization, a drop-in for ``torch.nn.functional.batch_norm``.

    :math:`y = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}}\,\gamma + \beta` a channel, and
    ``relu(y + residual)`` if asked. In training, :math:`\mu` and :math:`\sigma^2` (biased) are the
    batch's own, and the running statistics move towards them; in inference they are the running
    statistics.

    Args:
        x: Input of shape (N, C, ...), any rank of at least two, any floating dtype and layout.
        running_mean: Changed in place in training; None if not kept.
        running_var: Changed in place in training, towards the *unbiased* variance, as in torch.
        weight: The scale γ; None is one.
        bias: The shift β; None is zero.
        training: Normalize by the batch's own statistics.
        momentum: Weight of the *new* batch in the running statistics, usually in [0, 1]; d2l-zh's
            0.9 is 0.1 here. A 0-d tensor is allowed (see `moments.weight_of_new_batch`).
        eps: Added to the variance, in its unit; positive in training.
        residual: Added before the activation; same shape, dtype and device as ``x``.
        activation: None or ``"relu"``.
        backend: Name of the kernels that must compute this (see `kernels.dispatch`); None chooses.

    Returns:
        ``y`` in x's shape, dtype and layout. Statistics are summed in float64 (float32 on a device
        without it), whatever the dtype of ``x``; only the result is rounded.

    Raises:
        TypeError: ``x`` is not a tensor, or ``momentum`` is None in training.
        NotImplementedError: ``x`` is not of a floating dtype.
        IndexError: ``x`` has no channel dimension.
        ValueError: One value a channel in training, ``eps`` not positive in training, only one
            running statistic, an unknown activation or unknown kernels.
        RuntimeError: Shapes, dtypes or devices do not fit, running statistics are missing in
            inference, or the kernels asked for cannot take ``x``.

    Source:
        Ioffe and Szegedy (2015), "Batch Normalization", algorithms 1 and 2; the behaviour at the
        edges is that of ``torch.nn.functional.batch_norm``.
    """
    return compute(
        x,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        momentum,
        eps,
        None,
        residual,
        activation,
        backend,
    )


def compute(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    counter: Tensor | None,
    residual: Tensor | None,
    activation: Activation,
    backend: str | None = None,
) -> Tensor:
    """`batch_norm`, for layers: one more batch is counted in ``counter``, if there is one.

    It has to be counted together with the statistics: a small operation of its own costs as much
    as moving them.
    """
    validation.check_input(x)
    validation.check_activation(activation)
    validation.check_statistics(running_mean, running_var, training=training)
    validation.check_channels(
        x, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias
    )
    validation.check_residual(x, residual)
    if backend is not None:
        dispatch.choose(x, backend)
    if x.numel() == 0:
        return _of_nothing(x, weight, bias, residual)
    if training:
        validation.check_training(x, eps, momentum)
    fixed_mean, fixed_var = (None, None) if training else (running_mean, running_var)
    arguments = (x, weight, bias, residual, fixed_mean, fixed_var, eps, activation == "relu")
    plain = autograd.is_plain(x, weight, bias, residual, running_mean, running_var, counter)
    running = None
    if training and running_mean is not None and running_var is not None:
        running = Running(running_mean, running_var, counter, momentum)
    if not plain and _prefers_plain_torch(backend, training=training):
        y, mean, var = _in_plain_torch(*arguments)
    else:
        y, mean, var = autograd.forward(*arguments, backend, running, plain=plain)
    if running is not None:
        if not running.moved:
            _move(running, Moments(x.numel() // x.shape[1], mean, var))
        if plain and (running.overflowed or not running.moved):
            operators.warn_of_overflow(x, var)
    elif counter is not None:
        count_batch(counter)
    return y


def moments(x: Float[Tensor, "n c *spatial"], backend: str | None = None) -> Moments:
    """Count, mean and biased variance of each channel of ``x``, in float64.

    Args:
        x: Input of shape (N, C, ...).
        backend: Name of the kernels that must compute this; None chooses.

    Raises:
        TypeError: ``x`` is not a tensor.
        NotImplementedError: ``x`` is not of a floating dtype.
        IndexError: ``x`` has no channel dimension.
        ValueError: There are no kernels of that name.
        RuntimeError: They cannot take ``x``; only the reference has gradients.
    """
    validation.check_input(x)
    if x.numel() == 0:
        return empty(x.shape[1] if x.dim() > 1 else 0, x.device)
    chosen = dispatch.choose(x, backend)
    differentiable = x.requires_grad and torch.is_grad_enabled()
    if differentiable or autograd.is_transformed() or not autograd.is_plain(x):
        dispatch.refuse(backend, "its moments are differentiated or traced")
        return reference.moments(x)
    return chosen.moments(x)


def _prefers_plain_torch(backend: str | None, *, training: bool) -> bool:
    """Whether the graph being traced is better off without our operator.

    An exported program then runs where this library is not installed, and a compiled one can fuse
    inference with its neighbours.
    """
    if backend is not None or not torch.compiler.is_compiling():
        return False
    return torch.compiler.is_exporting() or not training


def _in_plain_torch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    fixed_mean: Tensor | None,
    fixed_var: Tensor | None,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    given = (weight, bias, fixed_mean, fixed_var)
    mixed = any(vector is not None and vector.dtype != x.dtype for vector in given)
    if mixed or fixed_mean is None or fixed_var is None:
        return autograd.by_formula(x, weight, bias, residual, fixed_mean, fixed_var, eps, relu)
    y = F.batch_norm(x, fixed_mean, fixed_var, weight, bias, training=False, eps=eps)
    y = y if residual is None else y + residual
    return y.relu() if relu else y, fixed_mean, fixed_var


def _of_nothing(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """An empty result that still hangs on every input, so that each gets a gradient of zeros."""
    if x.dim() < 2:
        return x.clone()
    zeros = torch.zeros(x.shape[1], dtype=x.dtype, device=x.device)
    return reference.formula(x, zeros, zeros, 1.0, weight, bias, residual)


def _move(running: Running, batch: Moments) -> None:
    """Moves the running statistics towards those of a batch, and counts it."""
    try:
        update_running(running.mean, running.var, batch, running.weight)
    except RuntimeError as error:
        if not any(words in str(error) for words in ("vmap", "Batching rule")):
            raise
        raise RuntimeError(
            "batch_norm under vmap: the input is mapped over but running_mean and running_var, "
            "which training changes in place, are not; map over them too, or use a layer with "
            "track_running_stats=False."
        ) from error
    if running.counter is not None:
        count_batch(running.counter)
