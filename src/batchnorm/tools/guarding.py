"""Running statistics that one bad batch cannot poison, and the repair of those that are poisoned.

A value that is inf or NaN makes the statistics of its channel NaN, and no later batch makes them
finite again. ``GradScaler`` skips the optimizer's step for such a batch, not the statistics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.tools.patching.handle import Handle
from batchnorm.tools.patching.methods import ReplacedMethod
from batchnorm.tools.patching.recomputation import is_repeated
from batchnorm.tools.patching.selection import Choice, batch_norms, keeps_statistics

_STATISTICS = ("running_mean", "running_var")
_INITIAL = {"running_mean": 0.0, "running_var": 1.0}


class Guard(Handle):
    """What `guard` does, until `remove`; ``str()`` of it says what was kept out."""

    def __init__(self, layers: Mapping[str, _BatchNorm]) -> None:
        self._guarded = {name: _Guarded(layer) for name, layer in layers.items()}
        for guarded in self._guarded.values():
            guarded.install()
        super().__init__(*(guarded.uninstall for guarded in self._guarded.values()))

    @property
    def skipped(self) -> dict[str, int]:
        """How many batches each layer kept out, by dotted name; layers that kept out none are not.

        Reading it waits for the device.
        """
        counts = {name: int(guarded.skipped) for name, guarded in self._guarded.items()}
        return {name: count for name, count in counts.items() if count}

    def __str__(self) -> str:
        layers = _count(len(self._guarded), "batch norm layer")
        skipped = self.skipped
        if not skipped:
            return f"Guarded {layers}: no batch had to be kept out."
        lines = [f"Guarded {layers}; batches kept out, as not finite:", "", "batches  layer"]
        for name, count in skipped.items():
            lines.append(f"{count:>7}  {name or 'the model itself'}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Poisoned:
    """One layer whose running statistics are of no use.

    Attributes:
        layer: Its dotted name.
        channels: How many channels it has.
        means: Of how many ``running_mean`` is not finite.
        vars: Of how many ``running_var`` is not finite or negative.
        poisoned: How many channels are concerned by either.
    """

    layer: str
    channels: int
    means: int
    vars: int
    poisoned: int


@dataclass(frozen=True)
class Repair:
    """What `reset_poisoned_statistics` found; ``str()`` of it is a table.

    Attributes:
        layers: The poisoned layers.
        checked: How many layers have running statistics.
        dry_run: Whether it was only looked at.
    """

    layers: tuple[Poisoned, ...]
    checked: int
    dry_run: bool

    def __str__(self) -> str:
        checked = _count(self.checked, "layer")
        if not self.layers:
            return f"Looked at the running statistics of {checked}: none is poisoned."
        lines = [f"Poisoned: {len(self.layers)} of {checked} with running statistics.", ""]
        lines.append(f"{'channels':>10}  {'bad mean':>8}  {'bad var':>8}  layer")
        for found in self.layers:
            share = f"{found.poisoned}/{found.channels}"
            name = found.layer or "the model itself"
            lines.append(f"{share:>10}  {found.means:>8}  {found.vars:>8}  {name}")
        if self.dry_run:
            lines += ["", "Nothing was changed (dry run)."]
        else:
            lines += ["", "These channels have mean 0 and variance 1 now, as if they were new."]
            lines += ["Recalibrate the model on training data before it is evaluated."]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"layers": [asdict(found) for found in self.layers]}


def guard(model: nn.Module, layers: Choice = None) -> Guard:
    """Keeps batches out of the running statistics that would make them inf or NaN.

    A layer that such a batch reaches gives the output that it always gave, so that ``GradScaler``
    and the loss still see it; its running statistics and counter stay what they were. So they do
    when a layer refuses a batch with an error, which torch counts. A channel that was not finite
    before does not count against a batch. A checkpoint's recomputation does not count again.

    Each layer decides for itself, and by its statistics only. In a step that ``GradScaler`` skips
    because something overflowed later, the layers before it, whose statistics are finite, move all
    the same. For all or nothing put the step into a `transaction`, with or without a guard::

        with transaction(model) as step:
            scaler.scale(loss(model(x), y)).backward()
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            if scaler.get_scale() < before:
                step.rollback()

    Costs about twenty small operations on tensors of one number a channel for each layer, some 80
    microseconds on a CPU and 300 to launch them on a GPU, and never waits for the device: what is
    kept out is decided and counted there. An accelerated block calls its layers one by one
    meanwhile. Copies of the model stay guarded, with counts of their own. Threads may call
    different layers; two that call one layer at once may lose each other's update. Not for
    ``DataParallel``, which copies the layers at each call.

    Args:
        model: Any module.
        layers: Which of its batch norm layers; those without running statistics need no guard.

    Returns:
        A handle: ``skipped`` counts, ``remove()`` ends it, and so does a ``with`` statement.

    Raises:
        TypeError: ``model`` is not a module, or ``layers`` is one string.
        ValueError: A layer is poisoned already; or a name fits no layer, or a layer is lazy.
    """
    chosen = {
        name: layer
        for name, layer in batch_norms(model, layers, caller="guard").items()
        if keeps_statistics(layer)
    }
    for name, layer in chosen.items():
        found = _described(name, _poisoned_channels(_kept(layer)))
        if found is not None:
            raise ValueError(
                f"guard: layer {name!r} ({type(layer).__name__}) is poisoned already, in "
                f"{found.poisoned} of {found.channels} channels; call "
                "reset_poisoned_statistics(model) first and recalibrate."
            )
    return Guard(chosen)


def reset_poisoned_statistics(
    model_or_state_dict: nn.Module | Mapping[str, Any], *, dry_run: bool = False
) -> Repair:
    """Names running statistics that are inf, NaN or negative, and makes those channels usable.

    Such channels get their initial statistics again, mean 0 and variance 1, in place; healthy
    channels, counters and all else stay bit for bit. That only stops the poison: the model must be
    recalibrated then.

    Args:
        model_or_state_dict: A module; or a mapping of names to tensors, in which every
            ``*.running_mean`` and ``*.running_var`` is looked at. The tensors of the mapping
            are changed, also where a model shares them.
        dry_run: Only look.

    Returns:
        What was found, and how many layers were looked at.

    Raises:
        TypeError: It is neither.
        ValueError: A mapping without running statistics that holds other mappings, so it is a
            checkpoint around a ``state_dict``; or a layer is lazy.
    """
    found, layers = [], _statistics(model_or_state_dict)
    for name, statistics in layers.items():
        bad = _poisoned_channels(statistics)
        poisoned = _described(name, bad)
        if poisoned is None:
            continue
        found.append(poisoned)
        if not dry_run:
            _heal(statistics, bad)
    return Repair(tuple(found), len(layers), dry_run)


class _Guarded(ReplacedMethod):
    """Puts back, on the device, what a bad batch did."""

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__(layer)
        device = next(layer.buffers(recurse=False)).device
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        layer = self.module
        if not (layer.training and layer.track_running_stats and keeps_statistics(layer)):
            return self.original(*args, **kwargs)
        buffers = {name: getattr(layer, name) for name in (*_STATISTICS, "num_batches_tracked")}
        before = {name: b.detach().clone() for name, b in buffers.items() if b is not None}
        try:
            output = self.original(*args, **kwargs)
        except BaseException:
            for name, kept in before.items():
                getattr(layer, name).data.copy_(kept)
            raise
        self._judge(before)
        return output

    @torch.no_grad()
    def _judge(self, before: dict[str, Tensor]) -> None:
        """Writes past autograd, as torch's own update does, so that backward still works."""
        layer = self.module
        was_finite = torch.stack([before[name].isfinite() for name in _STATISTICS])
        is_finite = torch.stack([getattr(layer, name).isfinite() for name in _STATISTICS])
        bad = (was_finite & ~is_finite).any()
        for name, kept in before.items():
            buffer = getattr(layer, name)
            buffer.data.copy_(torch.where(bad, kept, buffer))
        if is_repeated(layer):
            return
        if self.skipped.device != bad.device:
            self.skipped = self.skipped.to(bad.device)
        self.skipped += bad


