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
