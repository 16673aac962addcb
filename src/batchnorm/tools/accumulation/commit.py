"""What a large batch leaves behind, its gradients and its statistics: all of it, or nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from batchnorm.moments import count_batch, moved_running, weight_of_new_batch, write_buffer
from batchnorm.tools.accumulation.calls import Call
from batchnorm.tools.surgery import Statistics, keeps_statistics


@torch.no_grad()
def commit(
    parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None], calls: Sequence[Call]
) -> tuple[str, ...]:
    """Adds the gradients and moves the running statistics; undoes that if anything is raised.

    Args:
        parameters: Whose ``.grad``.
        gradients: One for each; None adds nothing.
        calls: In the order of the forward pass.

    Returns:
        Names of the layers with a call whose moments were kept out, because they would have made
        running statistics inf or NaN.
    """
    layers = dict.fromkeys(call.layer for call in calls)
    with _gradients_undone_on_error(parameters), _statistics_undone_on_error(Statistics(layers)):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = gradient.to(parameter.dtype)
            else:
                parameter.grad.add_(gradient)
        kept_out = [call.name for call in calls if not _move(call)]
    return tuple(dict.fromkeys(kept_out))


def _move(call: Call) -> bool:
    """Moves the statistics of the layer by one call; whether that left finite ones finite."""
    layer = call.layer
    if not (layer.training and layer.track_running_stats and keeps_statistics(layer)):
        return True
    assert layer.running_mean is not None
    assert layer.running_var is not None
    weight = weight_of_new_batch(layer.momentum, layer.num_batches_tracked)
    old = layer.running_mean, layer.running_var
    new = moved_running(*old, call.moments, weight)
    if any(bool((a.isfinite() & ~b.isfinite()).any()) for a, b in zip(old, new, strict=True)):
        return False
    for buffer, value in zip(old, new, strict=True):
        write_buffer(buffer, value)
    if layer.num_batches_tracked is not None:
        count_batch(layer.num_batches_tracked)
    return True


@contextmanager
def _gradients_undone_on_error(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    before = [(p.grad, None if p.grad is None else p.grad.clone()) for p in parameters]
    try:
        yield
    except BaseException:
        for parameter, (grad, kept) in zip(parameters, before, strict=True):
            parameter.grad = grad
            if grad is not None and kept is not None:
                grad.copy_(kept)
        raise


@contextmanager
def _statistics_undone_on_error(before: Statistics) -> Iterator[None]:
    try:
        yield
    except BaseException:
        before.put_back()
        raise
