"""Running statistics that one bad batch cannot poison, and the reset of those that are poisoned.

A value that is inf or NaN makes the statistics of its channel NaN, and no later batch makes them
finite again. ``GradScaler`` skips the optimizer's step for such a batch, not the statistics.
`guard` lasts until its handle is removed; `reset_poisoned_statistics` changes values, for good.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.tools.patching import (
    COUNTER,
    STATISTICS,
    Handle,
    InheritedMethod,
    LayerSelection,
    SavedBuffers,
    are_real,
    batch_norms,
    has_running_statistics,
    install_inherited,
    is_repeated,
    moves_statistics,
    statistics_of,
    warn,
)
from batchnorm.tools.wording import Printed, counted, displayed
from batchnorm.torch_internals import is_real

_INITIAL = {name: float(initial) for names in STATISTICS for initial, name in enumerate(names)}
"""Mean 0 and variance 1, by any name."""
_RESET = "reset_poisoned_statistics"


class Guard(Printed, Handle):
    """Layers that `guard` guards until `remove`; ``str()`` of it lists the skipped batches.

    Args:
        layers: The layers by name.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._guarded = {name: _Guarded(layer) for name, layer in layers.items()}
        super().__init__(install_inherited(self._guarded.values()).remove)

    @property
    def skipped(self) -> dict[str, int]:
        """Number of skipped batches by layer name; layers that skipped none are omitted.

        Synchronizes with the device.
        """
        counts = {
            name: sum(int(each.skipped) for each in guarded.with_heirs())
            for name, guarded in self._guarded.items()
        }
        return {name: count for name, count in counts.items() if count}

    def __str__(self) -> str:
        if not self._guarded:
            return "Nothing is guarded: no batch norm layer with running statistics is selected."
        layers = counted(len(self._guarded), "batch norm layer")
        skipped = self.skipped
        if not skipped:
            return f"Guarded {layers}: no batch had to be skipped."
        lines = [f"Guarded {layers}; skipped batches, as not finite:", "", "batches  layer"]
        lines += [f"{count:>7}  {displayed(name)}" for name, count in skipped.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class PoisonedLayer:
    """One layer whose running statistics are of no use.

    Attributes:
        layer: Its dotted name.
        channels: Number of its channels.
        means: Number of channels whose ``running_mean`` is not finite.
        vars: Number of channels whose ``running_var`` is not finite or negative.
        poisoned: Number of channels that have either.
    """

    layer: str
    channels: int
    means: int
    vars: int
    poisoned: int


@dataclass(frozen=True, repr=False)
class StatisticsReset(Printed):
    """The poison that `reset_poisoned_statistics` found; ``str()`` of it is a table.

    Attributes:
        layers: The poisoned layers.
        checked: Number of layers that have running statistics.
        dry_run: True if nothing was changed.
    """

    layers: tuple[PoisonedLayer, ...]
    checked: int
    dry_run: bool

    def __str__(self) -> str:
        checked = counted(self.checked, "layer")
        if not self.checked:
            return "Checked nothing: there are no running statistics."
        if not self.layers:
            return f"Checked the running statistics of {checked}: none is poisoned."
        lines = [f"Poisoned: {len(self.layers)} of {checked} with running statistics.", ""]
        lines.append(f"{'channels':>10}  {'bad mean':>8}  {'bad var':>8}  layer")
        for found in self.layers:
            share = f"{found.poisoned}/{found.channels}"
            name = displayed(found.layer)
            lines.append(f"{share:>10}  {found.means:>8}  {found.vars:>8}  {name}")
        if self.dry_run:
            lines += ["", "Nothing was changed (dry run)."]
        else:
            lines += ["", "These channels have mean 0 and variance 1 now, as if they were new."]
            lines += ["Recalibrate the model on training data before it is evaluated."]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return asdict(self) | {"layers": [asdict(found) for found in self.layers]}


def guard(model: nn.Module, layers: LayerSelection = None) -> Guard:
    """Keeps batches out of the running statistics that would make them inf or NaN.

    A layer that gets such a batch returns the same output as without a guard, so ``GradScaler`` and
    the loss still see it; its running statistics and counter stay what they were. They also stay
    when a layer refuses a batch with an error; torch's own layer would count that batch. Of a layer
    that looks like batch norm all buffers and tensor attributes stay; a counter that is a Python
    number cannot, because only the device knows which batch is bad: make it a buffer. A channel
    that was not finite before does not count against a batch. A checkpoint's recomputation does not
    count again.

    Each layer decides for itself, and by its statistics only. In a step that ``GradScaler`` skips
    because something overflowed later, the layers before it, whose statistics are finite, still
    move. For all or nothing put the step into a `transaction`, as shown there, with or without a
    guard.

    Costs about twenty small operations on tensors of one number a channel for each layer, some 80
    microseconds on a CPU and 300 to launch them on a GPU, and never waits for the device, which
    decides and counts by itself. An accelerated block calls its layers one by one. Copies of the
    model stay guarded, with counts of their own. Threads may call different layers; two that call
    one layer at once may lose each other's update. Not for ``DataParallel``, which copies the
    layers at each call. A layer that is rebuilt (``convert_sync_batchnorm``) stays guarded, and
    layers that look like batch norm are guarded, too. Exports and fake tensors pass unguarded.

    Args:
        model: Any module.
        layers: The layers to guard; None for all. Those without running statistics need no guard.

    Returns:
        A handle: ``skipped`` counts, and ``remove()`` or the end of a ``with`` block ends it.

    Raises:
        TypeError: ``model`` is not a module, or ``layers`` is one string.
        ValueError: A layer is poisoned already; or a name fits no layer, or a layer is lazy.

    Warns:
        RuntimeWarning: There is no layer to guard.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from batchnorm import guard
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        >>> with guard(model) as guarded:
        ...     y = model(torch.full((8, 4), torch.inf))
        >>> guarded.skipped
        {'1': 1}
        >>> bool(model[1].running_mean.isfinite().all())
        True
    """
    found = batch_norms(model, layers, caller="guard")
    chosen = {name: layer for name, layer in found.items() if has_running_statistics(layer)}
    if found and not chosen:
        warn("guard: nothing is guarded, no batch norm layer keeps running statistics.")
    _check_healthy(chosen)
    return Guard(chosen)


def _check_healthy(layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        statistics = statistics_of(layer)
        if not all(map(is_real, statistics.values())):  # On the meta device there are no values.
            continue
        found = _described(name, _poisoned_channels(statistics))
        if found is not None:
            raise ValueError(
                f"guard: layer {name!r} ({type(layer).__name__}) is poisoned already, in "
                f"{found.poisoned} of {found.channels} channels; call "
                "reset_poisoned_statistics(model) first and recalibrate."
            )


def reset_poisoned_statistics(
    model_or_state_dict: nn.Module | Mapping[str, Any], *, dry_run: bool = False
) -> StatisticsReset:
    """Finds running statistics that are inf, NaN or negative, and resets their channels.

    Such channels get their initial statistics again, mean 0 and variance 1, in place; healthy
    channels, counters and all else stay bit for bit. That only stops the poison: the model must be
    recalibrated then.

    Args:
        model_or_state_dict: A module; or a mapping of names to tensors, in which every
            ``*.running_mean`` and ``*.running_var``, or ``*.moving_mean`` and ``*.moving_var``, is
            checked. The tensors of the mapping are changed, also where a model shares them.
        dry_run: Finds them, and changes nothing.

    Returns:
        The poisoned layers, and the number of layers that were checked.

    Raises:
        TypeError: The argument is neither.
        ValueError: A mapping without running statistics that holds other mappings, so it is a
            checkpoint around a ``state_dict``; or a layer is lazy, on the meta device, or has a
            mean and a variance of different shapes.

    Warns:
        RuntimeWarning: There are no running statistics, so nothing was checked.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from batchnorm import reset_poisoned_statistics
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        >>> y = model(torch.full((8, 4), torch.inf))
        >>> found = reset_poisoned_statistics(model)
        >>> found.layers[0].layer, found.layers[0].poisoned
        ('1', 4)
        >>> model[1].running_mean
        tensor([0., 0., 0., 0.])
    """
    found, layers = [], _statistics(model_or_state_dict)
    for name, statistics in layers.items():
        _check_values(name, statistics)
    for name, statistics in layers.items():
        bad = _poisoned_channels(statistics)
        poisoned = _described(name, bad)
        if poisoned is None:
            continue
        found.append(poisoned)
        if not dry_run:
            _reset(statistics, bad)
    return StatisticsReset(tuple(found), len(layers), dry_run)


class _Guarded(InheritedMethod):
    """Restores, on the device, the statistics that a bad batch has moved."""

    tool = "guard"

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        tensors = (*statistics_of(layer).values(), *layer.buffers(), *layer.parameters())
        devices = [tensor.device for tensor in tensors if not tensor.is_meta]
        self.skipped = torch.zeros((), dtype=torch.int64, device=devices[0] if devices else "cpu")

    def call(self, *args: Any, **kwargs: Any) -> Any:
        layer = self.module
        if not (moves_statistics(layer) and are_real(args, kwargs)):
            return self.original(*args, **kwargs)
        before = SavedBuffers([layer], _restored(layer))
        was_finite = _finite_channels(layer)
        try:
            output = self.original(*args, **kwargs)
        except BaseException:
            before.restore()
            raise
        bad = (was_finite & ~_finite_channels(layer)).any()
        before.restore_where(bad)
        self._count(bad)
        return output

    def _count(self, bad: Tensor) -> None:
        if is_repeated(self.module):
            return
        if self.skipped.device != bad.device:
            self.skipped = self.skipped.to(bad.device)
        self.skipped += bad


def _restored(layer: nn.Module) -> tuple[str, ...] | None:
    """Names of the buffers to restore; None for all, of a layer that may count by another name."""
    return (*STATISTICS[0], COUNTER) if isinstance(layer, _BatchNorm) else None


def _finite_channels(layer: nn.Module) -> Tensor:
    return torch.stack([tensor.detach().isfinite() for tensor in statistics_of(layer).values()])


def _statistics(source: nn.Module | Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Finds running means and variances, where present, by the name of the layer."""
    if isinstance(source, nn.Module):
        layers = batch_norms(source, caller=_RESET)
        statistics = {name: statistics_of(layer) for name, layer in layers.items()}
        found = {name: tensors for name, tensors in statistics.items() if tensors}
        if layers and not found:
            warn(f"{_RESET}: nothing is checked, no batch norm layer keeps running statistics.")
        return found
    if not isinstance(source, Mapping):
        raise TypeError(
            "reset_poisoned_statistics: expects a torch.nn.Module or a state_dict, got "
            f"{type(source).__name__}; load a file by torch.load(path, weights_only=True)."
        )
    found = {}
    for key, value in source.items():
        layer, _, name = str(key).rpartition(".")
        if name in _INITIAL and isinstance(value, Tensor):
            found.setdefault(layer, {})[name] = value
    inner = [repr(key) for key, value in source.items() if isinstance(value, Mapping)]
    if inner and not found:
        raise ValueError(
            "reset_poisoned_statistics: the mapping has no running statistics itself, but holds "
            "the mappings "
            f"{', '.join(inner)}; pass the state_dict among them."
        )
    if not found:
        warn(f"{_RESET}: nothing is checked, the mapping has no running statistics.")
    return found


def _check_values(layer: str, statistics: Mapping[str, Tensor]) -> None:
    for name, tensor in statistics.items():
        if not is_real(tensor):
            raise ValueError(
                f"{_RESET}: {name} of layer {layer!r} is on the meta device or fake and has no "
                "values; load them first."
            )
    if len({tensor.shape for tensor in statistics.values()}) > 1:
        described = " and ".join(f"{n} of shape {tuple(t.shape)}" for n, t in statistics.items())
        raise ValueError(
            f"{_RESET}: the statistics of a layer must have one shape, and layer {layer!r} has "
            f"{described}; take it out of the mapping."
        )


def _poisoned_channels(statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Marks the channels whose mean, and those whose variance, is impossible."""
    bad = {name: ~tensor.isfinite() for name, tensor in statistics.items()}
    for name in bad:
        if _INITIAL[name]:  # A variance.
            bad[name] |= statistics[name] < 0
    return bad


def _described(layer: str, bad: Mapping[str, Tensor]) -> PoisonedLayer | None:
    """Counts the channels, which waits for the device; None if there is none."""
    either = torch.stack(list(bad.values())).any(0)
    if not either.any():
        return None
    means, vars_ = (
        sum(int(found.sum()) for name, found in bad.items() if _INITIAL[name] == initial)
        for initial in (0.0, 1.0)
    )
    return PoisonedLayer(layer, either.numel(), means, vars_, int(either.sum()))


@torch.no_grad()
def _reset(statistics: Mapping[str, Tensor], bad: Mapping[str, Tensor]) -> None:
    either = torch.stack(list(bad.values())).any(0)
    for name, tensor in statistics.items():
        tensor.masked_fill_(either, _INITIAL[name])
