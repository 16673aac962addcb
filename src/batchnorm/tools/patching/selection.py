"""The batch norm layers of a model, all of them or those that are named."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

LayerSelection = Iterable[str] | Callable[[str, _BatchNorm], bool] | None
"""Names of layers, names of blocks that hold layers, or patterns (``layer4.*``); a function of a
layer's name and the layer; or None for all."""

FROZEN_MARK = "_batchnorm_frozen"
"""Attribute that `batchnorm.freeze` sets on a layer."""
ACCELERATED_MARK = "_batchnorm_accelerated"
"""Attribute that `batchnorm.accelerate` sets on a layer or a block, beside its forward."""
_SHOWN = 5
"""Names of layers in a message; more would bury what it says."""


def batch_norms(
    model: nn.Module, layers: LayerSelection = None, *, caller: str
) -> dict[str, _BatchNorm]:
    """Finds the batch norm layers of a model, torch's and ours, each object once.

    Args:
        model: Any module; it may be a batch norm layer itself, whose name is then ``""``.
        layers: The layers to select.
        caller: Name of the tool, for its messages.

    Returns:
        The layers by dotted name, in the order of the model.

    Raises:
        TypeError: ``model`` is not a module, or ``layers`` is one string.
        ValueError: A name or a pattern fits no layer, or a layer is lazy and has no shape yet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be a torch.nn.Module, got {type(model).__name__}.")
    found = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    selected = _select(found, layers, caller)
    for name, layer in selected.items():
        if any(is_lazy(tensor) for tensor in (*layer.parameters(), *layer.buffers())):
            raise ValueError(
                f"{caller}: layer {name!r} ({type(layer).__name__}) is lazy and has no shape yet; "
                "call the model once before."
            )
    return selected


def has_running_statistics(layer: _BatchNorm) -> bool:
    """Tells if the layer has running statistics at all."""
    return layer.running_mean is not None and layer.running_var is not None


def is_frozen(model: nn.Module) -> bool:
    """Tells if all batch norm layers of a model are frozen by `batchnorm.freeze`.

    Args:
        model: Any module, also a layer; False if it has no batch norm layer.

    Example:
        >>> import batchnorm
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        >>> batchnorm.is_frozen(model)
        False
        >>> _ = batchnorm.freeze(model)
        >>> batchnorm.is_frozen(model)
        True
    """
    found = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return bool(found) and all(map(has_frozen_mark, found))


def has_accelerated_mark(module: nn.Module) -> bool:
    """Tells if `batchnorm.accelerate` replaced this one module's forward, and nobody deleted it."""
    return ACCELERATED_MARK in vars(module) and "forward" in vars(module)


def has_frozen_mark(layer: nn.Module) -> bool:
    """Tells if this one layer is frozen, whatever layers it has inside."""
    return vars(layer).get(FROZEN_MARK, False)


def _select(
    found: dict[str, _BatchNorm], layers: LayerSelection, caller: str
) -> dict[str, _BatchNorm]:
    if layers is None:
        return found
    if callable(layers):
        return {name: layer for name, layer in found.items() if layers(name, layer)}
    if isinstance(layers, str):
        raise TypeError(
            f"{caller}: layers must be several names, got the string {layers!r}; "
            f"write layers=[{layers!r}]."
        )
    selected: dict[str, _BatchNorm] = {}
    for pattern in layers:
        fitting = {name: layer for name, layer in found.items() if _fits(name, pattern)}
        if not fitting:
            raise ValueError(
                f"{caller}: no batch norm layer fits {pattern!r}; the model has {_listed(found)}."
            )
        selected |= fitting
    return {name: layer for name, layer in found.items() if name in selected}


def _fits(name: str, pattern: str) -> bool:
    return name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)


def _listed(found: dict[str, _BatchNorm]) -> str:
    if not found:
        return "no batch norm layers"
    names = [repr(name) for name in found]
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