def _statistics(source: nn.Module | Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """``running_mean`` and ``running_var``, those that are there, by the name of the layer."""
    if isinstance(source, nn.Module):
        layers = batch_norms(source, caller="reset_poisoned_statistics")
        return {n: _kept(layer) for n, layer in layers.items() if keeps_statistics(layer)}
    if not isinstance(source, Mapping):
        raise TypeError(
            "reset_poisoned_statistics: expects a torch.nn.Module or a state_dict, got "
            f"{type(source).__name__}; load a file by torch.load(path, weights_only=True)."
        )
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in source.items():
        layer, _, name = str(key).rpartition(".")
        if name in _STATISTICS and isinstance(value, Tensor):
            found.setdefault(layer, {})[name] = value
    inner = [repr(key) for key, value in source.items() if isinstance(value, Mapping)]
    if inner and not found:
        raise ValueError(
            "reset_poisoned_statistics: the mapping has no running statistics itself, but holds "
            "the mappings "
            f"{', '.join(inner)}; pass the state_dict among them."
        )
    return found


def _kept(layer: _BatchNorm) -> dict[str, Tensor]:
    return {name: getattr(layer, name) for name in _STATISTICS}


def _poisoned_channels(statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Which channels cannot have that mean, and which cannot have that variance."""
    bad = {name: ~tensor.isfinite() for name, tensor in statistics.items()}
    if "running_var" in bad:
        bad["running_var"] |= statistics["running_var"] < 0
    return bad


def _described(layer: str, bad: Mapping[str, Tensor]) -> Poisoned | None:
    """Waits for the device."""
    either = torch.stack(list(bad.values())).any(0)
    if not either.any():
        return None
    means, vars_ = (int(bad[name].sum()) if name in bad else 0 for name in _STATISTICS)
    return Poisoned(layer, either.numel(), means, vars_, int(either.sum()))


@torch.no_grad()
def _heal(statistics: Mapping[str, Tensor], bad: Mapping[str, Tensor]) -> None:
    either = torch.stack(list(bad.values())).any(0)
    for name, tensor in statistics.items():
        tensor.masked_fill_(either, _INITIAL[name])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
