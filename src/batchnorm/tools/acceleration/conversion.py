"""``to_torch``: torch's own layers in the place of ours."""

from __future__ import annotations

import warnings

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

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
    its hooks see the output before the ReLU. Torch's layers take no ``residual``.

    Args:
        model: Any module, also a layer; one that holds nothing of ours stays as it is.

    Returns:
        The model; if it is itself a layer with ``activation="relu"``, the new ``Sequential``.

    Raises:
        TypeError: A layer is of a subclass of ours; nothing is converted.
        RuntimeError: Foreign code replaced the ``forward`` of a layer; nothing is converted.

    Example:
        >>> import torch, batchnorm
        >>> model = nn.Sequential(nn.Linear(4, 4), batchnorm.BatchNorm1d(4, activation="relu"))
        >>> batchnorm.to_torch(model) is model
        True
        >>> type(model[1]), type(model[1][0]).__module__
        (<class 'torch.nn.modules.container.Sequential'>, 'torch.nn.modules.batchnorm')
    """
    found = {n: m for n, m in model.named_modules() if isinstance(m, ours._BatchNorm)}
    for name, layer in found.items():
        _check(name, layer)
    restore(model)
    with_relu = {id(layer): _converted(name, layer) for name, layer in found.items()}
    for module in list(model.modules()):
        for name, child in module._modules.items():
            module._modules[name] = with_relu.get(id(child), child)
    return with_relu.get(id(model), model)


def _check(name: str, layer: _BatchNorm) -> None:
    if type(layer) not in _TORCHS:
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


def _converted(name: str, layer: _BatchNorm) -> nn.Module:
    """Changes the class of a layer, and returns what computes the same as the layer did."""
    activation = vars(layer).pop("activation", None)
    vars(layer).pop("__module__", None)
    change_class(layer, _TORCHS[type(layer)])
    if activation is None:
        return layer
    if has_output_hooks(layer):
        warnings.warn(
            f"to_torch: the hooks of {displayed(name)} see its output before the ReLU from now on, "
            "because the ReLU is a module of its own; register them on the Sequential around it if "
            "they need the output after it.",
            stacklevel=3,
        )
    both = nn.Sequential(layer, nn.ReLU())
    for module in (both, both[1]):
        module.training = layer.training
    return both
