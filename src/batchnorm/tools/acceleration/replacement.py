"""One layer replaced by ours: the same object with another class.

Nothing is copied, so parameters, buffers, hooks, flags, aliases and whatever an optimizer holds
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

Sum = Literal["y + r", "r + y", "y += r"]
_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
_MARK = "_class_before_accelerate"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_REPLACED_FORWARD = "its forward was replaced on this object"


def replace(layer: _BatchNorm) -> str | None:
    """Gives one of torch's layers our class.

    Returns:
        None, or why the layer is left as it is.
    """
    kind = type(layer)
    if "forward" in vars(layer):
        return _REPLACED_FORWARD
    if kind in _OURS:
        layer.__dict__[_MARK] = kind
        set_class(layer, _OURS[kind])
        return None
    if isinstance(layer, LazyModuleMixin):
        return "it is lazy and has not seen an input yet"
    if isinstance(layer, nn.SyncBatchNorm):
        return "it is a SyncBatchNorm, which takes its statistics over all processes"
    if not isinstance(layer, nn.BatchNorm2d) or set(layer._modules) != {"drop", "act"}:
        return f"it is a {kind.__name__}, a class of its own"
    if not _is_act_of_drop(layer):
        return f"it is a {kind.__name__}, and does not compute act(drop(batch_norm(x)))"
    set_class(layer, _class_with_activation(kind))
    return None


def put_back(module: nn.Module) -> bool:
    """Gives a module the class that it had; says whether it had another one."""
    plain = type(module).__dict__.get("_plain") or module.__dict__.pop(_MARK, None)
    if plain is not None:
        set_class(module, plain)
    return plain is not None


def set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Changes the class of an object, whatever its ``__setattr__`` does."""
    object.__setattr__(module, "__class__", kind)


def obstacle_of(module: nn.Module) -> str | None:
    """Why a module must be called as it is: somebody listens, or its forward is not its class's."""
    if any(getattr(module, hooks) for hooks in _HOOKS):
        return "it has hooks"
    return _REPLACED_FORWARD if "forward" in vars(module) else None


def with_relu(layer: nn.Module, x: Tensor) -> Tensor:
    """``relu(layer(x))`` in one pass, by the forward of the class."""
    view: Any = _view(layer)
    return type(view).forward(view, x)


def with_residual(layer: nn.Module, x: Tensor, residual: Any, sum_: Sum) -> Tensor:
    """``relu`` of the sum of ``y = layer(x)`` and the residual ``r``.

    In one pass if both have one shape, layout and dtype; otherwise exactly as it was written.
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
    """A view of a layer: the very same state, and a ReLU.

    A view lives for one call, so a call that is not fused never sees the ReLU.
    """

    @property
    def activation(self) -> Activation:
        return "relu"


class _View1d(_ReLU, BatchNorm1d):  # pyright: ignore[reportIncompatibleVariableOverride]
    pass


class _View2d(_ReLU, BatchNorm2d):  # pyright: ignore[reportIncompatibleVariableOverride]
    pass


class _View3d(_ReLU, BatchNorm3d):  # pyright: ignore[reportIncompatibleVariableOverride]
    pass


def _view(layer: nn.Module) -> BatchNorm1d | BatchNorm2d | BatchNorm3d:
    if isinstance(layer, BatchNorm2d):
        view = _View2d.__new__(_View2d)
    elif isinstance(layer, BatchNorm1d):
        view = _View1d.__new__(_View1d)
    else:
        view = _View3d.__new__(_View3d)
    view.__dict__ = layer.__dict__
    return view


def derived(
    plain: type[nn.Module], bases: Iterable[type], namespace: dict[str, Any]
) -> type[nn.Module]:
    """A subclass of ``plain`` with its name, which `put_back` knows."""
    names = {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
    body = {**names, **namespace, "_plain": plain}
    return types.new_class(plain.__name__, (*bases, plain), exec_body=lambda ns: ns.update(body))


class WithActivation:
    """timm's ``BatchNormAct2d``: ``act(drop(batch_norm(x)))``, with ours inside."""

    _plain: ClassVar[type[nn.Module]]
    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """``act(drop(batch_norm(input)))``, in one pass if that is a ReLU."""
        if self.fuses():
            return with_relu(self, input)  # pyright: ignore[reportArgumentType]
        normalized = super().forward(input)  # pyright: ignore[reportAttributeAccessIssue]
        return self.act(self.drop(normalized))

    def fuses(self) -> bool:
        """Whether nothing but a ReLU comes after the normalization."""
        return (
            type(self.drop) is nn.Identity
            and type(self.act) is nn.ReLU
            and obstacle_of(self.drop) is None
            and obstacle_of(self.act) is None
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new_with_activation, (self._plain,), self.__dict__


@functools.cache
def _class_with_activation(plain: type[nn.Module]) -> type[nn.Module]:
    return derived(plain, (WithActivation, BatchNorm2d), {})


def _new_with_activation(plain: type[nn.Module]) -> nn.Module:
    kind = _class_with_activation(plain)
    return kind.__new__(kind)


class _PlusOne(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class _Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


def _is_act_of_drop(layer: nn.BatchNorm2d) -> bool:
    """Tries the layer's class on numbers, with known functions for ``drop`` and ``act``."""
    for training in (True, False):
        expected = _plain_probe(layer).train(training)
        probe = type(layer).__new__(type(layer))
        probe.__dict__.update({**layer.__dict__, **_plain_probe(layer).__dict__})
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


def _plain_probe(layer: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """Torch's layer with the options of ``layer``, three channels and telling numbers."""
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
