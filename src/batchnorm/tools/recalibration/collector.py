"""Moments of the inputs of one layer, merged exactly, and how far off they may be."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from batchnorm.moments import Moments, empty, merge_moments
from batchnorm.nn import functional
from batchnorm.nn.layers import LAYERS
from batchnorm.tools.patching import (
    Handle,
    eps_of,
    has_accelerated_mark,
    listen,
    statistics_of,
    temporary_attributes,
)

FEWEST_CHUNKS = 8
"""A spread between fewer chunks says little, so there is no standard error."""
_MOST_CHUNKS = 64
"""At this number neighbors are merged, so that memory stays the same however long the data are."""
_order = itertools.count()


class StopForward(BaseException):
    """Ends a forward early: the layer needs nothing more of this batch."""


@dataclass(frozen=True)
class Collected:
    """Result of a collector, on the CPU.

    Attributes:
        moments: Moments of all values of each channel.
        calls: Number of calls that had values.
    """

    moments: Moments
    calls: int


class MomentCollector:
    """Collects the moments of a layer's inputs, and sets the statistics that it normalizes by.

    The layer computes in evaluation mode, with buffers of the collector in the place of its running
    statistics. Before each call they receive the moments of that call's input. This is the
    arithmetic of training, but sums are taken once, and nothing of the layer is written.

    Args:
        name: Name of the layer, for messages.
        layer: A layer with running statistics.
        unbiased: True if it stores the unbiased variance, as torch's layers do.
        channel_dim: Dimension of the channels in its input: 1, or -1 for the last one.

    Attributes:
        normalizes_by_batch: Each call sets what the layer normalizes by.
        calls_needed: A forward ends at this call of the layer; None lets it run to its end.
        order: Place in the order in which layers were first called; -1 before the first call.
    """

    def __init__(
        self, name: str, layer: nn.Module, *, unbiased: bool = True, channel_dim: int = 1
    ) -> None:
        self.name, self.layer, self.unbiased = name, layer, unbiased
        self._channel_dim = channel_dim
        # Our kernels take float64 statistics beside an input of any dtype, others do not.
        is_ours = isinstance(layer, LAYERS) or has_accelerated_mark(layer)
        dtype = torch.float64 if is_ours else None
        self._names = tuple(statistics_of(layer))
        self._mean, self._var = (
            buffer.detach().to(dtype or buffer.dtype, copy=True) for buffer in self.buffers
        )
        self._thread = threading.get_ident()
        self._calls_in_batches: set[int] = set()
        self.normalizes_by_batch = True
        self.calls_needed: int | None = None
        self.order = -1
        self.clear()

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        """The running mean and variance that the layer has now."""
        mean, var = (getattr(self.layer, name) for name in self._names)
        return mean, var

    def clear(self) -> None:
        """Drops what was collected, but not in which order the layers ran."""
        self._total = empty(self._mean.numel(), self._mean.device)
        self._batch: Moments | None = None
        self._chunks = ChunkedMoments()
        self._calls = self._calls_in_batch = 0

    def using_own_buffers(self) -> Handle:
        """Lets the layer normalize by the collector's buffers; its own are out of reach."""
        statistics = dict(zip(self._names, (self._mean, self._var), strict=True))
        return temporary_attributes([self.layer], training=False, **statistics)

    @torch.no_grad()
    def normalize_by(self, mean: Tensor, var: Tensor) -> None:
        """Sets the statistics that the layer normalizes by."""
        self._mean.copy_(mean.view_as(self._mean))
        self._var.copy_(var.view_as(self._var))

    def collect(self, x: Tensor) -> None:
        """Takes the input of a call, before the call; those of other threads are not data.

        Raises:
            ValueError: The channels are in another dimension.
            StopForward: The layer needs nothing more of this batch.
        """
        if threading.get_ident() != self._thread:
            return
        if x.dim() < 2 or x.shape[self._channel_dim] != self._mean.numel():
            where = "dimension 1" if self._channel_dim == 1 else "the last dimension"
            raise ValueError(
                f"recalibrate: layer {self.name!r} ({type(self.layer).__name__}) must get its "
                f"{self._mean.numel()} channels in {where}, got shape {tuple(x.shape)}; leave it "
                "out with layers."
            )
        if x.numel() > 0:
            with torch.no_grad():
                self._add(functional.moments(x.detach().movedim(self._channel_dim, 1)))
        if self._calls_in_batch == self.calls_needed:
            raise StopForward

    def _add(self, call: Moments) -> None:
        if self.order < 0:
            self.order = next(_order)
        self._calls += 1
        self._calls_in_batch += 1
        self._total = merge_moments(self._total, call)
        self._batch = call if self._batch is None else merge_moments(self._batch, call)
        if self.normalizes_by_batch:
            used = call if call.count > 1 else self._total
            self.normalize_by(used.mean, used.var)

    def end_batch(self) -> None:
        """Closes a batch: its moments are one sample of the standard error."""
        self._calls_in_batches.add(self._calls_in_batch)
        self._calls_in_batch = 0
        if self._batch is not None:
            self._chunks.add(self._batch)
            self._batch = None

    def calls_in_every_batch(self) -> int | None:
        """Number of calls of the layer in a batch, None if batches differ in it."""
        return next(iter(self._calls_in_batches)) if len(self._calls_in_batches) == 1 else None

    def collected(self) -> Collected:
        """Returns what was collected so far."""
        total = self._total
        return Collected(Moments(total.count, total.mean.cpu(), total.var.cpu()), self._calls)

    def standard_error(self) -> float | None:
        """See `ChunkedMoments.standard_error`."""
        return self._chunks.standard_error(self.eps)

    @property
    def eps(self) -> float:
        """See `patching.eps_of`."""
        return eps_of(self.layer)


