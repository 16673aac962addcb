"""Replaces the forward of one layer by ours; the object, its class and its attributes stay.

Torch's layer stays exactly torch's layer for every library that asks for its class. A copy or a
pickle carries the replaced forward.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from batchnorm.nn.functional import Activation
from batchnorm.nn.layers import LAYERS, computed_by_torch, forward_of
from batchnorm.nn.route import obstacle_to_speed
from batchnorm.tools.patching import ACCELERATED_MARK, ReplacedMethod, is_replaced_by_others
from batchnorm.torch_internals import has_hooks, is_traced, is_transformed

Sum = Literal["y + r", "r + y", "y += r"]
REPLACED_FORWARD = "its forward was replaced on this object"
_COPYING_METHODS = (
    *("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__deepcopy__", "__copy__"),
)
_CLASSES_MADE_BY_TORCH = ("torch.nn.utils.parametrize", "torch.distributed.")


class Smallest(NamedTuple):
    """Numbers of values from which on our kernels compute an input; torch's compute smaller ones.

    Attributes:
        training: For training, with what is fused or without.
        fused: For evaluation, where a ReLU or an addition is fused.
        alone: For evaluation, where nothing is.
    """

    training: float
    fused: float
    alone: float


USUAL = Smallest(training=2.0**19, fused=2.0**20, alone=math.inf)
"""A call through Python takes 50 to 200 us more than torch's, and one pass as long as torch's.

Our kernels win by taking fewer passes: in training, and where something is fused. These are the
sizes from which on they won for each layout and dtype, with one thread and with two.
"""
_ON_CPU = torch.empty(0, device="cpu")
EVERYWHERE = Smallest(0.0, 0.0, 0.0)
NOWHERE = Smallest(math.inf, math.inf, math.inf)


class AcceleratedForward(ReplacedMethod):
    """A forward that `accelerate` gave to a layer or a block, until `restore`."""

    mark = ACCELERATED_MARK
    remedy = "call batchnorm.restore(model) first"


class LayerForward(AcceleratedForward):
    """The forward of one of torch's layers: by our kernels where they are faster.

    Attributes:
        smallest: What they compute.
    """

    module: _BatchNorm
    smallest: Smallest = USUAL

    def call(self, input: Any) -> Any:
        """Computes the layer's output; programs for others hold what the class computes."""
        if is_written_down(input):
            return self.original(input)
        if self.takes(input, self.smallest.alone):
            return forward_of(self.module, input)
        return self.by_torch(input)

    def compute(self, input: Tensor, residual: Tensor | None, activation: Activation) -> Tensor:
        """Computes the layer's output, for a fused block with what comes after it."""
        if self.takes(input, self.smallest.fused):
            return forward_of(self.module, input, residual, activation)
        y = self.by_torch(input)
        if residual is not None:  # vmap may map the residual alone.
            y = y + residual if is_transformed() else y.add_(residual)
        return y if activation is None else F.relu_(y)

    def by_torch(self, input: Tensor) -> Tensor:
        """Computes the layer's output by torch's kernels."""
        y = None if torch.compiler.is_compiling() else computed_by_torch(self.module, input)
        return self.original(input) if y is None else y

    def takes(self, input: Tensor, in_evaluation: float) -> bool:
        """Tells if our kernels compute an input.

        Compiled code does not ask for the size: it has no Python between the kernels, and would be
        compiled anew for each bound. In evaluation torch computes the transforms of ``torch.func``
        too, for which ours need the formula; in training its layer refuses most of them.

        Args:
            input: The layer's input.
            in_evaluation: Number of values from which on they do in evaluation.
        """
        training = self.module.training
        least = self.smallest.training if training else in_evaluation
        if torch.compiler.is_compiling():
            return least < math.inf and obstacle_to_speed(input) is None
        if input.numel() < least or obstacle_to_speed(input) is not None:
            return False
        return training or least == 0 or not is_transformed()

    @classmethod
    def smallest_of(cls, layer: nn.Module) -> Smallest:
        """Returns a layer's bounds: none for one that was built as ours."""
        forward = cls.find(layer)
        return EVERYWHERE if forward is None else forward.smallest

    def fuses(self) -> bool:
        """Tells if the layer computes a ReLU that belongs to it."""
        return False


class LayerWithActivationForward(LayerForward):
    """The forward of timm's ``BatchNormAct2d``: ``act(drop(batch_norm(x)))``."""

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Computes the layer's output, in one pass if ``act`` is a ReLU and ``drop`` nothing."""
        if kwargs or len(args) != 1 or is_written_down(*args):
            return self.original(*args, **kwargs)
        input = args[0]
        if self.takes(input, self.smallest.fused) and self.fuses():
            return forward_of(self.module, input, None, "relu")
        if self.takes(input, self.smallest.alone):
            return self._acted(forward_of(self.module, input))
        if input.dim() == 4 and not torch.compiler.is_compiling():
            y = computed_by_torch(self.module, input)
            if y is not None:
                return self._acted(y)
        return self.original(input)

    def _acted(self, y: Tensor) -> Tensor:
        layer: Any = self.module
        return layer.act(layer.drop(y))

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


def obstacle_to_kernels(layer: _BatchNorm) -> str | None:
    """Returns why no fast kernels compute tensors of the layer's device and dtype, or None."""
    held = next((t for t in (layer.weight, layer.running_mean) if t is not None), _ON_CPU)
    return obstacle_to_speed(torch.empty(0, dtype=held.dtype, device=held.device))


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


def is_written_down(argument: Any) -> bool:
    """Tells if a call becomes part of a program for others: an export, or a trace by jit or fx."""
    return torch.compiler.is_exporting() or is_traced() or isinstance(argument, fx.Proxy)


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
