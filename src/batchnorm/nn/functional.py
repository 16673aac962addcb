"""The public functions: each validates its arguments once and takes one route to the result."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.profiler import record_function
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from batchnorm import torch_internals
from batchnorm.kernels import dispatch, reference
from batchnorm.kernels.contract import Running
from batchnorm.kernels.dispatch import Call
from batchnorm.moments import Moments, empty, unbiased_var
from batchnorm.nn import autograd, validation
from batchnorm.nn.route import LEARNED, Route, choose, may_read, reason_for_formula
from batchnorm.nn.running_statistics import count_batch, update_running, warn_of_overflow
from batchnorm.nn.scripting import in_torchscript
from batchnorm.nn.sharding import evenly_sharded, settled

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
    r"""Normalizes each channel; a drop-in for ``torch.nn.functional.batch_norm``.

    :math:`y = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}}\,\gamma + \beta`, then
    ``+ residual`` and ReLU if asked. In training, :math:`\mu` and the biased :math:`\sigma^2` are
    those of the batch, and the running statistics move towards them. In inference they are the
    running statistics.

    Args:
        x: Input of shape (N, C, ...), any rank of at least two, any floating dtype and layout.
        running_mean: Changed in place in training; None if not kept. In inference both statistics
            are differentiable.
        running_var: Changed in place in training, towards the *unbiased* variance, as in torch.
        weight: The scale γ; None is one.
        bias: The shift β; None is zero.
        training: Normalize by the batch's own statistics.
        momentum: Weight of the *new* batch in the running statistics, usually in [0, 1]; d2l-zh's
            0.9 is 0.1 here. A 0-d tensor is allowed (see `running_statistics.weight_of_new_batch`).
        eps: Added to the variance, in its unit; positive in training, not negative in inference.
        residual: Added before the activation; same shape, dtype and device as ``x``.
        activation: None or ``"relu"``.
        backend: ``"numba"`` or ``"reference"``: obeyed or refused, never replaced. None chooses;
            `batchnorm.which_backend` tells the choice.

    Returns:
        ``y`` in x's shape, dtype and layout. The reference computes in float64 (float32 on a device
        without it) and rounds once; the Numba kernels sum short runs in the dtype of the arithmetic
        and merge them in float64.

    Raises:
        TypeError: ``x`` or a vector is not a tensor, ``eps`` is not a number, or ``momentum`` is
            None in training.
        NotImplementedError: ``x`` is not of a floating dtype, or not dense.
        IndexError: ``x`` has no channel dimension.
        ValueError: One value a channel in training, ``eps`` not positive in training or negative in
            inference, only one running statistic, an unknown activation or an unknown backend.
        RuntimeError: Shapes, dtypes or devices do not fit, running statistics are missing in
            inference or require a gradient in training, or the backend asked for cannot take ``x``.

    Source:
        Ioffe and Szegedy (2015), "Batch Normalization", algorithms 1 and 2; the behavior at the
        edges is that of ``torch.nn.functional.batch_norm``.

    Example:
        >>> import torch, batchnorm
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> batchnorm.batch_norm(x, None, None, training=True, eps=1e-9)
        tensor([[-1.],
                [ 1.]])
    """
    operands = (x, running_mean, running_var, weight, bias, residual)
    if has_torch_function(operands) and any(map(_is_stand_in, operands)):
        # torch.fx records the call as one node.
        arguments = (x, running_mean, running_var, weight, bias, training, momentum, eps)
        options = {"residual": residual, "activation": activation, "backend": backend}
        return handle_torch_function(batch_norm, operands, *arguments, **options)
    return _batch_norm(
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


# torch.jit.script asks for this attribute and compiles the function that it gives.
batch_norm.__prepare_scriptable__ = lambda: in_torchscript  # pyright: ignore[reportFunctionMemberAccess]


def _batch_norm(
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
    """`batch_norm`, for layers: it also adds one to ``counter``, if there is one.

    Both happen in one place because a kernel can count while it updates the statistics; a separate
    operation would cost as much as the update.
    """
    if torch_internals.tracing_state() is not None and backend is None:
        vectors = (running_mean, running_var, weight, bias)
        if _torch_takes(x, *vectors):
            options = (training, momentum, eps, counter, residual, activation)
            return _in_trace(x, *vectors, *options)
    validation.check_input(x)
    if activation is not None:
        validation.check_activation(activation)
    if not (type(eps) is float and eps > 0):
        validation.check_eps(eps, training=training)
    if running_mean is None or running_var is None:
        validation.check_statistics(running_mean, running_var, training=training)
    vectors = (running_mean, running_var, weight, bias)
    validation.check_channels(x, *vectors)
    if residual is not None:
        validation.check_residual(x, residual)
    if backend is not None:
        dispatch.choose(x, backend)
    if x.numel() == 0:
        validation.check_devices(x, *vectors)
        return _empty_output(x, weight, bias, residual)
    if training:
        validation.check_training(x, momentum)
    learned = False
    if running_mean is not None and running_var is not None and torch.is_grad_enabled():
        learned = running_mean.requires_grad or running_var.requires_grad
        if learned and training:
            validation.refuse_to_learn(running_mean)
    running, fixed_mean, fixed_var = None, running_mean, running_var
    if training:
        fixed_mean = fixed_var = None
        if running_mean is not None and running_var is not None:
            running = Running(running_mean, running_var, counter, momentum)
    call = Call(
        x, weight, bias, residual, fixed_mean, fixed_var, eps, activation == "relu", backend
    )
    route = Route.FORMULA
    if not learned:
        route = choose(x, *vectors, residual, counter, backend=backend, training=training)
    if route is not Route.DIRECT:
        validation.check_devices(x, *vectors)
        of_channels = dict(zip(validation.VECTORS, vectors, strict=True))
        validation.check_dense(x=x, residual=residual, **of_channels)
    if route is Route.ATEN:
        return _by_aten(call, running, counter)
    if route is Route.DIRECT:
        if torch_internals.is_profiled():
            with record_function("batchnorm::forward"):
                y, mean, var = autograd.by_backend(route, call, running)
        else:
            y, mean, var = autograd.by_backend(route, call, running)
    elif route is Route.OPERATOR:
        y, mean, var = autograd.by_backend(route, call, None)
    else:
        y, mean, var = _by_formula(call, running, LEARNED if learned else reason_for_formula(x))
    if running is not None:
        if running.overflowed or not running.moved:
            _update(running, Moments(x.numel() // x.shape[1], mean, var))
    elif counter is not None:
        count_batch(counter)
    return y


def moments(x: Float[Tensor, "n c *spatial"], backend: str | None = None) -> Moments:
    """Computes count, mean and biased variance of each channel of ``x``, in float64.

    Args:
        x: Input of shape (N, C, ...).
        backend: Name of the backend that must compute this; None chooses.

    Raises:
        TypeError: ``x`` is not a tensor.
        NotImplementedError: ``x`` is not of a floating dtype.
        IndexError: ``x`` has no channel dimension.
        ValueError: There is no backend of that name.
        RuntimeError: It cannot take ``x``; only the reference has gradients.

    Example:
        >>> import torch
        >>> from batchnorm.nn.functional import moments
        >>> found = moments(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))
        >>> found.count, found.mean.tolist(), found.var.tolist()
        (2, [2.0, 20.0], [1.0, 100.0])
    """
    validation.check_input(x)
    if x.numel() == 0:
        return empty(x.shape[1] if x.dim() > 1 else 0, x.device)
    chosen = dispatch.choose(x, backend)
    if choose(x, differentiable=x.requires_grad and torch.is_grad_enabled()) is Route.DIRECT:
        return chosen.moments(x)
    validation.check_dense(x=x)
    dispatch.require_reference(backend, "its moments are differentiated or traced")
    return reference.moments(evenly_sharded(x))


def _by_formula(call: Call, running: Running | None, reason: str) -> tuple[Tensor, Tensor, Tensor]:
    """Computes a call by the reference's formula, in operations of torch."""
    dispatch.require_reference(call.backend, reason)
    if running is not None:
        validation.check_tangents(call.x, running.mean, running.var)
    weight, bias = settled(call.weight), settled(call.bias)
    call = call._replace(x=evenly_sharded(call.x), weight=weight, bias=bias)
    return autograd.by_formula(call)


