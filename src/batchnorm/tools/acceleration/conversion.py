"""``to_torch``: torch's own layers in the place of ours."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from batchnorm.nn import layers as ours
from batchnorm.tools.acceleration.accelerating import restore
from batchnorm.tools.patching import change_class, is_replaced_by_others
from batchnorm.tools.wording import displayed
from batchnorm.torch_internals import has_output_hooks

_TORCHS: dict[type[nn.Module], type[nn.Module]] = {
    ours.BatchNorm1d: nn.BatchNorm1d,
    ours.BatchNorm2d: nn.BatchNorm2d,
    ours.BatchNorm3d: nn.BatchNorm3d,
    ours.LazyBatchNorm1d: nn.LazyBatchNorm1d,
    ours.LazyBatchNorm2d: nn.LazyBatchNorm2d,
    ours.LazyBatchNorm3d: nn.LazyBatchNorm3d,
}


def to_torch(model: nn.Module) -> nn.Module:
    """Turns every layer of ours into torch's, in place, for code that needs torch's own classes.

    It undoes `accelerate`, and layers that were built as ours become ``torch.nn.BatchNorm1d``,
    ``2d``, ``3d`` or their lazy forms. Each stays the same object with the same parameters,
    buffers, options, hooks and changes by tools such as `freeze`, and the same keys in
    ``state_dict``. A layer with ``activation="relu"`` becomes a ``torch.nn.Sequential`` of torch's
    layer and a ``torch.nn.ReLU``; the keys of layer ``bn`` are then ``bn.0.weight``, and so on, and
    its hooks see the output before the ReLU. Torch's layers take no ``residual``. Parametrizations
    stay.

    Args:
        model: Any module, also a layer; one that holds nothing of ours stays as it is.

    Returns:
        The model; if it is itself a layer with ``activation="relu"``, the new ``Sequential``.

    Raises:
        TypeError: A layer is of a subclass of ours; nothing is converted.
        RuntimeError: Foreign code replaced the ``forward`` of a layer, or a layer with an
            activation is also in an attribute that is no submodule; nothing is converted.

    Example:
        >>> import torch, batchnorm
        >>> model = nn.Sequential(nn.Linear(4, 4), batchnorm.BatchNorm1d(4, activation="relu"))
        >>> batchnorm.to_torch(model) is model
        True
        >>> type(model[1]), type(model[1][0]).__module__
        (<class 'torch.nn.modules.container.Sequential'>, 'torch.nn.modules.batchnorm')
    """
    found = {n: m for n, m in model.named_modules() if isinstance(m, ours._BatchNorm)}
    kinds = {name: _torchs_class(name, layer) for name, layer in found.items()}
    active = {id(m): n for n, m in found.items() if vars(m).get("activation") is not None}
    _check_references(model, active)
    hooked = [n for n in active.values() if has_output_hooks(found[n])]
    if hooked:
        warnings.warn(
            f"to_torch: the hooks of {', '.join(map(displayed, hooked))} see the output before the "
            "ReLU from now on, because the ReLU is a module of its own; register them on the "
            "Sequential around the layer if they need the output after it.",
            stacklevel=2,
        )
    restore(model)
    with_relu = {id(layer): _converted(layer, kinds[name]) for name, layer in found.items()}
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if id(child) in active:
                module._modules[name] = with_relu[id(child)]
    return with_relu.get(id(model), model)


def _torchs_class(name: str, layer: _BatchNorm) -> type[nn.Module]:
    """Returns torch's class for the class of a layer, with the same parametrizations."""
    kind, is_parametrized = type(layer), type(layer).__module__ == parametrize.__name__
    torchs = _TORCHS.get(kind.__bases__[0] if is_parametrized else kind)
    if torchs is None:
        raise TypeError(
            f"to_torch: {displayed(name)} is a {type(layer).__name__}, a subclass of a layer of "
            "batchnorm, and what it adds is unknown; replace it by a layer of torch's first. "
            "Nothing was converted."
        )
    if is_replaced_by_others(layer):
        raise RuntimeError(
            f"to_torch: the forward of {displayed(name)} ({type(layer).__name__}) was replaced by "
            "other code, which may call ours; undo that first. Nothing was converted."
        )
    if is_parametrized:
        return type(f"Parametrized{torchs.__name__}", (torchs,), dict(vars(kind)))
    return torchs


def _check_references(model: nn.Module, active: Mapping[int, str]) -> None:
    """Refuses a layer with an activation that is also reached past the names of submodules."""
    modules = dict(model.named_modules())
    for owner, module in modules.items():
        for attribute, value in vars(module).items():
            others = [] if attribute == "_modules" else list(_modules_in(value))
            hidden = [part for m in others if m not in modules.values() for part in m.modules()]
            names = [active[id(m)] for m in (*others, *hidden) if id(m) in active]
            if names:
                raise RuntimeError(
                    f"to_torch: {displayed(names[0])} has an activation, and the attribute "
                    f"{attribute!r} of {displayed(owner)} holds it, too, and would call it without "
                    "its ReLU; keep the layer as a submodule only. Nothing was converted."
                )


def _modules_in(value: Any) -> Iterator[nn.Module]:
    """Yields the modules in containers in containers."""
    rest, seen = [value], set()
    while rest:
        item = rest.pop()
        if isinstance(item, nn.Module):
            yield item
        elif isinstance(item, (list, tuple, set, frozenset, dict)) and id(item) not in seen:
            seen.add(id(item))
            rest += [*item, *item.values()] if isinstance(item, dict) else item


def _converted(layer: _BatchNorm, kind: type[nn.Module]) -> nn.Module:
    """Changes the class of a layer, and returns what computes the same as the layer did."""
    activation = vars(layer).pop("activation", None)
    vars(layer).pop("__module__", None)
    change_class(layer, kind)
    if activation is None:
        return layer
    both = nn.Sequential(layer, nn.ReLU())
    for module in (both, both[1]):
        module.training = layer.training
    return both
