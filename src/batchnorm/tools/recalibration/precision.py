"""How far off moments of some batches may be, judged by the spread between the batches."""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.moments import Moments, merge_moments

FEWEST = 8
_MOST = 64


class Chunks:
    """Moments of up to 64 chunks of consecutive batches; chunks grow, so that memory does not."""

    def __init__(self) -> None:
        self._full: list[Moments] = []
        self._growing: list[Moments] = []
        self._size = 1

    def add(self, batch: Moments) -> None:
        """Takes one more batch."""
        self._growing.append(batch)
        if len(self._growing) == self._size:
            self._full.append(merge_moments(*self._growing))
            self._growing = []
        if len(self._full) == _MOST:
            pairs = zip(self._full[::2], self._full[1::2], strict=True)
            self._full = [merge_moments(first, second) for first, second in pairs]
            self._size *= 2

    def standard_error(self, eps: float) -> float | None:
        r"""The largest relative standard error of a channel's mean or variance.

        A chunk :math:`b` of :math:`n_b` values, :math:`w_b = n_b / \bar n`, has the mean
        :math:`m_b` and, around the mean :math:`\mu` of all, the mean square
        :math:`q_b = v_b + (m_b - \mu)^2`. Then :math:`\mu` and :math:`\sigma^2` are the weighted
        means of the :math:`m_b` and the :math:`q_b`, and a mean of :math:`K` weighted chunks has
        the squared standard error :math:`\sum_b (w_b (z_b - \bar z))^2 / (K (K - 1))`. Values of
        one image or one batch may depend on each other as they like; only the chunks must not.

        Args:
            eps: That of the layer; errors are in units of :math:`\sqrt{\sigma^2 + \epsilon}` and
                :math:`\sigma^2 + \epsilon`, which is what the layer divides by.

        Returns:
            None for fewer than 8 chunks, whose spread says little.

        Source:
            Cochran (1977), "Sampling Techniques", section 6.3, the ratio estimator of clusters of
            unequal size.
        """
        if len(self._full) < FEWEST:
            return None
        mean = torch.stack([chunk.mean for chunk in self._full])
        var = torch.stack([chunk.var for chunk in self._full])
        share = mean.new_tensor([float(chunk.count) for chunk in self._full])[:, None]
        share /= share.mean()
        square = var + (mean - (share * mean).mean(0)).square()
        scale = (share * square).mean(0) + eps
        of_mean = _error_of_mean(mean, share) / scale.sqrt()
        of_var = _error_of_mean(square, share) / scale
        return float(torch.maximum(of_mean, of_var).max())


def _error_of_mean(values: Tensor, share: Tensor) -> Tensor:
    chunks = len(values)
    deviations = share * (values - (share * values).mean(0))
    return (deviations.square().sum(0) / (chunks * (chunks - 1))).sqrt()
