"""Our tools around one training, for callbacks: guard and watch in it, recalibrate after it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from typing import Any, Literal

import torch
from torch import nn

from batchnorm.tools import guarding, monitoring, recalibration
from batchnorm.tools.patching import (
    Handle,
    batch_norms,
    has_frozen_mark,
    temporary_attributes,
    warn,
)
from batchnorm.tools.recalibration.passes import Forward, arguments

_WHO = "BatchNormCallback"
_WORST = {"mean_shift": max, "var_ratio_low": min, "var_ratio_high": max, "dead": max}
"""What is logged of the records of a step: for each of these the worst of all layers."""


class TrainingTools(Handle):
    """guard, watch and recalibrate around one training; ``remove()`` ends what it began.

    Attributes:
        guarded: The latest training's `batchnorm.guard`; None without one.
        watched: The latest training's `batchnorm.watch`; None without one.
        recalibrated: The report of `batchnorm.recalibrate` after it; None without one.
    """

    def __init__(
        self,
        *,
        guard: bool = True,
        watch: int | None = None,
        recalibrate: int | Literal["all"] | None = "all",
        forward: Forward | None = None,
    ) -> None:
        super().__init__()
        _check(watch, recalibrate)
        self.guarded: guarding.Guard | None = None
        self.watched: monitoring.Watch | None = None
        self.recalibrated: recalibration.Recalibration | None = None
        self._guard, self._watch, self._forward = guard, watch, forward
        self._recalibrate: int | Literal["all"] | None = recalibrate
        self._has_layers = False
        self._batches = 0

    def begin(self, model: nn.Module) -> None:
        """Starts to guard and to watch, after the end of an earlier training that failed."""
        self.remove()
        self.guarded = self.watched = self.recalibrated = None
        self._batches = 0
        self._has_layers = bool(batch_norms(model, caller=_WHO))
        if not self._has_layers:
            return
        with ExitStack() as stack:
            if self._guard:
                self.guarded = stack.enter_context(guarding.guard(model))
            if self._watch is not None:
                self.watched = stack.enter_context(monitoring.watch(model, every=self._watch))
            self._undo = (stack.pop_all().close,)

    @property
    def calls_model(self) -> bool:
        """True if `recalibrate` will call the model itself, for want of a ``forward``."""
        return self._has_layers and self._recalibrate is not None and self._forward is None

    def check_batch(self, model: nn.Module, batch: Any) -> None:
        """Refuses a first batch that `recalibrate` could not give to the model in the end.

        Raises:
            TypeError: ``forward`` of the model does not take it.
            ValueError: It is an empty list.
        """
        if self._batches or not self.calls_model:
            return
        args, keywords = arguments(batch)
        try:
            inspect.signature(model.forward).bind(*args, **keywords)
        except TypeError as error:
            raise TypeError(
                f"{_WHO}: recalibrate would give the batches to {type(model).__name__}.forward, "
                f"which does not take them ({error}); give forward=lambda model, batch: ..., or "
                "recalibrate=None."
            ) from None

    def end_batch(self) -> None:
        """Counts a batch, which an accumulation of gradients may not end with a step."""
        self._batches += 1

    def end_step(self) -> dict[str, float]:
        """Ends a step of the optimizer.

        Returns:
            What to log; nothing if the step was not recorded.
        """
        if self.watched is None:
            return {}
        self.watched.step()
        return self._numbers(self.watched)

    def finish(self, model: nn.Module, batches: Iterable[Any]) -> list[str]:
        """Ends the guard and the watch, then recalibrates. The mode of each module stays.

        An error of `recalibrate` becomes a warning: it is not worth the end of the user's script,
        with the weights of a whole training.

        Args:
            model: The model, in the mode in which it was trained.
            batches: The training data.

        Returns:
            What to tell the user.
        """
        self.remove()
        if self._recalibrate is not None and self._has_layers:
            try:
                self.recalibrated = self._recalibration(model, batches, self._recalibrate)
            except Exception as error:
                warn(
                    f"{_WHO}: recalibrate failed, so the running statistics stay as the training "
                    f"left them: {type(error).__name__}: {error}"
                )
        return [str(result) for result in (self.guarded, self.recalibrated) if result is not None]

    def one_epoch(self, batches: Iterable[Any], length: int | float | None = None) -> Iterator[Any]:
        """Yields the batches of an epoch; without a length as many as were trained on.

        Args:
            batches: The training data, which may have no end.
            length: Number of batches; None asks the data.
        """
        if length is None:
            try:
                length = len(batches)  # pyright: ignore[reportArgumentType]
            except TypeError:  # Loaders have ``__len__``, also for data without a length.
                length = math.inf
        return islice(batches, self._batches if math.isinf(length) else int(length))

    def _recalibration(
        self, model: nn.Module, batches: Iterable[Any], samples: int | Literal["all"]
    ) -> recalibration.Recalibration:
        """Recalibrates a model in evaluation, without dropout, but not layers it never trains."""
        layers = batch_norms(model, caller=_WHO)
        trained = [n for n, layer in layers.items() if layer.training or has_frozen_mark(layer)]
        with (
            torch.random.fork_rng(devices=[]),  # The order of the data draws from it.
            temporary_attributes(model.modules(), training=False),
        ):
            return recalibration.recalibrate(
                model,
                batches,
                forward=self._forward,
                max_samples=None if samples == "all" else samples,
                layers=None if len(trained) == len(layers) else trained,
            )

    def _numbers(self, watched: monitoring.Watch) -> dict[str, float]:
        latest = [record for record in watched.records if record["step"] == watched.steps]
        numbers: dict[str, float] = {}
        for name, worst in _WORST.items():
            known = [record[name] for record in latest if record[name] is not None]
            if known:
                numbers[f"batchnorm/{name}"] = float(worst(known))
        if latest and self.guarded is not None:
            numbers["batchnorm/skipped"] = float(sum(self.guarded.skipped.values()))
        return numbers


def _check(watch: int | None, recalibrate: int | Literal["all"] | None) -> None:
    """Raises a ValueError for what would fail only in a training, or after it."""
    if watch is not None and watch < 1:
        raise ValueError(f"{_WHO}: watch must be a number of steps, at least 1, got {watch}.")
    is_number = isinstance(recalibrate, int) and not isinstance(recalibrate, bool)
    if recalibrate not in ("all", None) and not (is_number and recalibrate >= 1):
        raise ValueError(
            f"{_WHO}: recalibrate must be 'all', a number of samples (at least 1) or None, got "
            f"{recalibrate!r}."
        )
