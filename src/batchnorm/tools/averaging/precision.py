"""``keep_statistics_in_float32``: batch norm layers that stay in float32 in a smaller model.

In bfloat16 a running statistic has eight bits: a step of less than 1/512 of it is rounded away, and
with a small momentum it stops far from where it should go. Until the handle is removed the layers
refuse smaller dtypes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from batchnorm.tools.patching import Handle, LayerSelection, ReplacedMethod, batch_norms


def keep_statistics_in_float32(model: nn.Module, layers: LayerSelection = None) -> Handle:
    """Keeps batch norm layers in float32 through ``.half()``, ``.bfloat16()`` and ``.to(dtype)``.

    Only running statistics need it; ``weight`` and ``bias`` stay too, because torch computes with
    half precision input only where all four have one dtype. Layers that are half already become
    float32. Wider dtypes are followed: ``.double()`` gives float64. The layers take and return
    half precision as before, at the same cost. ``state_dict`` has the same names, with float32
    inside. ``load_state_dict(assign=True)`` takes the dtype of what is assigned.

    Copies and pickles of the model keep float32 too. Call this again on one of them, or on the
    model itself, for a handle that ends it there. It is a switch: the first handle that is removed
    ends it, however often it was called.

    Args:
        model: Changed in place; calling this again is harmless.
        layers: The layers to keep; None for all.

    Returns:
        A handle. After its ``remove()``, or the end of its ``with`` block, the layers follow the
        model's dtype; they stay in float32 until the model is cast again.

    Raises:
        TypeError: ``model`` is not a module, or ``layers`` is one string.
        ValueError: A name fits no layer, or a layer is lazy.

    Example:
        >>> from torch import nn
        >>> from batchnorm import keep_statistics_in_float32
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        >>> handle = keep_statistics_in_float32(model)
        >>> model = model.bfloat16()
        >>> model[0].weight.dtype, model[1].running_mean.dtype
        (torch.bfloat16, torch.float32)
    """
    chosen = batch_norms(model, layers, caller="keep_statistics_in_float32").values()
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
        Handle(*(cast.uninstall for cast in new)).remove()
        raise
    return Handle(*(cast.uninstall for cast in casts))


class _Float32Cast(ReplacedMethod):
    """Replaces ``_apply``, through which every cast and every move of a module goes."""

    method = "_apply"

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


def _identity(tensor: Tensor) -> Tensor:
    return tensor
