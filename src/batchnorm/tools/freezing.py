"""``freeze``: batch norm layers that stay in evaluation, also when something calls ``train()``.

``eval()`` stops the statistics of a layer only until somebody calls ``train()``, and
``requires_grad`` does not stop them at all. A frozen layer answers ``train()`` itself: it notes the
mode that was asked for, and stays in evaluation. The change is part of the model and is saved with
it; `unfreeze` undoes it, also on a copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.tools.patching import (
    FROZEN_MARK,
    InheritedMethod,
    LayerSelection,
    batch_norms,
    has_frozen_mark,
    has_running_statistics,
    is_frozen,
    pass_over,
    probe,
    unlike,
)
from batchnorm.tools.wording import Printed, counted, passed_over

__all__ = ["Freezing", "Unfreezing", "freeze", "is_frozen", "unfreeze"]


@dataclass(frozen=True, repr=False)
class Freezing(Printed):
    """The layers that `freeze` froze; ``str()`` of it is a sentence.

    Attributes:
        layers: Dotted names of the layers.
        affine: True if their weight and bias are frozen too.
        left: Layers that look like batch norm and cannot be frozen: the reason by name.
    """

    layers: tuple[str, ...]
    affine: bool
    left: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        what = "statistics, weight and bias" if self.affine else "statistics only"
        froze = f"Froze {counted(len(self.layers), 'batch norm layer')}: {what}."
        if not self.layers:
            froze = "Nothing was frozen: no batch norm layer is selected that can be."
        return "\n".join([froze, *passed_over(self.left)])


@dataclass(frozen=True, repr=False)
class Unfreezing(Printed):
    """The layers that `unfreeze` released; ``str()`` of it is a sentence.

    Attributes:
        layers: Dotted names of the layers that were frozen until now.
    """

    layers: tuple[str, ...]

    def __str__(self) -> str:
        if not self.layers:
            return "Nothing to unfreeze: no batch norm layer is frozen."
        return f"Unfroze {counted(len(self.layers), 'batch norm layer')}."


def freeze(model: nn.Module, layers: LayerSelection = None, *, affine: bool = True) -> Freezing:
    """Freezes batch norm layers: ``y = (x - running_mean) / sqrt(running_var + eps)`` from now on.

    ``model.train()`` no longer reaches them. Class, momentum, hooks, parameters and the keys of
    ``state_dict`` stay as they are; copies and pickles of the model stay frozen. A shallow copy by
    ``copy.copy`` shares the layer's attributes, ``train`` among them, so its ``train()`` returns
    the layer that was frozen. A call costs nothing extra, and an accelerated model stays fused.
    Freezing again changes nothing but ``affine``. With ``affine=True`` freeze before wrapping in
    ``DistributedDataParallel``, which looks only once for the parameters that get gradients.

    A layer that is rebuilt stays frozen, as by ``nn.SyncBatchNorm.convert_sync_batchnorm``, also
    where a framework converts. Layers that only look like batch norm are frozen if their ``eval()``
    normalizes by the running statistics, which a copy of the layer is tried for.

    Args:
        model: Any module.
        layers: The layers to freeze; None for all.
        affine: Freezes weight and bias too: ``requires_grad`` is then False and ``grad`` None,
            because an optimizer keeps moving a parameter that has a gradient, even one of zeros.

    Returns:
        The frozen layers.

    Raises:
        TypeError: ``model`` is not a module, or ``layers`` is one string.
        ValueError: A layer has no running statistics, so evaluation would use the batch as well;
            or a name fits no layer, or a layer is lazy.
        RuntimeError: Foreign code replaced the ``train`` of a frozen layer. After every error the
            model is as it was.

    Warns:
        RuntimeWarning: No layer was found, or one that looks like batch norm is passed over.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from batchnorm import freeze, unfreeze
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        >>> print(freeze(model))
        Froze 1 batch norm layer: statistics, weight and bias.
        >>> y = model.train()(torch.randn(8, 4))
        >>> model[1].training, int(model[1].num_batches_tracked)
        (False, 0)
        >>> print(unfreeze(model))
        Unfroze 1 batch norm layer.
    """
    found = batch_norms(model, layers, caller="freeze")
    left = _not_freezable(found)
    pass_over(model, left, layers, caller="freeze")
    chosen = {name: layer for name, layer in found.items() if name not in left}
    for name, layer in chosen.items():
        if not has_running_statistics(layer):
            raise ValueError(
                f"freeze: layer {name!r} ({type(layer).__name__}) keeps no running statistics, so "
                "in evaluation it normalizes by the batch too; leave it out of layers, or build it "
                "with track_running_stats=True."
            )
    frozen = _frozen(chosen, "freeze")
    for name, layer in chosen.items():
        train = frozen.get(name)
        if train is None:
            train = _FrozenTrain(layer)
            train.install()
        layer.training = False
        if affine:
            train.freeze_parameters()
        else:
            train.unfreeze_parameters()
    return Freezing(tuple(chosen), affine, {**left, **unlike(model, layers)})


def unfreeze(model: nn.Module, layers: LayerSelection = None) -> Unfreezing:
    """Undoes `freeze`, also on a copy.

    The layers get the mode that was last asked of them while they were frozen, and weight and bias
    their ``requires_grad`` from before, unless somebody has set it since.

    Args:
        model: Any module; layers that are not frozen stay as they are.
        layers: The layers to unfreeze; None for all.

    Returns:
        The layers that were frozen until now.

    Raises:
        TypeError: ``model`` is not a module, or ``layers`` is one string.
        ValueError: A name fits no layer, or a layer is lazy.
        RuntimeError: Foreign code replaced the ``train`` of a frozen layer. All stay frozen then.

    Example:
        >>> from torch import nn
        >>> from batchnorm import freeze, unfreeze
        >>> model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
        >>> frozen = freeze(model)
        >>> unfreeze(model, ["1"]).layers
        ('1',)
    """
    chosen = batch_norms(model, layers, caller="unfreeze")
    frozen = _frozen(chosen, "unfreeze")
    for name, train in frozen.items():
        train.unfreeze(chosen[name])
    return Unfreezing(tuple(frozen))


class _FrozenTrain(InheritedMethod):
    """The ``train`` of a frozen layer. It knows what the layer was before.

    Args:
        layer: The layer.

    Attributes:
        training: The mode of an unfrozen layer: the last one that was asked for.
        requires_grad: Flags of the frozen parameters, from before, by name.
    """

    method = "train"
    tool = "freeze"

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.training = layer.training
        self.requires_grad: dict[str, bool] = {}

    def call(self, mode: bool = True) -> nn.Module:
        """Notes the mode; only modules inside the layer, such as a dropout, take it."""
        self.original(mode)
        self.training, self.module.training = mode, False
        return self.module

    def install(self) -> None:
        """Replaces ``train`` and marks the layer as frozen."""
        super().install()
        setattr(self.module, FROZEN_MARK, True)

    def give_to(self, layer: nn.Module) -> None:
        """Freezes a layer that was rebuilt from this one; each can then be unfrozen alone."""
        train = _FrozenTrain(layer)
        train.training = self.training
        train.requires_grad = dict(self.requires_grad)
        train.install()
        layer.training = False
        if self.requires_grad:
            train.freeze_parameters()

    def complete(self, heir: Any) -> None:
        """Freezes parameters that the converter made after it had shared the statistics."""
        if self.requires_grad:
            heir.freeze_parameters()

    def unfreeze(self, layer: nn.Module) -> None:
        """Gives ``layer``, which may be a shallow copy of the frozen one, its mode again."""
        self.uninstall(layer)
        delattr(layer, FROZEN_MARK)
        layer.training = self.training
        self.unfreeze_parameters()

    def freeze_parameters(self) -> None:
        """Stops gradients of weight and bias."""
        for name, parameter in _parameters(self.module):
            self.requires_grad.setdefault(name, parameter.requires_grad)
            parameter.requires_grad_(False)
            parameter.grad = None

    def unfreeze_parameters(self) -> None:
        """Gives weight and bias the flags from before."""
        for name, parameter in _parameters(self.module):
            if self.requires_grad.get(name, False):
                parameter.requires_grad_()
        self.requires_grad.clear()


def _parameters(layer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields the layer's own parameters; of parametrized ones the originals, by their name."""
    yield from layer.named_parameters(recurse=False)
    for name, module in (
        layer._modules.get("parametrizations") or nn.ModuleDict()
    ).named_children():
        for parameter in module.parameters():
            yield name, parameter


def _not_freezable(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Tries the layers that are not of torch's class: the reason by name where ``eval()`` fails."""
    tried = {
        name: probe(layer).evaluates
        for name, layer in layers.items()
        if not isinstance(layer, _BatchNorm) and not has_frozen_mark(layer)
    }
    return {name: reason for name, reason in tried.items() if reason is not None}


def _frozen(layers: dict[str, nn.Module], caller: str) -> dict[str, _FrozenTrain]:
    """Finds the replaced methods of those layers that are frozen.

    Raises:
        RuntimeError: Foreign code covers one.
    """
    found = {}
    for name, layer in layers.items():
        if not has_frozen_mark(layer):
            continue
        train = _FrozenTrain.find(layer)
        if train is None:
            raise RuntimeError(
                f"{caller}: layer {name!r} ({type(layer).__name__}) is frozen, but its train() was "
                "replaced since then; undo that first."
            )
        found[name] = train
    return found
