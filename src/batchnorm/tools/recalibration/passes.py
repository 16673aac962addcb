"""Passes over the data: one for all layers, or one more for each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.moments import unbiased_var
from batchnorm.tools.recalibration.collector import (
    Collected,
    MomentCollector,
    StopForward,
    collecting,
    merge_collected,
)
from batchnorm.tools.recalibration.distributed import AllRanks
from batchnorm.torch_internals import is_real

Forward = Callable[[nn.Module, Any], object]
Progress = Callable[[int], object]
Collectors = Mapping[str, MomentCollector]


@dataclass(frozen=True)
class PassSummary:
    """Counts of one pass over the batches.

    Attributes:
        samples: Number of samples that passed.
        batches: Number of batches that they came in.
        stopped: What ended the pass early: ``"max_samples"``, ``"tolerance"``, or None.
    """

    samples: int = 0
    batches: int = 0
    stopped: str | None = None


@dataclass(frozen=True)
class Outcome:
    """New statistics of the layers, in the order in which they run.

    Attributes:
        collected: What came in, on all ranks together.
        new: Mean and unbiased variance, in the dtypes of the buffers, on the CPU.
        samples: Samples of one pass, on all ranks together.
        batches: Batches of one pass, on all ranks together.
        own: The first pass of this rank.
    """

    collected: Mapping[str, Collected] = field(default_factory=dict)
    new: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    samples: int = 0
    batches: int = 0
    own: PassSummary = PassSummary()


@dataclass
class Feeder:
    """Gives batches to a model, as often as it is asked to.

    Attributes:
        model: The model.
        batches: Batches that ``forward`` takes.
        forward: Gives a batch to the model.
        max_samples: A pass ends with the batch that reaches this number.
        progress: Called after each batch with the number of samples of all passes so far.
        samples: That number.
    """

    model: nn.Module
    batches: Iterable[Any]
    forward: Forward
    max_samples: int | None
    progress: Progress | None
    samples: int = 0

    def run(self, end_batch: Callable[[], bool], at_most: int | None = None) -> PassSummary:
        """Makes one pass.

        Args:
            end_batch: Called after each batch; True ends the pass.
            at_most: The largest number of batches; None takes all.
        """
        samples = batches = 0
        for batch in islice(self.batches, at_most):
            _check_values(batch)
            try:
                with torch.no_grad():
                    self.forward(self.model, batch)
            except StopForward:
                pass
            count = count_samples(batch)
            samples += count
            batches += 1
            is_precise = end_batch()
            self.samples += count
            if self.progress is not None:
                self.progress(self.samples)
            if is_precise:
                return PassSummary(samples, batches, "tolerance")
            if self.max_samples is not None and samples >= self.max_samples:
                return PassSummary(samples, batches, "max_samples")
        return PassSummary(samples, batches)


def call(model: nn.Module, batch: Any) -> object:
    """Calls ``model(x)``: of a tuple or list with its first element, of a dict with keywords.

    Raises:
        TypeError: The batch is something else.
        ValueError: It is an empty tuple or list.
    """
    args, keywords = arguments(batch)
    return model(*args, **keywords)


def arguments(batch: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Returns the positional and the keyword arguments with which `call` calls a model.

    Raises:
        TypeError: The batch has none.
        ValueError: It is an empty tuple or list.
    """
    given = batch
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise ValueError("recalibrate: a batch is an empty list; give inputs.")
        given = batch[0]
    if isinstance(given, Mapping):
        return (), given
    if isinstance(given, Tensor):
        return (given,), {}
    what = type(batch).__name__ + ("" if given is batch else f" of {type(given).__name__}")
    raise TypeError(
        "recalibrate: a batch must be a tensor, a dict of keyword arguments, or a tuple or list "
        f"whose first element is one of these, got {what}; give forward=lambda model, batch: ..."
    )


def _check_values(batch: Any) -> None:
    tensor = _first_tensor(batch)
    if tensor is not None and not is_real(tensor):
        raise ValueError(
            "recalibrate: a batch is on the meta device or fake and has no values; give real data."
        )


def count_samples(batch: Any) -> int:
    """Returns dimension 0 of the first tensor in the batch; one for a batch without tensors."""
    tensor = _first_tensor(batch)
    return 1 if tensor is None or tensor.dim() == 0 else tensor.shape[0]


