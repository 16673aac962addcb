"""Replaces one layer by ours: the same object gets another class.

Nothing is copied, so parameters, buffers, hooks, flags, aliases and the references of an optimizer
stay what they are, and going back is exact.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from batchnorm.nn.functional import Activation
from batchnorm.nn.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.tools.flow.tracing import change_class
from batchnorm.torch_internals import has_hooks

Sum = Literal["y + r", "r + y", "y += r"]
_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
_MARK = "_class_before_accelerate"
_REPLACED_FORWARD = "its forward was replaced on this object"


def replace(layer: _BatchNorm) -> str | None:
    """Gives one of torch's layers our class.

    Returns:
        None, or the reason why the layer is left as it is.
    """
    kind = type(layer)
    if "forward" in vars(layer):
        return _REPLACED_FORWARD
    if kind in _OURS:
        layer.__dict__[_MARK] = kind
        change_class(layer, _OURS[kind])
        return None
    if isinstance(layer, LazyModuleMixin):
        return "it is lazy and has not seen an input yet"
    if isinstance(layer, nn.SyncBatchNorm):
        return "it is a SyncBatchNorm, which takes its statistics over all processes"
    if not isinstance(layer, nn.BatchNorm2d) or set(layer._modules) != {"drop", "act"}:
        return f"it is a {kind.__name__}, a class of its own"
    if not _is_act_of_drop(layer):
        return f"it is a {kind.__name__}, and does not compute act(drop(batch_norm(x)))"
    change_class(layer, _class_with_activation(kind))
    return None


def restore_class(module: nn.Module) -> bool:
    """Gives a module the class that it had before; False if it was never changed."""
    original = type(module).__dict__.get(_MARK) or module.__dict__.pop(_MARK, None)
    if original is not None:
        change_class(module, original)
    return original is not None


def obstacle_to_skipping(module: nn.Module) -> str | None:
    """Returns why a module must be called itself (hooks, a replaced forward), or None."""
    if has_hooks(module):
        return "it has hooks"
    return _REPLACED_FORWARD if "forward" in vars(module) else None


def with_relu(layer: nn.Module, x: Tensor) -> Tensor:
    """Computes ``relu(layer(x))`` in one pass, by the forward of the class."""
    view = _view(layer)
    return type(view).forward(view, x)


def with_residual(layer: nn.Module, x: Tensor, residual: Any, sum_: Sum) -> Tensor:
    """Computes ``relu`` of the sum of ``y = layer(x)`` and the residual ``r``.

    It takes one pass if both have one shape, layout and dtype; otherwise the operations run exactly
    as they were written.
    """
    fits = (
        isinstance(residual, Tensor)
        and residual.shape == x.shape
        and residual.dtype == x.dtype
        and residual.device == x.device
        and residual.stride() == x.stride()
    )
    if fits:
        return _view(layer).forward(x, residual)
    y = layer(x)
    if sum_ == "y += r":
        return F.relu(y.add_(residual))
    return F.relu(y + residual if sum_ == "y + r" else residual + y)


class _ReLU:
    """View of a layer: it shares the layer's state, and has a ReLU.

    A view lives for one call, so a call that is not fused never sees the ReLU.
    """

    @property
    def activation(self) -> Activation:
        return "relu"


_VIEWS: dict[type, Any] = {kind: type("View", (_ReLU, kind), {}) for kind in _OURS.values()}


def _view(layer: nn.Module) -> Any:
    kind = _VIEWS.get(type(layer))
    if kind is None:
        kind = next(view for kind, view in _VIEWS.items() if isinstance(layer, kind))
    view = kind.__new__(kind)
    view.__dict__ = layer.__dict__
    return view


def subclass_named_like(
    original: type[nn.Module], bases: Iterable[type], namespace: dict[str, Any]
) -> type[nn.Module]:
    """Makes a subclass with the name of ``original``, to which `restore_class` returns."""
    names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    body = {**names, **namespace, _MARK: original}
    return types.new_class(
        original.__name__, (*bases, original), exec_body=lambda ns: ns.update(body)
    )


class WithActivation:
    """timm's ``BatchNormAct2d``: ``act(drop(batch_norm(x)))``, with ours inside."""

    _class_before_accelerate: ClassVar[type[nn.Module]]
    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """Computes ``act(drop(batch_norm(input)))``, in one pass if that is a ReLU."""
        if self.fuses():
            return with_relu(self, input)  # pyright: ignore[reportArgumentType]
        normalized = super().forward(input)  # pyright: ignore[reportAttributeAccessIssue]
        return self.act(self.drop(normalized))

    def fuses(self) -> bool:
        """Tells if nothing but a ReLU comes after the normalization."""
        return (
            type(self.drop) is nn.Identity
            and type(self.act) is nn.ReLU
            and obstacle_to_skipping(self.drop) is None
            and obstacle_to_skipping(self.act) is None
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new_with_activation, (self._class_before_accelerate,), self.__dict__


@functools.cache
def _class_with_activation(original: type[nn.Module]) -> type[nn.Module]:
    return subclass_named_like(original, (WithActivation, BatchNorm2d), {})


def _new_with_activation(original: type[nn.Module]) -> nn.Module:
    kind = _class_with_activation(original)
    return kind.__new__(kind)


class _PlusOne(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class _Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


def _is_act_of_drop(layer: nn.BatchNorm2d) -> bool:
    """Runs the layer's class on numbers, with known functions for ``drop`` and ``act``."""
    for training in (True, False):
        expected = _torch_layer_like(layer).train(training)
        probe = type(layer).__new__(type(layer))
        probe.__dict__.update({**layer.__dict__, **_torch_layer_like(layer).__dict__})
        probe.__dict__.pop("train", None)
        probe._modules = {"drop": _PlusOne(), "act": _Squared()}
        probe.train(training)
        x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1)).double()
        try:
            y = probe(x)
        except Exception:
            return False
        same = torch.allclose(y, (expected(x) + 1) ** 2, rtol=1e-9)
        buffers = zip(probe.buffers(), expected.buffers(), strict=True)
        if not same or not all(torch.allclose(a, b, rtol=1e-9) for a, b in buffers):
            return False
    return True


def _torch_layer_like(layer: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """Makes torch's layer with the options of ``layer``, three channels and random numbers."""
    probe = nn.BatchNorm2d(
        3,
        eps=layer.eps,
        momentum=layer.momentum,
        affine=layer.affine,
        track_running_stats=layer.track_running_stats,
        dtype=torch.float64,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*probe.parameters(), *probe.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(3, generator=generator) + 0.5)
    return probe
