"""Running statistics of one layer: how much a new batch weighs, and how they move towards it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from batchnorm import torch_internals
from batchnorm.moments import Moments, unbiased_var


def weight_of_new_batch(
    momentum: float | None, num_batches_tracked: Tensor | None
) -> float | Tensor:
    """Returns the weight of the next batch in the running statistics.

    Args:
        momentum: Weight of the new batch; None for the cumulative average ``1 / k``.
        num_batches_tracked: Batches *before* this one; the cumulative average needs it.

    Returns:
        A float, or a 0-d float64 tensor for the cumulative average: the counter is never read on
        the host, so the update compiles and exports.

    Raises:
        ValueError: ``momentum`` is None and there is no counter.
    """
    if momentum is not None:
        return momentum
    if num_batches_tracked is None:
        raise ValueError(
            "momentum=None (the cumulative average) needs num_batches_tracked, got None; "
            "give a momentum between 0 and 1, or keep the counter."
        )
    return 1 / (num_batches_tracked + 1).to(torch.float64)


@torch.no_grad()
def update_running(
    running_mean: Float[Tensor, "*c"],
    running_var: Float[Tensor, "*c"],
    batch: Moments,
    weight: float | Tensor,
) -> None:
    r"""Moves running statistics towards a batch, in place: :math:`r' = (1 - w)\,r + w\,b`.

    Computed in the dtype of the batch's moments and rounded once; ``running_var`` moves towards the
    *unbiased* variance. Nothing is written before both results are known.

    Args:
        running_mean: Running mean so far.
        running_var: Running variance so far.
        batch: Moments of the new batch, at least two values a channel.
        weight: Weight of the new batch, see `weight_of_new_batch`.
    """
    new_mean = _moved(running_mean, batch.mean, weight)
    new_var = _moved(running_var, unbiased_var(batch), weight)
    write_buffer(running_mean, new_mean)
    write_buffer(running_var, new_var)


def count_batch(num_batches_tracked: Tensor) -> None:
    """Adds one to the counter, also where ``torch.func.grad`` captured it."""
    if torch_internals.is_func_transformed():
        write_buffer(num_batches_tracked, num_batches_tracked + 1)
    else:
        num_batches_tracked.add_(1)


@torch.no_grad()
def write_buffer(buffer: Tensor, value: Tensor) -> None:
    """Writes ``value`` into ``buffer``, also where ``torch.func.grad`` captured the buffer.

    torch refuses every operation in place there, and under ``vmap`` every ``out=`` as well. What it
    allows under both is its own batch norm, which sets a running mean to the mean of two equal
    values if the weight of the new batch is one.
    """
    try:
        buffer.copy_(value)
    except RuntimeError as error:
        if not torch_internals.is_write_into_captured(error):
            raise
        if not buffer.is_floating_point():
            torch.add(value, 0, out=buffer)
            return
        value = value.to(buffer.dtype).detach()
        F.batch_norm(
            torch.stack((value, value)),
            buffer,
            torch.ones_like(buffer),
            training=True,
            momentum=1.0,
        )


def _moved(running: Tensor, new: Tensor, weight: float | Tensor) -> Tensor:
    return ((1 - weight) * running.to(new.dtype) + weight * new).to(running.dtype)
