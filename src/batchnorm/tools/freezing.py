"""``freeze``: batch norm layers that stay in evaluation, whatever calls ``model.train()``.

``eval()`` stops the statistics of a layer until somebody calls ``train()``, and ``requires_grad``
never does. A frozen layer answers ``train()`` itself: it notes the mode that was asked for, and
keeps its own. Nothing else of the layer changes, so `unfreeze` gives back exactly what was there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.tools.patching.selection import Choice, batch_norms, is_held, keeps_statistics


@dataclass(frozen=True)
class Freezing:
    """What `freeze` holds; ``str()`` of it is a sentence.

    Attributes:
        layers: Dotted names of the layers.
        affine: Whether their weight and bias are held too.
    """

    layers: tuple[str, ...]
    affine: bool

    def __str__(self) -> str:
        what = "statistics, weight and bias" if self.affine else "statistics only"
        return f"Froze {_count(self.layers)}: {what}."


@dataclass(frozen=True)
class Unfreezing:
    """What `unfreeze` let go; ``str()`` of it is a sentence.

    Attributes:
        layers: Dotted names of the layers that were frozen until now.
    """

    layers: tuple[str, ...]

    def __str__(self) -> str:
        if not self.layers:
            return "Nothing to unfreeze: no batch norm layer is frozen."
        return f"Unfroze {_count(self.layers)}."


def freeze(model: nn.Module, layers: Choice = None, *, affine: bool = True) -> Freezing:
    """Keeps batch norm layers in evaluation: ``y = (x - running_mean) / sqrt(running_var + eps)``.

    ``model.train()`` no longer reaches them. Class, momentum, hooks, parameters and the keys of
    ``state_dict`` stay as they are; copies and pickles of the model stay frozen. (A shallow copy by
    ``copy.copy`` shares the layer's attributes, ``train`` among them: its ``train()`` returns the
    layer that was frozen.) It costs nothing a call, and an accelerated model stays fused. Freezing
    twice is freezing once, and the last ``affine`` counts. With ``affine=True`` freeze before
    wrapping in ``DistributedDataParallel``, which asks once for the parameters that get gradients.

    Args:
        model: Any module.
        layers: Which of its batch norm layers; None for all.
        affine: Whether weight and bias stop too. ``requires_grad`` is then False and ``grad`` None,
            because an optimizer goes on moving a parameter that has a gradient, be it zero.

    Returns:
        What is frozen now.

    Raises:
        TypeError: ``model`` is not a module, or ``layers`` is one string.
        ValueError: A layer keeps no running statistics, so evaluation would use the batch as well;
            or a name fits no layer, or a layer is lazy.
        RuntimeError: Somebody replaced the ``train`` of a frozen layer. After every error all is as
            it was.
    """
    chosen = batch_norms(model, layers, caller="freeze")
    for name, layer in chosen.items():
        if not keeps_statistics(layer):
            raise ValueError(
                f"freeze: layer {name!r} ({type(layer).__name__}) keeps no running statistics, so "
                "in evaluation it normalizes by the batch too; leave it out of layers, or build it "
                "with track_running_stats=True."
            )
    _check_train({name: layer for name, layer in chosen.items() if is_held(layer)}, "freeze")
    for layer in chosen.values():
        kept = vars(layer)["train"] if is_held(layer) else _Kept(layer)
        kept.hold()
        if affine:
            kept.hold_parameters()
        else:
            kept.let_parameters_go()
    return Freezing(tuple(chosen), affine)


def unfreeze(model: nn.Module, layers: Choice = None) -> Unfreezing:
    """Undoes `freeze`, also on a copy.

    The layers get the mode that was last asked of them while they were frozen, and weight and bias
    their ``requires_grad`` from before, unless somebody set it meanwhile.

    Args:
        model: Any module; layers that are not frozen stay as they are.
        layers: Which of its batch norm layers; None for all.

    Returns:
        Which layers were let go.

    Raises:
        TypeError: ``model`` is not a module, or ``layers`` is one string.
        ValueError: A name fits no layer, or a layer is lazy.
        RuntimeError: Somebody replaced the ``train`` of a frozen layer. All stay frozen then.
    """
    chosen = batch_norms(model, layers, caller="unfreeze")
    frozen = {name: layer for name, layer in chosen.items() if is_held(layer)}
    _check_train(frozen, "unfreeze")
    for layer in frozen.values():
        vars(layer)["train"].let_go(layer)
    return Unfreezing(tuple(frozen))


def is_frozen(model: nn.Module) -> bool:
    """Whether all batch norm layers of a model, or the layer itself, are frozen.

    Args:
        model: Any module; False if it has no batch norm layer.
    """
    found = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return bool(found) and all(is_held(layer) for layer in found)


class _Kept:
    """Stands for ``layer.train``, and knows what the layer was before."""

    def __init__(self, layer: _BatchNorm) -> None:
        self.layer = layer
        self.behind: Any = vars(layer).get("train")
        self.training = layer.training
        self.requires_grad: dict[str, bool] = {}

    def __call__(self, mode: bool = True) -> _BatchNorm:
        """Notes the mode; only what is inside the layer, such as a dropout, takes it."""
        layer = self.layer
        if self.behind is None:
            type(layer).train(layer, mode)
        else:
            self.behind(mode)
        self.training, layer.training = mode, False
        return layer

    def hold(self) -> None:
        vars(self.layer).update(train=self, training=False, _batchnorm_frozen=True)

    def let_go(self, layer: _BatchNorm) -> None:
        """``layer`` may be a shallow copy of the one that was frozen."""
        attributes = vars(layer)
        del attributes["train"], attributes["_batchnorm_frozen"]
        if self.behind is not None:
            attributes["train"] = self.behind
        attributes["training"] = self.training
        self.let_parameters_go()

    def hold_parameters(self) -> None:
        for name, parameter in self.layer.named_parameters(recurse=False):
            self.requires_grad.setdefault(name, parameter.requires_grad)
            parameter.requires_grad_(False)
            parameter.grad = None

    def let_parameters_go(self) -> None:
        for name, parameter in self.layer.named_parameters(recurse=False):
            if self.requires_grad.pop(name, False):
                parameter.requires_grad_()


def _check_train(frozen: dict[str, _BatchNorm], caller: str) -> None:
    for name, layer in frozen.items():
        if not isinstance(vars(layer).get("train"), _Kept):
            raise RuntimeError(
                f"{caller}: layer {name!r} ({type(layer).__name__}) is frozen, but its train() was "
                "replaced since then; undo that first."
            )


def _count(layers: tuple[str, ...]) -> str:
    return f"{len(layers)} batch norm layer" + ("" if len(layers) == 1 else "s")
