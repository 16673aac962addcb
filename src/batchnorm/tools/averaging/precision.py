"""Batch norm layers that stay in float32 when the model around them is made smaller.

In bfloat16 a running statistic has eight bits: a step of less than 1/512 of it is rounded away, and
with a small momentum it stops far from where it should go.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.tools.patching import Choice, batch_norms


def keep_statistics_in_float32(model: nn.Module, layers: Choice = None) -> None:
    """Batch norm layers keep float32 through ``.half()``, ``.bfloat16()`` and ``.to(dtype)``.

    Running statistics are what needs it; ``weight`` and ``bias`` stay too, because torch computes
    with half precision input only where all four have one dtype. Layers that are half already
    become float32. Wider dtypes are followed: ``.double()`` gives float64. The layers take and
    return half precision as before, at the same cost. Copies, also pickled ones, go on keeping it;
    ``state_dict`` has the same names, with float32 inside. ``load_state_dict(assign=True)`` takes
    the dtype of what is assigned. `let_statistics_follow` undoes it.

    Args:
        model: Changed in place; calling it again is harmless.
        layers: Which layers.

    Raises:
        TypeError: ``model`` is not a module, or ``layers`` is one string.
        ValueError: A name fits no layer, or a layer is lazy.
    """
    for layer in batch_norms(model, layers, caller="keep_statistics_in_float32").values():
        if not isinstance(vars(layer).get("_apply"), _Keeping):
            layer.__dict__["_apply"] = _Keeping(layer)
        layer._apply(_identity)


def let_statistics_follow(model: nn.Module, layers: Choice = None) -> None:
    """Undoes `keep_statistics_in_float32`: from now on the layers follow the model's dtype.

    Dtypes stay what they are until the model is cast again.

    Args:
        model: Nothing happens to layers that do not keep float32.
        layers: Which layers.

    Raises:
        TypeError: ``model`` is not a module, or ``layers`` is one string.
        ValueError: A name fits no layer, or a layer is lazy.
    """
    for layer in batch_norms(model, layers, caller="let_statistics_follow").values():
        if isinstance(vars(layer).get("_apply"), _Keeping):
            del layer.__dict__["_apply"]


class _Keeping:
    """Stands before a layer's ``_apply``, through which every cast and move of a module goes."""

    def __init__(self, layer: _BatchNorm) -> None:
        self._layer = layer

    def __call__(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if recurse:
            for child in self._layer.children():
                child._apply(fn)

        def kept(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            wide = torch.promote_types(changed.dtype, torch.float32)
            if not changed.is_floating_point() or changed.dtype == wide:
                return changed
            return tensor.to(changed.device, torch.float32)

        plain: Any = type(self._layer)._apply
        return plain(self._layer, kept, recurse=False)


def _identity(tensor: Tensor) -> Tensor:
    return tensor
