"""Batches go through a model: how each is given to it, how samples are counted, when to stop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.tools.recalibration.intake import Enough

Forward = Callable[[nn.Module, Any], object]
Progress = Callable[[int], object]


@dataclass(frozen=True)
class Passed:
    """One pass over the batches.

    Attributes:
        samples: How many passed.
        batches: In how many batches.
        stopped: What ended the pass early: ``"max_samples"``, ``"tolerance"``, or None.
    """

    samples: int
    batches: int
    stopped: str | None


class Feeder:
    """Gives batches to a model, as often as it is asked to.

    Args:
        model: Any.
        batches: What ``forward`` takes.
        forward: How to give a batch to the model.
        max_samples: A pass ends with the batch that reaches this number.
        progress: Told after each batch how many samples have passed in all passes.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        forward: Forward | None,
        max_samples: int | None,
        progress: Progress | None,
    ) -> None:
        self._model = model
        self._batches = batches
        self._forward = forward or call
        self._max_samples = max_samples
        self._progress = progress
        self._samples = 0

    def run(self, end_batch: Callable[[], bool], at_most: int | None = None) -> Passed:
        """One pass.

        Args:
            end_batch: Called after each batch; says whether it has seen enough.
            at_most: So many batches; None is all.
        """
        samples = batches = 0
        for batch in islice(self._batches, at_most):
            self._give(batch)
            count = samples_of(batch)
            samples += count
            batches += 1
            precise = end_batch()
            self._samples += count
            if self._progress is not None:
                self._progress(self._samples)
            if precise:
                return Passed(samples, batches, "tolerance")
            if self._max_samples is not None and samples >= self._max_samples:
                return Passed(samples, batches, "max_samples")
        return Passed(samples, batches, None)

    def _give(self, batch: Any) -> None:
        try:
            with torch.no_grad():
                self._forward(self._model, batch)
        except Enough:
            pass


def call(model: nn.Module, batch: Any) -> object:
    """``model(x)``: of a tuple or list the first element, of a dict its values as keywords.

    Raises:
        TypeError: The batch is something else.
        ValueError: It is an empty tuple or list.
    """
    given = batch
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise ValueError("recalibrate: a batch is an empty list; give inputs.")
        given = batch[0]
    if isinstance(given, Mapping):
        return model(**given)
    if isinstance(given, Tensor):
        return model(given)
    what = type(batch).__name__ + ("" if given is batch else f" of {type(given).__name__}")
    raise TypeError(
        "recalibrate: a batch must be a tensor, a dict of keyword arguments, or a tuple or list "
        f"whose first element is one of these, got {what}; give forward=lambda model, batch: ..."
    )


def samples_of(batch: Any) -> int:
    """Dimension 0 of the first tensor in the batch; a batch without tensors counts as one."""
    tensor = _first_tensor(batch)
    return 1 if tensor is None or tensor.dim() == 0 else tensor.shape[0]


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return None
    found = (_first_tensor(element) for element in value)
    return next((tensor for tensor in found if tensor is not None), None)
