"""The one statistic of batch normalization: count, mean and variance of a channel.

All conventions of the library about statistics are in this file:

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
        count: Number of values of a channel: one number for all channels, or a tensor with one a
            channel.
        mean: Mean of each channel, in the unit of the data.
        var: Biased variance of each channel, in that unit squared.
    """

    count: Count
    mean: Float[Tensor, "*c"]
    var: Float[Tensor, "*c"]


def empty(num_features: int, device: torch.device | str | None = None) -> Moments:
    """Returns moments of no data: merging them with others changes nothing."""
    zeros = torch.zeros(num_features, dtype=torch.float64, device=device)
    return Moments(0, zeros, zeros.clone())


def merge_moments(first: Moments, *others: Moments) -> Moments:
    r"""Merges the moments of disjoint parts into those of their union.

    With the shares :math:`s_i = n_i / n`,
    :math:`\mu = \sum s_i \mu_i` and
    :math:`\sigma^2 = \sum s_i \left(\sigma_i^2 + (\mu_i - \mu)^2\right)`.
    No squares of the data are subtracted, so a large mean costs no accuracy; and all parts are
    merged at once, so the rounding errors do not add up over many parts. Empty parts change
    nothing, to the last bit.

    Args:
        first: Moments of a part.
        *others: Moments of more parts, of the same channels.

    Returns:
        Moments in float64.

    Example:
        >>> import torch
        >>> first = Moments(2, torch.tensor([1.0]), torch.tensor([0.0]))
        >>> second = Moments(6, torch.tensor([5.0]), torch.tensor([4.0]))
        >>> union = merge_moments(first, second)
        >>> union.count, union.mean.item(), union.var.item()
        (8, 4.0, 6.0)

    Source:
        Chan, Golub and LeVeque (1979), "Updating formulae and a pairwise algorithm for computing
        sample variances", eq. 2.1 for two parts, here for any number.
    """
    parts = [part for part in (first, *others) if isinstance(part.count, Tensor) or part.count > 0]
    if len(parts) < 2:
        only = parts[0] if parts else first
        return Moments(only.count, only.mean.double(), only.var.double())
    if len(parts) == 2 and all(isinstance(part.count, int) for part in parts):
        return _merge_pair(*parts)
    means = torch.stack([part.mean.double() for part in parts])
    variances = torch.stack([part.var.double() for part in parts])
    shares = _shares([part.count for part in parts], means)
    empty_parts = shares == 0
    means, variances = (v.masked_fill(empty_parts, 0) for v in (means, variances))
    mean = (shares * means).sum(0)
    deviations = (means - mean).masked_fill(empty_parts, 0)
    # Each sum is taken again about its first result: what the rounding of the sum and of the shares
    # has left comes out as ``rest``, for the mean, and in the second term, for the variance.
    rest = (shares * deviations).sum(0)
    squares = variances + deviations.square()
    var = (shares * squares).sum(0)
    var = var + (shares * (squares - var)).sum(0) - rest.square()
    return Moments(sum(part.count for part in parts), mean + rest, var)


def unbiased_var(moments: Moments) -> Float[Tensor, "*c"]:
    r"""Computes the variance that torch saves in ``running_var``: :math:`\sigma^2 \, n / (n - 1)`.

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


def _merge_pair(a: Moments, b: Moments) -> Moments:
    """Merges two parts in a third of the time; tools merge batch after batch in this way."""
    count = a.count + b.count
    share = b.count / count
    mean, delta = a.mean.double(), b.mean.double() - a.mean.double()
    var = (1 - share) * a.var.double() + share * b.var.double()
    return Moments(count, mean + share * delta, var + share * (1 - share) * delta.square())


def _shares(counts: list[Count], means: Tensor) -> Tensor:
    """Shares of the parts in the union, which broadcast with ``means``; zeros if all are empty."""
    if any(isinstance(count, Tensor) for count in counts):
        wide = (torch.as_tensor(count, device=means.device).double() for count in counts)
        n = torch.stack([count.expand_as(means[0]) for count in wide])
        total = n.sum(0)
        return (n / total).masked_fill(total == 0, 0)
    total = sum(counts)
    return means.new_tensor([n / total for n in counts]).reshape(-1, *[1] * (means.dim() - 1))
