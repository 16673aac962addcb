"""What one layer gets while data pass: the moments of every call, merged exactly."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.moments import Moments, empty, merge_moments
from batchnorm.nn import functional
from batchnorm.nn.layers import LAYERS
from batchnorm.tools.patching import changed
from batchnorm.tools.patching.inputs import input_of
from batchnorm.tools.recalibration.precision import Chunks

_ticks = itertools.count()


class Enough(BaseException):
    """The layer has got all that it will get of this batch."""


@dataclass(frozen=True)
class Collected:
    """What came out of an intake, on the CPU.

    Attributes:
        moments: Of all values of each channel.
        calls: How many calls had values.
    """

    moments: Moments
    calls: int


class Intake:
    """Collects the moments of what a layer gets, and decides what the layer normalizes by.

    The layer computes in evaluation mode, from buffers of our own that stand in the place of its
    running statistics. Before each call they are given the moments of that call's input: the
    arithmetic of training, for which the statistics are summed once, and nothing is written.

    Args:
        name: Of the layer, for messages.
        layer: One that keeps running statistics.
    """

    def __init__(self, name: str, layer: _BatchNorm) -> None:
        assert layer.running_mean is not None
        assert layer.running_var is not None
        self.name, self.layer = name, layer
        # Our layers take float64 statistics beside an input of any dtype, torch's do not.
        dtype = torch.float64 if isinstance(layer, LAYERS) else layer.running_mean.dtype
        self._mean = layer.running_mean.detach().to(dtype, copy=True)
        self._var = layer.running_var.detach().to(dtype, copy=True)
        self._thread = threading.get_ident()
        self.normalizes_by_batch = True
        self.enough: int | None = None
        self.first_call = -1
        self._lengths: set[int] = set()
        self.clear()

    def clear(self) -> None:
        """Forgets what was collected, but not in which order the layers ran."""
        self._total = empty(self._mean.numel(), self._mean.device)
        self._batch: Moments | None = None
        self._chunks = Chunks()
        self._calls = self._calls_of_batch = 0

    @contextmanager
    def in_charge(self) -> Iterator[None]:
        """Meanwhile the layer normalizes by our buffers; its own are out of reach."""
        with changed([self.layer], training=False, running_mean=self._mean, running_var=self._var):
            yield

    @torch.no_grad()
    def normalize_by(self, mean: Tensor, var: Tensor) -> None:
        """Sets what the layer normalizes by."""
        self._mean.copy_(mean)
        self._var.copy_(var)

    def collect(self, layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook: runs before each call of the layer; those of other threads are not ours.

        Raises:
            TypeError: The layer gets no tensor.
            ValueError: The channels are not in dimension 1.
            Enough: Nothing more of this batch will come.
        """
        if threading.get_ident() != self._thread:
            return
        x = input_of(layer, args, kwargs, name=self.name, caller="recalibrate")
        if x.dim() < 2 or x.shape[1] != self._mean.numel():
            raise ValueError(
                f"recalibrate: layer {self.name!r} ({type(layer).__name__}) must get its "
                f"{self._mean.numel()} channels in dimension 1, got shape {tuple(x.shape)}; leave "
                "it out with layers."
            )
        if x.numel() > 0:
            with torch.no_grad():
                self._take(functional.moments(x.detach()))
        if self._calls_of_batch == self.enough:
            raise Enough

    def _take(self, call: Moments) -> None:
        if self.first_call < 0:
            self.first_call = next(_ticks)
        self._calls += 1
        self._calls_of_batch += 1
        self._total = merge_moments(self._total, call)
        self._batch = call if self._batch is None else merge_moments(self._batch, call)
        if self.normalizes_by_batch:
            used = call if call.count > 1 else self._total
            self.normalize_by(used.mean, used.var)

    def end_batch(self) -> None:
        """Notes that a batch is through."""
        self._lengths.add(self._calls_of_batch)
        self._calls_of_batch = 0
        if self._batch is not None:
            self._chunks.add(self._batch)
            self._batch = None

    def calls_of_every_batch(self) -> int | None:
        """How often the layer was called, if that was the same in all batches."""
        return next(iter(self._lengths)) if len(self._lengths) == 1 else None

    def collected(self) -> Collected:
        """What came so far."""
        total = self._total
        return Collected(Moments(total.count, total.mean.cpu(), total.var.cpu()), self._calls)

    def standard_error(self) -> float | None:
        """See `Chunks.standard_error`."""
        return self._chunks.standard_error(self.layer.eps)


@contextmanager
def listening(intakes: Iterable[Intake]) -> Iterator[None]:
    """Meanwhile these collect: their hooks come last, and see what the layer sees."""
    with ExitStack() as stack:
        for intake in intakes:
            handle = intake.layer.register_forward_pre_hook(intake.collect, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def merged(parts: Iterable[Mapping[str, Collected]]) -> dict[str, Collected]:
    """What several ranks collected, together; layers that got nothing are left out."""
    together: dict[str, Collected] = {}
    for part in parts:
        for name, new in part.items():
            if new.calls == 0:
                continue
            old = together.get(name)
            together[name] = (
                new
                if old is None
                else Collected(merge_moments(old.moments, new.moments), old.calls + new.calls)
            )
    return together
