"""The one statistic of batch normalization: count, mean and variance of a channel.

Every convention of the library about statistics stands in this file:

- ``var`` is always the *biased* variance, the sum of squares divided by ``count``: that is what
  normalizes a batch. The *unbiased* one, divided by ``count - 1``, exists only in ``running_var``,
  because torch keeps it there.
- ``momentum`` is the weight of the *new* batch, as in torch. The d2l book (Chinese edition), Keras
  and Flax give that name to the weight of the *old* value: ``momentum = 1 - theirs``.
- ``momentum=None`` is the cumulative average: the k-th batch gets the weight ``1 / k``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Count = int | Tensor


@dataclass(frozen=True)
class Moments:
    """Count, mean and biased variance of each channel.

    Attributes:
        count: How many values a channel has: one number for all channels, or a tensor of one a
            channel.
        mean: Mean of each channel, in the unit of the data.
        var: Biased variance of each channel, in that unit squared.
    """

    count: Count
    mean: Float[Tensor, "*c"]
    var: Float[Tensor, "*c"]


def empty(num_features: int, device: torch.device | str | None = None) -> Moments:
    """Moments of no data: merging them with others changes nothing."""
    zeros = torch.zeros(num_features, dtype=torch.float64, device=device)
    return Moments(0, zeros, zeros.clone())


def merge_moments(first: Moments, *others: Moments) -> Moments:
    r"""Moments of the union of disjoint parts: exact for uneven and for empty parts.

    With :math:`\delta = \mu_b - \mu_a` and :math:`s = n_b / (n_a + n_b)`,
    :math:`\mu = \mu_a + s\,\delta` and
    :math:`\sigma^2 = (1 - s)\,\sigma_a^2 + s\,\sigma_b^2 + s (1 - s)\,\delta^2`.
    No squares of the data are ever subtracted, so a large mean costs no accuracy.

    Returns:
        Moments in float64.

    Source:
        Chan, Golub and LeVeque (1979), "Updating formulae and a pairwise algorithm for computing
        sample variances", eq. 2.1, written with shares instead of counts.
    """
    total = _widen(first)
    for other in others:
        total = _merge_two(total, _widen(other))
    return total


def unbiased_var(moments: Moments) -> Float[Tensor, "*c"]:
    r"""The variance that torch keeps in ``running_var``: :math:`\sigma^2 \, n / (n - 1)`.

    Returns:
        In the dtype of ``moments.var``; NaN where a channel has fewer than two values, because one
        value says nothing about the spread.
    """
    if isinstance(moments.count, Tensor):
        factor = moments.count / (moments.count - 1)
        return moments.var * factor.where(moments.count > 1, torch.nan).to(moments.var.dtype)
    if moments.count < 2:
        return torch.full_like(moments.var, torch.nan)
    return moments.var * (moments.count / (moments.count - 1))


def weight_of_new_batch(
    momentum: float | None, num_batches_tracked: Tensor | None
) -> float | Tensor:
    """The share of the running statistics that the batch at hand will get.

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


def moved_running(
    running_mean: Float[Tensor, "*c"],
    running_var: Float[Tensor, "*c"],
    batch: Moments,
    weight: float | Tensor,
) -> tuple[Float[Tensor, "*c"], Float[Tensor, "*c"]]:
    r"""Running statistics after one more batch: :math:`r' = (1 - w)\,r + w\,b`.

    Computed in the dtype of the batch's moments and rounded once; ``running_var`` moves towards the
    *unbiased* variance.

    Args:
        running_mean: Running mean so far.
        running_var: Running variance so far.
        batch: Moments of the new batch, at least two values a channel.
        weight: Weight of the new batch, see `weight_of_new_batch`.

    Returns:
        New tensors in the dtypes of ``running_mean`` and ``running_var``.
    """
    return _moved(running_mean, batch.mean, weight), _moved(
        running_var, unbiased_var(batch), weight
    )


@torch.no_grad()
def update_running(
    running_mean: Float[Tensor, "*c"],
    running_var: Float[Tensor, "*c"],
    batch: Moments,
    weight: float | Tensor,
) -> None:
    """Writes `moved_running` into the running statistics."""
    new_mean, new_var = moved_running(running_mean, running_var, batch, weight)
    write_buffer(running_mean, new_mean)
    write_buffer(running_var, new_var)


def count_batch(num_batches_tracked: Tensor) -> None:
    """Adds one to the counter, also where ``torch.func.grad`` captured it."""
    if torch._C._are_functorch_transforms_active():
        write_buffer(num_batches_tracked, num_batches_tracked + 1)
    else:
        num_batches_tracked.add_(1)


@torch.no_grad()
def write_buffer(buffer: Tensor, value: Tensor) -> None:
    """Writes ``value`` into ``buffer``, also where ``torch.func.grad`` captured the buffer.

    Of torch's ways to write into a captured tensor, ``out=`` is the one that it allows; and that
    one is not allowed under ``vmap``.
    """
    try:
        buffer.copy_(value)
    except RuntimeError as error:
        if "mutate a captured Tensor" not in str(error):
            raise
        torch.add(value, 0, out=buffer)


def _moved(running: Tensor, new: Tensor, weight: float | Tensor) -> Tensor:
    return ((1 - weight) * running.to(new.dtype) + weight * new).to(running.dtype)


def _widen(moments: Moments) -> Moments:
    return Moments(moments.count, moments.mean.double(), moments.var.double())


def _merge_two(a: Moments, b: Moments) -> Moments:
    count = a.count + b.count
    share = _share(b.count, count)
    delta = b.mean - a.mean
    mean = a.mean + share * delta
    var = (1 - share) * a.var + share * b.var + share * (1 - share) * delta.square()
    return Moments(count, mean, var)


def _share(part: Count, whole: Count) -> float | Tensor:
    if isinstance(whole, Tensor):
        return (part / whole).where(whole > 0, 0.0)
    return part / whole if whole > 0 else 0.0
