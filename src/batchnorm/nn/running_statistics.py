"""Running statistics of one layer: how much a new batch weighs, and how they move towards it."""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from batchnorm import torch_internals
from batchnorm.moments import Moments, unbiased_var
from batchnorm.nn.sharding import gathered


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
    *unbiased* variance. Both move, or neither.

    Args:
        running_mean: Running mean so far.
        running_var: Running variance so far.
        batch: Moments of the new batch, at least two values a channel.
        weight: Weight of the new batch, see `weight_of_new_batch`.
    """
    new_mean = _moved(running_mean, batch.mean, weight)
    new_var = _moved(running_var, unbiased_var(batch), weight)
    if not torch_internals.is_func_transformed():
        running_mean.copy_(new_mean)
        running_var.copy_(new_var)
        return
    before = running_mean.clone()
    write_buffer(running_mean, new_mean)
    try:
        write_buffer(running_var, new_var)
    except RuntimeError:
        write_buffer(running_mean, before)
        raise


def count_batch(num_batches_tracked: Tensor) -> None:
    """Adds one to the counter, also where ``torch.func.grad`` captured it and ``vmap`` maps it."""
    if torch_internals.is_func_transformed():
        counters = torch_internals.without_vmap(num_batches_tracked)
        write_buffer(counters, counters + 1)
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


def warn_of_overflow(running_mean: Tensor, running_var: Tensor, batch: Moments) -> None:
    """Warns if a running statistic became infinite because its dtype cannot hold the batch's.

    Under ``vmap``, which shows no values, it says nothing.
    """
    statistics = ("mean", running_mean, batch.mean), ("var", running_var, unbiased_var(batch))
    for name, buffer, value in statistics:
        try:
            lost = _lost(buffer, value)
        except RuntimeError:
            return
        if lost is None:
            continue
        what, found = ("variance", batch.var) if name == "var" else (name, value)
        largest = gathered(found.where(lost, 0).abs().max()).item()
        dtype = str(buffer.dtype).removeprefix("torch.")
        remedy = "" if dtype in ("float32", "float64") else "keep the statistics in float32, or "
        warnings.warn(
            f"batch_norm: the {what} of a channel is {largest:.1e}, more "
            f"than {dtype} can hold: the output is right, but a {dtype} running_{name} becomes "
            f"inf; {remedy}scale the input down.",
            RuntimeWarning,
            stacklevel=2,
        )


def _lost(buffer: Tensor, value: Tensor) -> Tensor | None:
    """Marks the channels whose statistic became infinite by a finite value, if there are some."""
    infinite = buffer.isinf()
    if not infinite.any():
        return None
    largest = torch.finfo(buffer.dtype).max
    lost = infinite & value.isfinite() & (value.abs() > largest)
    return lost if lost.any() else None


def _moved(running: Tensor, new: Tensor, weight: float | Tensor) -> Tensor:
    return ((1 - weight) * running.to(new.dtype) + weight * new).to(running.dtype)
