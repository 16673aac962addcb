"""``keep_statistics_in_float32``: batch norm layers that stay in float32 in a smaller model.

In bfloat16 a running statistic has eight bits: a step of less than 1/512 of it is rounded away, and
with a small momentum it stops far from where it should go. Until the handle is removed the layers
refuse smaller dtypes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.tools.patching import (
    Handle,
    InheritedMethod,
    LayerSelection,
    batch_norms,
    pass_over,
    probe,
)


def keep_statistics_in_float32(model: nn.Module, layers: LayerSelection = None) -> Handle:
    """Keeps batch norm layers in float32 through ``.half()``, ``.bfloat16()`` and ``.to(dtype)``.

    Only running statistics need it; ``weight`` and ``bias`` stay too, because torch computes with
    half precision input only where all four have one dtype. Layers that are half already become
    float32. Wider dtypes are followed: ``.double()`` gives float64. The layers take and return
    half precision as before, at the same cost. ``state_dict`` has the same names, with float32
    inside. ``load_state_dict(assign=True)`` takes the dtype of what is assigned.

    Copies and pickles of the model, and layers that are rebuilt (``convert_sync_batchnorm``), keep
    float32 too. Layers that only look like batch norm are kept if they return half precision beside
    float32 statistics, which a copy of the layer is tried for. Call this again on one of them, or
    on the model itself, for a handle that ends it there. It is a switch: the first handle that is
    removed ends it, however often it was called.

    Args:
        model: Changed in place; calling this again is harmless.
        layers: The layers to keep; None for all.

    Returns:
        A handle. After its ``remove()``, or the end of its ``with`` block, the layers follow the
        model's dtype; they stay in float32 until the model is cast again.

    Raises:
        TypeError: ``model`` is not a module, or ``layers`` is one string.
        ValueError: A name fits no layer, or a layer is lazy. After every error the model is as it
            was.

    Warns:
        RuntimeWarning: No layer was found, or one that looks like batch norm is passed over.

    Example:
        >>> from torch import nn
        >>> from batchnorm import keep_statistics_in_float32
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        >>> handle = keep_statistics_in_float32(model)
        >>> model = model.bfloat16()
        >>> model[0].weight.dtype, model[1].running_mean.dtype
        (torch.bfloat16, torch.float32)
    """
    tool = _Float32Cast.tool
    found = batch_norms(model, layers, caller=tool)
    tried = {n: probe(m).keeps_dtype for n, m in found.items() if not isinstance(m, _BatchNorm)}
    left = {name: reason for name, reason in tried.items() if reason is not None}
    pass_over(model, left, layers, caller=tool)
    chosen = [layer for name, layer in found.items() if name not in left]
    before = _Tensors(chosen)
    casts, new = [], []
    try:
        for layer in chosen:
            cast = _Float32Cast.find(layer)
            if cast is None:
                cast = _Float32Cast(layer)
                new.append(cast)
                cast.install()
            casts.append(cast)
            layer._apply(_identity)
    except BaseException:
        Handle(before.restore, *(cast.end for cast in new)).remove()
        raise
    return Handle(*(cast.end for cast in casts))


class _Float32Cast(InheritedMethod):
    """Replaces ``_apply``, through which every cast and every move of a module goes."""

    method = "_apply"
    tool = "keep_statistics_in_float32"

    def call(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Casts the layer to float32 at least, and modules inside it as asked."""
        if recurse:
            for child in self.module.children():
                child._apply(fn)

        def cast(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            wide = torch.promote_types(changed.dtype, torch.float32)
            if not changed.is_floating_point() or changed.dtype == wide:
                return changed
            return tensor.to(changed.device, torch.float32)

        return self.original(cast, recurse=False)


class _Tensors:
    """The tensors of layers, to be given back after a cast that failed halfway.

    Args:
        layers: The layers.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        parts = [part for layer in layers for part in layer.modules()]
        places: list[dict[str, Any]] = [
            place for part in parts for place in (part._parameters, part._buffers)
        ]
        self._places = [
            (place, name, tensor, tensor.data, _grad_of(tensor))
            for place in places
            for name, tensor in place.items()
            if tensor is not None
        ]

    def restore(self) -> None:
        """Gives back the same objects with the same memory, values and gradients."""
        for place, name, tensor, data, grad in self._places:
            place[name] = tensor
            tensor.data = data
            if grad is not None:
                kept, values = grad
                kept.data = values
                tensor.grad = kept


def _grad_of(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    grad = tensor.grad if tensor.is_leaf else None
    return None if grad is None else (grad, grad.data)


def _identity(tensor: Tensor) -> Tensor:
    return tensor
