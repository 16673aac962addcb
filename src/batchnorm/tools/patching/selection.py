"""The batch norm layers of a model, all of them or those that are named."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import is_lazy

from batchnorm.tools.patching.names import (
    by_unwrapped_name,
    without_private_parts,
    without_wrappers,
)
from batchnorm.tools.patching.statistics import is_batch_norm, obstacle_to_likeness

LayerSelection = Iterable[str] | Callable[[str, nn.Module], bool] | None
"""Names of layers, names of blocks that hold layers, or patterns (``layer4.*``), with or without
the parts that wrappers add (``_orig_mod.``, ``module.``); a function of a layer's name and the
layer; or None for all."""

FROZEN_MARK = "_batchnorm_frozen"
"""Attribute that `batchnorm.freeze` sets on a layer."""
ACCELERATED_MARK = "_batchnorm_accelerated"
"""Attribute that `batchnorm.accelerate` sets on a layer or a block, beside its forward."""
_BETWEEN = ("batchnorm.", "torch.utils.", "torch.nn.", "jaxtyping", "beartype")
"""Modules between a tool's warning and the user's code: ``torch.no_grad`` wraps some tools, and
modules call hooks."""
_SHOWN = 5
"""Names of layers in a message; more would bury what it says."""


def batch_norms(
    model: nn.Module, layers: LayerSelection = None, *, caller: str
) -> dict[str, nn.Module]:
    """Finds the batch norm layers of a model, each object once.

    They are torch's, ours, and those that look like batch norm (`statistics.is_batch_norm`). To
    find none is no success: a RuntimeWarning says so, and names what is passed over.

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
    found = {name: m for name, m in model.named_modules() if is_batch_norm(m)}
    selected = _select(found, layers, caller)
    for name, layer in selected.items():
        if any(is_lazy(tensor) for tensor in (*layer.parameters(), *layer.buffers())):
            raise ValueError(
                f"{caller}: layer {name!r} ({type(layer).__name__}) is lazy and has no shape yet; "
                "call the model once before."
            )
    pass_over(model, unlike(model, layers), caller=caller)
    if not selected:
        of = "has no batch norm layers" if not found else f"has {_listed(found)}; layers fits none"
        warn(f"{caller}: nothing is done, the model ({type(model).__name__}) {of}.")
    return selected


def unlike(model: nn.Module, layers: LayerSelection = None) -> dict[str, str]:
    """Says why modules with a running mean or variance are no batch norm layers, by name.

    Args:
        model: Any module.
        layers: A selection; it has no such modules.
    """
    if layers is not None:
        return {}
    reasons = {name: obstacle_to_likeness(module) for name, module in model.named_modules()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def pass_over(
    model: nn.Module, reasons: Mapping[str, str], layers: LayerSelection = None, *, caller: str
) -> None:
    """Tells which layers a tool passes over, and why: by a warning, or by an error if selected.

    Args:
        model: The model.
        reasons: The reason by name of the layer.
        layers: What the user selected.
        caller: Name of the tool.

    Raises:
        ValueError: There are such layers among those that the user selected.
    """
    if not reasons:
        return
    modules = dict(model.named_modules())
    described = [
        f"layer {name!r} ({type(modules[name]).__name__}), because {reason}"
        for name, reason in reasons.items()
    ]
    more = len(described) - _SHOWN
    text = "; ".join(described[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
    if layers is not None:
        raise ValueError(f"{caller}: cannot take {text}; leave it out of layers.")
    warn(f"{caller}: passed over {text}.")


def warn(message: str) -> None:
    """Warns at the line of the user's code that called the tool."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(_BETWEEN):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=level)


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
    found = [module for module in model.modules() if is_batch_norm(module)]
    return bool(found) and all(map(has_frozen_mark, found))


def has_accelerated_mark(module: nn.Module) -> bool:
    """Tells if `batchnorm.accelerate` replaced this one module's forward, and nobody deleted it."""
    return ACCELERATED_MARK in vars(module) and "forward" in vars(module)


def has_frozen_mark(layer: nn.Module) -> bool:
    """Tells if this one layer is frozen, whatever layers it has inside."""
    return vars(layer).get(FROZEN_MARK, False)


def _select(
    found: dict[str, nn.Module], layers: LayerSelection, caller: str
) -> dict[str, nn.Module]:
    if layers is None:
        return found
    if callable(layers):
        return {name: layer for name, layer in found.items() if layers(name, layer)}
    if isinstance(layers, str):
        raise TypeError(
            f"{caller}: layers must be several names, got the string {layers!r}; "
            f"write layers=[{layers!r}]."
        )
    selected: dict[str, nn.Module] = {}
    for pattern in layers:
        fitting = _fitting(found, pattern)
        if not fitting:
            raise ValueError(
                f"{caller}: no batch norm layer fits {pattern!r}; the model has {_listed(found)}."
            )
        selected |= fitting
    return {name: layer for name, layer in found.items() if name in selected}


def _fitting(found: dict[str, nn.Module], pattern: str) -> dict[str, nn.Module]:
    """The layers that a pattern names, as it is written where that fits any.

    Only wrappers call a child ``_orig_mod``, so a pattern need not name these parts. A ``module``
    may be the model's own, so it is overlooked only if nothing fits otherwise.
    """
    for shorten, short in (
        (without_private_parts, pattern),
        (without_wrappers, without_wrappers(pattern)),
    ):
        fitting = {
            name: found[name]
            for each, name in by_unwrapped_name(found, shorten).items()
            if _fits(each, short) or _fits(name, short)
        }
        if fitting:
            return fitting
    return {}


def _fits(name: str, pattern: str) -> bool:
    return name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)


def _listed(found: dict[str, nn.Module]) -> str:
    if not found:
        return "no batch norm layers"
    names = [repr(name) for name in found]
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
