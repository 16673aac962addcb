"""A warning to converters that would drop a fused activation.

A layer with an activation is a ``torch.nn.BatchNorm2d`` for everybody else. Converters (to
``SyncBatchNorm``, to a frozen layer, into the convolution before it) read its ``weight``,
``running_var`` and ``eps``, build something of their own, and the ReLU is gone. ``eps`` is the
attribute that they all need and that hardly anybody else reads.
"""

from __future__ import annotations

import sys
import warnings
from types import FrameType
from typing import Any, no_type_check

import torch
from torch import nn

# They read every attribute there is, and convert nothing or keep the activation.
_HARMLESS = ("batchnorm.", "inspect.", "torch.jit.", "torch._jit_internal.")


class Eps:
    """The attribute ``eps`` of a layer, stored in the layer's ``__dict__`` as ever.

    To read it from a layer with an activation warns, unless this library reads it.
    """

    @no_type_check  # A run-time check would stand between the reader and this function.
    def __get__(self, layer: nn.Module | None, owner: type | None = None) -> Any:
        """The value; the descriptor itself if the class is asked."""
        if layer is None:
            return self
        if "eps" not in layer.__dict__:
            raise AttributeError(f"{type(layer).__name__!r} object has no attribute 'eps'")
        if layer.activation is not None and not torch.compiler.is_dynamo_compiling():
            _warn(layer, sys._getframe(1))
        return layer.__dict__["eps"]

    def __set__(self, layer: nn.Module, value: float) -> None:
        """Sets the value."""
        layer.__dict__["eps"] = value

    def __delete__(self, layer: nn.Module) -> None:
        """Deletes the value."""
        if layer.__dict__.pop("eps", None) is None:
            raise AttributeError(f"{type(layer).__name__!r} object has no attribute 'eps'")


@no_type_check  # as above
def _warn(layer: nn.Module, reader: FrameType) -> None:
    name = f"{reader.f_globals.get('__name__')}.{reader.f_code.co_qualname}"
    if name.startswith(_HARMLESS):
        return
    warnings.warn(
        f"{name} reads eps of a {type(layer).__name__} with "
        f"activation={layer.activation!r}, as converters do that know no activation: their result "
        "lacks it. Call batchnorm.to_torch(model) first, which makes the activation a module of "
        "its own.",
        UserWarning,
        stacklevel=3,
    )