def _in_trace(
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
) -> Tensor:
    """`_batch_norm` where ``torch.jit.trace`` records: in operators of ATen."""
    with torch_internals.trace_paused():  # It would record each look at a shape.
        validation.check_input(x)
        validation.check_activation(activation)
        validation.check_eps(eps, training=training)
        validation.check_statistics(running_mean, running_var, training=training)
        validation.check_channels(x, running_mean, running_var, weight, bias)
        validation.check_residual(x, residual)
        if training:
            validation.check_training(x, momentum)
    running = None
    if training and running_mean is not None and running_var is not None:
        running = Running(running_mean, running_var, counter, momentum)
    fixed = (None, None) if training else (running_mean, running_var)
    call = Call(x, weight, bias, residual, *fixed, eps, activation == "relu", None)
    return _by_aten(call, running, counter)


def _by_aten(call: Call, running: Running | None, counter: Tensor | None) -> Tensor:
    """Computes a call in operators of ATen: torch's own batch norm where dtypes allow it.

    That updates the running statistics too, unless the weight of the new batch is a tensor.
    """
    x, weight, bias, residual, mean, var, eps, relu, _ = call
    training, momentum, batch = mean is None, 0.0, None
    if running is not None and not isinstance(running.weight, Tensor):
        mean, var, momentum = running.mean, running.var, running.weight
    # The formula rounds once; torch's batch norm would round before the residual is added.
    rounds_twice = residual is not None and not _has_dtype(x.dtype, weight, bias, mean, var)
    if _torch_takes(x, weight, bias, mean, var) and not rounds_twice:
        with torch_internals.exported_as(nn.modules.batchnorm._BatchNorm):
            y = F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
        with torch_internals.exported_as(None):
            y = y if residual is None else y + residual
        with torch_internals.exported_as(nn.ReLU):
            y = F.relu(y) if relu else y
        if running is not None and mean is None:
            batch = reference.moments(x.detach())
    else:
        y, *moments = autograd.by_formula(call)
        batch = Moments(x.numel() // x.shape[1], *moments)
    if running is not None and batch is not None:
        # Without a no_grad block, which a program could not be saved with.
        for buffer, new in ((running.mean, batch.mean), (running.var, unbiased_var(batch))):
            buffer.copy_((1 - running.weight) * buffer.to(new.dtype) + running.weight * new)
    if counter is not None:
        with torch_internals.exported_as(nn.modules.batchnorm._BatchNorm):
            count_batch(counter)
    return y


def _is_stand_in(operand: object) -> bool:
    """Tells if something stands for a tensor, as the proxies of ``torch.fx`` do."""
    return operand is not None and not isinstance(operand, Tensor)


def _torch_takes(x: Tensor, *vectors: Tensor | None) -> bool:
    """Tells if torch's batch norm takes these dtypes: one for all, or short x and float32."""
    short = x.dtype in (torch.float16, torch.bfloat16)
    return _has_dtype(x.dtype, *vectors) or (short and _has_dtype(torch.float32, *vectors))


def _has_dtype(dtype: torch.dtype, *vectors: Tensor | None) -> bool:
    return all(vector is None or vector.dtype == dtype for vector in vectors)


def _empty_output(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """Output for an empty batch. It depends on every input, so each receives a zero gradient."""
    if x.dim() < 2:
        return x.clone()
    zeros = torch.zeros(x.shape[1], dtype=x.dtype, device=x.device)
    return reference.formula(x, zeros, zeros, 1.0, weight, bias, residual)


def _update(running: Running, batch: Moments) -> None:
    """Updates running statistics and counts the batch, if no backend has; warns of an overflow."""
    if not running.moved:
        _move(running, batch)
    if may_read(running.mean, running.var):
        warn_of_overflow(running.mean, running.var, batch)


def _move(running: Running, batch: Moments) -> None:
    try:
        update_running(running.mean, running.var, batch, running.weight)
    except RuntimeError as error:
        if not torch_internals.is_write_under_vmap(error):
            raise
        raise RuntimeError(
            "batch_norm under vmap: the input is mapped over but running_mean and running_var, "
            "which training changes in place, are not; map over them too, or use a layer with "
            "track_running_stats=False."
        ) from error
    if running.counter is not None:
        count_batch(running.counter)
