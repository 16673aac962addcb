"""Replaces the forward of one layer by ours; the object, its class and its attributes stay.

Torch's layer stays exactly torch's layer for every library that asks for its class. A copy or a
pickle carries the replaced forward.
"""

from __future__ import annotations

from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from batchnorm.nn.functional import Activation
from batchnorm.nn.layers import LAYERS, forward_of
from batchnorm.tools.patching import ACCELERATED_MARK, ReplacedMethod, is_replaced_by_others
from batchnorm.torch_internals import has_hooks

Sum = Literal["y + r", "r + y", "y += r"]
REPLACED_FORWARD = "its forward was replaced on this object"
_COPYING_METHODS = (
    *("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__deepcopy__", "__copy__"),
)
_CLASSES_MADE_BY_TORCH = ("torch.nn.utils.parametrize", "torch.distributed.")


class AcceleratedForward(ReplacedMethod):
    """A forward that `accelerate` gave to a layer or a block, until `restore`."""

    mark = ACCELERATED_MARK
    remedy = "call batchnorm.restore(model) first"


class LayerForward(AcceleratedForward):
    """The forward of one of torch's layers, computed by our kernels."""

    module: _BatchNorm

    def call(self, input: Tensor | fx.Proxy) -> Any:
        """Computes the layer's output; ``torch.fx`` records what the class computes."""
        if isinstance(input, fx.Proxy):
            return self.original(input)
        return self.compute(input)

    def compute(
        self, input: Tensor, residual: Tensor | None = None, activation: Activation = None
    ) -> Tensor:
        """Computes the layer's output, for a fused block with what comes after it."""
        return forward_of(self.module, input, residual, activation)

    def fuses(self) -> bool:
        """Tells if the layer computes a ReLU that belongs to it."""
        return False


class LayerWithActivationForward(LayerForward):
    """The forward of timm's ``BatchNormAct2d``: ``act(drop(batch_norm(x)))``."""

    def call(self, input: Tensor | fx.Proxy) -> Any:
        """Computes the layer's output, in one pass if ``act`` is a ReLU and ``drop`` nothing."""
        if isinstance(input, fx.Proxy):
            return self.original(input)
        if self.fuses():
            return self.compute(input, None, "relu")
        layer: Any = self.module
        return layer.act(layer.drop(self.compute(input)))

    def fuses(self) -> bool:
        """Tells if nothing but a ReLU comes after the normalization."""
        layer: Any = self.module
        return (
            type(layer.drop) is nn.Identity
            and type(layer.act) is nn.ReLU
            and obstacle_to_skipping(layer.drop) is None
            and obstacle_to_skipping(layer.act) is None
        )


def replace(layer: _BatchNorm) -> str | None:
    """Replaces the forward of one of torch's layers.

    Returns:
        None, or the reason why the layer is left as it is.
    """
    kind = type(layer)
    if is_replaced_by_others(layer):
        return REPLACED_FORWARD
    if isinstance(layer, LazyModuleMixin):
        return "it is lazy and has not seen an input yet"
    if isinstance(layer, nn.SyncBatchNorm):
        return "it is a SyncBatchNorm, which takes its statistics over all processes"
    method = own_copying_method(layer)
    if method is not None:
        return f"it is a {kind.__name__}, which has a {method} of its own"
    if kind.forward is _BatchNorm.forward:
        LayerForward(layer).install_behind()
        return None
    if not isinstance(layer, nn.BatchNorm2d) or set(layer._modules) != {"drop", "act"}:
        return f"it is a {kind.__name__}, which has a forward of its own"
    if not _is_act_of_drop(layer):
        return f"it is a {kind.__name__}, and does not compute act(drop(batch_norm(x)))"
    LayerWithActivationForward(layer).install_behind()
    return None


def own_copying_method(module: nn.Module) -> str | None:
    """Returns the method by which the module's class copies itself other than torch's modules do.

    Such a copy may share the replaced forward, which would then run on the original's tensors.
    """
    for name in _COPYING_METHODS:
        home = next((kind for kind in type(module).__mro__ if name in vars(kind)), object)
        is_torchs = home.__module__.startswith(_CLASSES_MADE_BY_TORCH)
        if home not in (nn.Module, object) and not is_torchs:
            return name
    return None


def obstacle_to_skipping(module: nn.Module) -> str | None:
    """Returns why a module must be called itself (hooks, a replaced forward), or None."""
    if has_hooks(module):
        return "it has hooks"
    _ = module.forward  # Compiled code notices from now on if somebody replaces it.
    forward = vars(module).get("forward")
    return REPLACED_FORWARD if forward is not None and not _is_ours(forward) else None


def can_fuse(layer: nn.Module) -> bool:
    """Tells if the layer is one of ours, or computes like one, without an activation."""
    if type(layer) in LAYERS:
        return layer.activation is None
    if type(layer).__call__ is not nn.Module.__call__:
        return False
    return _is_ours(vars(layer).get("forward")) or _is_ours(LayerForward.find(layer))


def with_relu(layer: nn.Module, x: Tensor) -> Tensor:
    """Computes ``relu(layer(x))`` in one pass."""
    return _compute(layer, x, None)


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
        return _compute(layer, x, residual)
    y = layer(x)
    if sum_ == "y += r":
        return F.relu(y.add_(residual))
    return F.relu(y + residual if sum_ == "y + r" else residual + y)


def _compute(layer: Any, x: Tensor, residual: Tensor | None) -> Tensor:
    if type(layer) in LAYERS:
        return forward_of(layer, x, residual, "relu")
    return layer.forward.compute(x, residual, "relu")


def _is_ours(forward: object) -> TypeGuard[LayerForward]:
    return type(forward) is LayerForward


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
