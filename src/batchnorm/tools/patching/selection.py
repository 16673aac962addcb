"""The batch norm layers of a model, all of them or those that are named."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

Choice = Iterable[str] | Callable[[str, _BatchNorm], bool] | None
"""Names of layers, names of blocks that hold layers, or patterns (``layer4.*``); a function of a
layer's name and the layer; or None for all."""

_SHOWN = 5


def batch_norms(model: nn.Module, layers: Choice = None, *, caller: str) -> dict[str, _BatchNorm]:
    """The batch norm layers of a model by dotted name, torch's and ours, each object once.

    Args:
        model: Any module; it may be a batch norm layer itself, whose name is then ``""``.
        layers: Which of them.
        caller: Name of the tool, for its messages.

    Raises:
        TypeError: ``model`` is not a module, or ``layers`` is one string.
        ValueError: A name or a pattern fits no layer, or a layer is lazy and has no shape yet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be a torch.nn.Module, got {type(model).__name__}.")
    found = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    chosen = _chosen(found, layers, caller)
    for name, layer in chosen.items():
        if any(is_lazy(tensor) for tensor in (*layer.parameters(), *layer.buffers())):
            raise ValueError(
                f"{caller}: layer {name!r} ({type(layer).__name__}) is lazy and has no shape yet; "
                "call the model once before."
            )
    return chosen


def keeps_statistics(layer: _BatchNorm) -> bool:
    """Whether the layer has running statistics at all."""
    return layer.running_mean is not None and layer.running_var is not None


def is_held(layer: nn.Module) -> bool:
    """Whether `freeze` holds the layer, so that no tool may move its statistics."""
    return bool(vars(layer).get("_batchnorm_frozen", False))


def _chosen(found: dict[str, _BatchNorm], layers: Choice, caller: str) -> dict[str, _BatchNorm]:
    if layers is None:
        return found
    if callable(layers):
        return {name: layer for name, layer in found.items() if layers(name, layer)}
    if isinstance(layers, str):
        raise TypeError(
            f"{caller}: layers must be several names, got the string {layers!r}; "
            f"write layers=[{layers!r}]."
        )
    chosen: dict[str, _BatchNorm] = {}
    for pattern in layers:
        fitting = {name: layer for name, layer in found.items() if _fits(name, pattern)}
        if not fitting:
            raise ValueError(
                f"{caller}: no batch norm layer fits {pattern!r}; the model has {_listed(found)}."
            )
        chosen |= fitting
    return {name: layer for name, layer in found.items() if name in chosen}


def _fits(name: str, pattern: str) -> bool:
    return name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)


def _listed(found: dict[str, _BatchNorm]) -> str:
    if not found:
        return "no batch norm layers"
    names = [repr(name) for name in found]
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
