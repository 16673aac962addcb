"""``watch``: records what the statistics of a model do, step by step."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from batchnorm.moments import Moments, merge_moments
from batchnorm.nn import functional
from batchnorm.tools.monitoring.record import Record, record
from batchnorm.tools.monitoring.state import is_told_by_buffers, states
from batchnorm.tools.monitoring.table import table
from batchnorm.tools.patching import Choice, batch_norms, input_of


def watch(
    model: nn.Module, layers: Choice = None, *, every: int = 1, keep: int | None = 1000
) -> Watch:
    r"""Watches the batch norm layers of a model while it trains.

    Call the result once after every step, or give it to a framework as a callback: it takes any
    arguments and ignores them. `Watch.records` then has a dict for each layer and recorded step,
    where ``None`` is not known:

    - ``step``, ``layer``, ``channels``, and ``batches``: how many batches moved the running
      statistics since the last record. Zero for a layer in training is a layer that is never
      called, or whose counter is not saved.
    - ``mean_shift``, ``mean_shift_rms``: how far the batch's mean is from the running mean before
      it, in running standard deviations; the largest of all channels, and the root mean square.
    - ``var_ratio_low``, ``var_ratio_high``: the batch's variance over the running variance before
      it, both with ``eps`` added and both unbiased; the smallest and the largest of all channels.
    - ``mean_drift``, ``var_drift``: how far the running mean moved since the last record, in
      standard deviations, and by what factor (1 or more) the running variance did; the largest.
    - ``dead``: share of the channels that pass nothing on, for one of three reasons:
      ``dead_constant``, a variance below ``eps / 100``; ``dead_weight``, a weight of at most 1e-4;
      ``dead_relu``, bias + 3 |weight| not above zero, so that a ReLU, *if one follows*, passes
      about one value in a thousand.
    - ``weight_low``, ``weight_high``, and the same of ``bias``, ``batch_mean``, ``batch_var``,
      ``running_mean``, ``running_var``: ranges over the channels.

    The batch's moments are not computed again: with w what the new batches weigh in the running
    statistics r, they are :math:`r + (r' - r) / w`. If there were several batches, that is their
    average as the momentum weights them. Rounding is as large as the buffers' relative step times
    r / w: seven digits become six in float32 with a momentum of 0.1, and one or none in bfloat16.
    Only layers whose buffers do not tell (frozen, without statistics or counter) get a hook; it
    computes the moments of the input on the steps that are recorded, while gradients are enabled.
    Under ``torch.compile`` such a hook is traced anew in every step until torch gives up and runs
    the layer eagerly, and ``fullgraph=True`` raises: there, watch layers that are not frozen.

    Costs some small operations a layer and two transfers a device on a recorded step, and nothing
    on others: 1 to 2 % of a step of ResNet-18 on a CPU. A layer that is listened to costs one
    more pass over its input, and the first of them one more transfer: with all 20 layers frozen
    about 4 % of such a step. Any thread may call the layers; one of them ends the steps.

    Args:
        model: Any module. Its mode may change; a layer that is frozen later is heard from the
            record after.
        layers: Which layers.
        every: Record every so many steps.
        keep: How many of the last recorded steps stay in `Watch.records`; None keeps all. A record
            is about 2 kB, so 20 layers fill 40 MB with the 1000 of the default, and would fill 4 GB
            in 100 000 steps.

    Returns:
        The handle; it ends with ``remove()`` or as a context manager.

    Raises:
        TypeError: ``model`` is not a module, or ``layers`` is one string.
        ValueError: ``every`` or ``keep`` is less than one, a name fits no layer, or a layer is
            lazy.
    """
    if every < 1:
        raise ValueError(f"watch: every must be at least 1, got {every}.")
    if keep is not None and keep < 1:
        raise ValueError(f"watch: keep must be at least 1, or None for all, got {keep}.")
    return Watch(batch_norms(model, layers, caller="watch"), every, keep)


class Watch:
    """The records of `watch`; ``str()`` of it is a table of the latest, the worst layer first.

    Args:
        layers: By name.
        every: Record every so many steps.
        keep: How many of the last recorded steps stay; None for all.

    Attributes:
        records: One dict for each layer and recorded step that is kept, the oldest first.
        steps: How many steps there have been.
    """

    def __init__(self, layers: Mapping[str, _BatchNorm], every: int, keep: int | None) -> None:
        self.records: list[Record] = []
        self.steps = 0
        self._layers = dict(layers)
        self._every = every
        self._keep = keep
        self._seen: dict[str, Moments] = {}
        self._hooks: dict[str, RemovableHandle] = {}
        self._removed = False
        self._before = states(self._layers, {})
        self._listen()

    def step(self) -> None:
        """Ends a step; records it if it is due.

        Raises:
            RuntimeError: The watch was removed.
        """
        if self._removed:
            raise RuntimeError("watch: it was removed and records nothing more; make a new one.")
        self.steps += 1
        if self.steps % self._every:
            return
        seen = {name: self._seen.pop(name, None) for name in self._layers}
        now = states(self._layers, {name: m for name, m in seen.items() if m is not None})
        self.records += [
            record(self.steps, name, self._before[name], now[name]) for name in self._layers
        ]
        if self._keep is not None:
            del self.records[: -self._keep * len(self._layers)]
        self._before = now
        self._listen()

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """`step`, as a callback that takes whatever a framework gives."""
        self.step()

    def remove(self) -> None:
        """Takes the hooks away; the records stay."""
        self._removed = True
        for name in list(self._hooks):
            self._hooks.pop(name).remove()

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    def __str__(self) -> str:
        return table(self.records)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, which has no NaN and no infinity: they are None."""
        records = [{key: _for_json(value) for key, value in r.items()} for r in self.records]
        return {"steps": self.steps, "every": self._every, "records": records}

    def figure(self) -> Any:
        """A plot of the records by step: shift of the mean, ratio of the variance, dead channels.

        Returns:
            A ``matplotlib.figure.Figure``; its ``savefig("statistics.svg")`` writes a file.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: Nothing is recorded yet.
        """
        if importlib.util.find_spec("matplotlib") is None:
            raise ImportError(
                "watch: the plot needs matplotlib, which is not installed; "
                "pip install 'batchnorm[cli]'."
            )
        from batchnorm.tools.monitoring.chart import chart

        return chart(self.records)

    def _listen(self) -> None:
        """Hooks on the layers whose buffers do not tell, and on no others."""
        for name, layer in self._layers.items():
            told = is_told_by_buffers(layer)
            if told and name in self._hooks:
                self._hooks.pop(name).remove()
            elif not told and name not in self._hooks:
                self._hooks[name] = layer.register_forward_pre_hook(
                    _Ear(self, name), with_kwargs=True
                )

    def see(self, name: str, x: torch.Tensor) -> None:
        """Takes the moments of a layer's input, if the step is going to be recorded."""
        if (self.steps + 1) % self._every or not torch.is_grad_enabled():
            return
        moments = functional.moments(x.detach())
        # Nothing is lost of what other threads put here meanwhile, or take away.
        while self._seen.setdefault(name, moments) is not moments:
            others = self._seen.pop(name, None)
            moments = moments if others is None else merge_moments(others, moments)


class _Ear:
    """The hook on a layer."""

    def __init__(self, owner: Watch, name: str) -> None:
        self._owner, self._name = owner, name

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = input_of(layer, args, kwargs, name=self._name, caller="watch")
        self._owner.see(self._name, x)


def _for_json(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