def collecting(collectors: Iterable[MomentCollector]) -> Handle:
    """Lets the collectors take the inputs of their layers, as the layers see them."""
    by_name = {collector.name: collector for collector in collectors}
    layers = {name: collector.layer for name, collector in by_name.items()}
    return listen(layers, lambda name, x: by_name[name].collect(x), caller="recalibrate")


def merge_collected(parts: Iterable[Mapping[str, Collected]]) -> dict[str, Collected]:
    """Merges what several ranks collected; layers that got nothing are left out."""
    merged: dict[str, Collected] = {}
    for part in parts:
        for name, new in part.items():
            old = merged.get(name)
            if old is not None and new.calls > 0:
                new = Collected(merge_moments(old.moments, new.moments), old.calls + new.calls)
            if new.calls > 0:
                merged[name] = new
    return merged


class ChunkedMoments:
    """Moments of up to 64 chunks of consecutive batches; chunks grow, so that memory does not."""

    def __init__(self) -> None:
        self._full: list[Moments] = []
        self._growing: list[Moments] = []
        self._size = 1

    def add(self, batch: Moments) -> None:
        """Adds the moments of one more batch."""
        self._growing.append(batch)
        if len(self._growing) == self._size:
            self._full.append(merge_moments(*self._growing))
            self._growing = []
        if len(self._full) == _MOST_CHUNKS:
            pairs = zip(self._full[::2], self._full[1::2], strict=True)
            self._full = [merge_moments(first, second) for first, second in pairs]
            self._size *= 2

    def standard_error(self, eps: float) -> float | None:
        r"""Estimates the largest relative standard error of a channel's mean or variance.

        A chunk :math:`b` of :math:`n_b` values, :math:`w_b = n_b / \bar n`, has the mean
        :math:`m_b` and, around the mean :math:`\mu` of all, the mean square
        :math:`q_b = v_b + (m_b - \mu)^2`. Then :math:`\mu` and :math:`\sigma^2` are the weighted
        means of the :math:`m_b` and the :math:`q_b`, and a mean of :math:`K` weighted chunks has
        the squared standard error :math:`\sum_b (w_b (z_b - \bar z))^2 / (K (K - 1))`. Values
        inside a chunk may depend on each other; only the chunks must be independent.

        Args:
            eps: That of the layer; errors are in units of :math:`\sqrt{\sigma^2 + \epsilon}` and
                :math:`\sigma^2 + \epsilon`, which is what the layer divides by.

        Returns:
            None for fewer than 8 chunks, whose spread says little.

        Source:
            Cochran (1977), "Sampling Techniques", section 6.3, the ratio estimator of clusters of
            unequal size.
        """
        if len(self._full) < FEWEST_CHUNKS:
            return None
        mean = torch.stack([chunk.mean for chunk in self._full])
        var = torch.stack([chunk.var for chunk in self._full])
        weight = mean.new_tensor([float(chunk.count) for chunk in self._full])[:, None]
        weight /= weight.mean()
        square = var + (mean - (weight * mean).mean(0)).square()
        scale = (weight * square).mean(0) + eps
        of_mean = _error_of_mean(mean, weight) / scale.sqrt()
        of_var = _error_of_mean(square, weight) / scale
        return float(torch.maximum(of_mean, of_var).max())


def _error_of_mean(values: Tensor, weight: Tensor) -> Tensor:
    chunks = len(values)
    deviations = weight * (values - (weight * values).mean(0))
    return (deviations.square().sum(0) / (chunks * (chunks - 1))).sqrt()