def in_one_pass(
    feeder: Feeder, collectors: Collectors, tolerance: float | None, ranks: AllRanks
) -> Outcome:
    """Lets all layers collect at once, each normalizing by the batch that it gets.

    Args:
        feeder: Gives the batches.
        collectors: Collectors by name of the layer.
        tolerance: Relative standard error at which the pass may end; None goes on to the end.
        ranks: The ranks that merge what they collected.

    Raises:
        ValueError: There is no data, or it makes no statistics.
    """

    def end_batch() -> bool:
        for collector in collectors.values():
            collector.end_batch()
        return tolerance is not None and _are_precise(collectors, tolerance)

    with collecting(collectors.values()):
        own = feeder.run(end_batch)
    reached = sorted(_reached(collectors), key=lambda collector: collector.order)
    results = ranks.share((own, {each.name: each.collected() for each in reached}))
    samples = sum(one.samples for one, _ in results)
    if samples == 0:
        raise ValueError("recalibrate: batches gave no samples; the model is as it was.")
    collected = merge_collected(part for _, part in results)
    new = {name: _statistics(collectors[name], part) for name, part in collected.items()}
    return Outcome(collected, new, samples, sum(one.batches for one, _ in results), own)


def layer_by_layer(
    feeder: Feeder, collectors: Collectors, first: Outcome, ranks: AllRanks
) -> Outcome:
    """Lets one layer after the other collect, all normalizing as in evaluation.

    Args:
        feeder: Gives the batches, again for each layer.
        collectors: Collectors by name of the layer.
        first: Result of `in_one_pass`: the order, the number of batches, and statistics for layers
            that run before their turn.
        ranks: The ranks that merge what they collected.

    Raises:
        ValueError: The batches are not as many as in the first pass, or make no statistics.
    """
    for name, (mean, var) in first.new.items():
        collectors[name].normalizes_by_batch = False
        collectors[name].normalize_by(mean, var)
    collected, new = {}, {}
    for name in first.new:
        collector = collectors[name]
        results = ranks.share(_collect_one(feeder, collector, first.own.batches))
        parts = merge_collected({name: part} for part in results)
        if name not in parts:
            raise ValueError(f"recalibrate: layer {name!r} was reached in the first pass only.")
        collected[name] = parts[name]
        new[name] = _statistics(collector, parts[name])
        collector.normalize_by(*new[name])
    return replace(first, collected=collected, new=new)


def _collect_one(feeder: Feeder, collector: MomentCollector, batches: int) -> Collected:
    collector.calls_needed = collector.calls_in_every_batch()
    collector.clear()

    def end_batch() -> bool:
        collector.end_batch()
        return False

    with collecting([collector]):
        summary = feeder.run(end_batch, batches)
    if summary.batches != batches:
        raise ValueError(
            f"recalibrate: batches gave {batches} batches in the first pass and "
            f"{summary.batches} in another; with sequential=True they must stay as many."
        )
    return collector.collected()


def _reached(collectors: Collectors) -> list[MomentCollector]:
    return [collector for collector in collectors.values() if collector.order >= 0]


def _are_precise(collectors: Collectors, tolerance: float) -> bool:
    errors = [collector.standard_error() for collector in _reached(collectors)]
    return bool(errors) and all(error is not None and error < tolerance for error in errors)


def _statistics(collector: MomentCollector, collected: Collected) -> tuple[Tensor, Tensor]:
    """Returns mean and unbiased variance, rounded once.

    Raises:
        ValueError: They are not finite.
    """
    layer, moments = collector.layer, collected.moments
    who = f"recalibrate: layer {collector.name!r} ({type(layer).__name__})"
    if moments.count == 1:
        raise ValueError(
            f"{who} got one value a channel in all, and one value has no variance; give more data."
        )
    if not (moments.mean.isfinite().all() and moments.var.isfinite().all()):
        raise ValueError(
            f"{who} got values that are not finite; the model is as it was. Look for NaN or "
            "infinity in the data, or in the weights before this layer."
        )
    dtypes = [buffer.dtype for buffer in collector.buffers]
    mean = moments.mean.to(dtypes[0])
    var = (unbiased_var(moments) if collector.unbiased else moments.var).to(dtypes[1])
    if not (mean.isfinite().all() and var.isfinite().all()):
        raise ValueError(
            f"{who} has statistics that are too large for {dtypes[1]}; the model is "
            "as it was. Keep its buffers in float32."
        )
    return mean, var


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return None
    return next((tensor for tensor in map(_first_tensor, value) if tensor is not None), None)
