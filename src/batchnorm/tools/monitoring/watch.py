"""``watch``: records how the statistics of a model move, step by step, until it is removed."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.files import for_json
from batchnorm.moments import Moments, merge_moments
from batchnorm.nn import functional
from batchnorm.tools.monitoring.record import Record, record
from batchnorm.tools.monitoring.state import determines_batch, states
from batchnorm.tools.monitoring.table import table
from batchnorm.tools.patching import (
    Handle,
    LayerSelection,
    add_follower,
    batch_norms,
    listen,
    probe,
    remove_follower,
    statistics_of,
)
from batchnorm.tools.wording import Printed


def watch(
    model: nn.Module, layers: LayerSelection = None, *, every: int = 1, keep: int | None = 1000
) -> Watch:
    r"""Watches the batch norm layers of a model while it trains.

    Call the result once after every step, or pass it to a framework as a callback: it takes any
    arguments and ignores them. `Watch.records` then has a dict for each layer and recorded step,
    with ``None`` for a value that is not known:

    - ``step``, ``layer``, ``channels``, and ``batches``: number of batches that moved the running
      statistics since the last record. Zero for a layer in training means that it is never called,
      or that its counter is not saved.
    - ``mean_shift``, ``mean_shift_rms``: distance of the batch's mean from the running mean before
      it, in running standard deviations; the largest of all channels, and the root mean square.
    - ``var_ratio_low``, ``var_ratio_high``: the batch's variance over the running variance before
      it, both with ``eps`` added and both unbiased; the smallest and the largest of all channels.
    - ``mean_drift``, ``var_drift``: change of the running mean since the last record, in standard
      deviations, and factor (1 or more) of the running variance; the largest of all channels.
    - ``dead``: share of the channels whose output is constant, for one of three reasons:
      ``dead_constant``, a variance below ``eps / 100``; ``dead_weight``, a weight of at most 1e-4;
      ``dead_relu``, bias + 3 |weight| not above zero, so that a ReLU, *if one follows*, returns
      zero for all but about one value in a thousand.
    - ``weight_low``, ``weight_high``, and the same of ``bias``, ``batch_mean``, ``batch_var``,
      ``running_mean``, ``running_var``: ranges over the channels.

    The batch's moments are not computed again: if w is the weight of the new batches in the running
    statistics r, they are :math:`r + (r' - r) / w`. Of several batches that is their average as the
    momentum weights them. Its rounding error is the relative step of the buffers' dtype times r /
    w: seven digits become six in float32 with a momentum of 0.1, and one or none in bfloat16. Only
    layers whose buffers do not determine it (frozen, without statistics or counter, or layers that
    only look like batch norm) get a hook; it computes the moments of the input on recorded steps,
    while gradients are enabled. Under ``torch.compile`` such a hook is traced again in every step
    until torch gives up and runs the layer eagerly, and ``fullgraph=True`` raises: there, watch
    layers that are not frozen.

    Costs some small operations a layer and two transfers a device on a recorded step, and nothing
    on others: 1 to 2 % of a step of ResNet-18 on a CPU. A layer with a hook costs one more pass
    over its input, and the first of them one more transfer: with all 20 layers frozen about 4 % of
    such a step. Any thread may call the layers; one of them ends the steps. A layer that is rebuilt
    (``convert_sync_batchnorm``) is watched under the same name. Exports, fake tensors and calls on
    the meta device are not recorded.

    Args:
        model: Any module. Its mode may change; a layer that is frozen later gets its hook at the
            next record.
        layers: The layers to watch; None for all.
        every: Number of steps from one record to the next.
        keep: Number of the last recorded steps that stay in `Watch.records`; None keeps all. A
            record is about 2 kB, so 20 layers fill 40 MB with the 1000 of the default, and would
            fill 4 GB in 100 000 steps.

    Returns:
        A handle; ``remove()`` or the end of a ``with`` block removes the hooks.

    Raises:
        TypeError: ``model`` is not a module, or ``layers`` is one string.
        ValueError: ``every`` or ``keep`` is less than one, a name fits no layer, or a layer is
            lazy.

    Warns:
        RuntimeWarning: There is no batch norm layer to watch.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from batchnorm import watch
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        >>> with watch(model) as watched:
        ...     for _ in range(3):
        ...         y = model(torch.randn(8, 4))
        ...         watched.step()
        >>> [(record["step"], record["layer"], record["batches"]) for record in watched.records]
        [(1, '1', 1), (2, '1', 1), (3, '1', 1)]
    """
    if every < 1:
        raise ValueError(f"watch: every must be at least 1, got {every}.")
    if keep is not None and keep < 1:
        raise ValueError(f"watch: keep must be at least 1, or None for all, got {keep}.")
    return Watch(batch_norms(model, layers, caller="watch"), every, keep)


class Watch(Printed, Handle):
    """The records of `watch`; ``str()`` of it is a table of the latest, the worst layer first.

    Args:
        layers: By name.
        every: Number of steps from one record to the next.
        keep: Number of the last recorded steps that stay; None for all.

    Attributes:
        records: One dict for each layer and recorded step, the oldest first.
        steps: Number of steps so far.
    """

    tool = "watch"

    def __init__(self, layers: Mapping[str, nn.Module], every: int, keep: int | None) -> None:
        super().__init__(self._end)
        self.records: list[Record] = []
        self.steps = 0
        self._layers = dict(layers)
        self._channel_dims: dict[str, int] = {}
        self._every = every
        self._keep = keep
        self._seen: dict[str, Moments] = {}
        self._hooks: dict[str, Handle] = {}
        self._is_removed = False
        self._before = states(self._layers, {})
        self._listen()
        add_follower(self._layers.values(), self)

    def follow(self, old: nn.Module, new: nn.Module) -> None:
        """Watches a layer that was rebuilt from a watched one, in the place of it."""
        for name, layer in self._layers.items():
            if layer is old:
                self._layers[name] = new
                if name in self._hooks:
                    self._hooks.pop(name).remove()
        self._listen()

    def step(self) -> None:
        """Ends a step; records it if it is due.

        Raises:
            RuntimeError: The watch was removed.
        """
        if self._is_removed:
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
        """Ends a step, as a callback whose arguments are ignored."""
        self.step()

    def __str__(self) -> str:
        return table(self.records)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON, with None for NaN and infinity, which JSON does not have."""
        records = for_json(self.records)
        return {"steps": self.steps, "every": self._every, "records": records}

    def figure(self) -> Any:
        """Draws the records by step: shift of the mean, ratio of the variance, dead channels.

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
        """Hooks the layers whose buffers do not determine the batch, and no others."""
        for name, layer in self._layers.items():
            needs_hook = not determines_batch(layer)
            if needs_hook and name not in self._hooks:
                is_torchs = isinstance(layer, _BatchNorm)
                self._channel_dims[name] = 1 if is_torchs else probe(layer).channel_dim
                self._hooks[name] = listen({name: layer}, self._record_input, caller="watch")
            elif not needs_hook and name in self._hooks:
                self._hooks.pop(name).remove()

    def _record_input(self, name: str, x: torch.Tensor) -> None:
        """Adds the moments of a layer's input, if the step is going to be recorded."""
        if (self.steps + 1) % self._every or not torch.is_grad_enabled():
            return
        mean = next(iter(statistics_of(self._layers[name]).values()), None)
        channel_dim = self._channel_dims[name]
        if x.dim() < 2 or (mean is not None and x.shape[channel_dim] != mean.numel()):
            return
        moments = functional.moments(x.detach().movedim(channel_dim, 1))
        # Another thread may put moments here, or take them away, between any two of these calls.
        while self._seen.setdefault(name, moments) is not moments:
            others = self._seen.pop(name, None)
            moments = moments if others is None else merge_moments(others, moments)

    def _end(self) -> None:
        self._is_removed = True
        remove_follower(self)
        for name in list(self._hooks):
            self._hooks.pop(name).remove()
