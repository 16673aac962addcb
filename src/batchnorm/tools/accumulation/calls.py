"""The calls of batch norm layers in one forward pass, each under statistics that are given.

A call is intercepted by hooks. For its duration the layer is in evaluation, where any kind of batch
norm layer, fused or not, normalizes by the statistics in its buffers; gradients reach the given
statistics through a weight and a bias that depend on them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.moments import Moments
from batchnorm.tools.surgery import input_of

_SWAPPED = ("weight", "bias", "running_mean", "running_var")


@dataclass
class Call:
    """One call of a layer, and the statistics of the large batch in it as independent variables.

    Attributes:
        name: The layer's.
        layer: Who is called.
        moments: Of the large batch.
        mean: The mean as a leaf of the graph.
        var: The variance as a leaf of the graph.
        grad_mean: Derivative of the loss by the mean; None until somebody depends on it.
        grad_var: Derivative of the loss by the variance.
    """

    name: str
    layer: _BatchNorm
    moments: Moments
    mean: Float[Tensor, " c"] = field(init=False)
    var: Float[Tensor, " c"] = field(init=False)
    grad_mean: Float[Tensor, " c"] | None = None
    grad_var: Float[Tensor, " c"] | None = None

    def __post_init__(self) -> None:
        self.mean = self.moments.mean.detach().requires_grad_()
        self.var = self.moments.var.detach().requires_grad_()

    def state(self, dtype: torch.dtype) -> dict[str, Tensor]:
        r"""What the layer must hold to normalize by `mean` and `var` in evaluation.

        With the rounded constants :math:`m_0, v_0` as buffers, the weight
        :math:`\gamma \sqrt{(v_0 + \epsilon) / (\sigma^2 + \epsilon)}` and the bias
        :math:`\beta + (m_0 - \mu)\,\gamma / \sqrt{\sigma^2 + \epsilon}` give
        :math:`(x - \mu)\,\gamma / \sqrt{\sigma^2 + \epsilon} + \beta`, with all its derivatives.
        """
        layer, eps = self.layer, self.layer.eps
        fixed_mean, fixed_var = self.mean.detach().to(dtype), self.var.detach().to(dtype)
        scale = (self.var + eps).rsqrt()
        if layer.weight is not None:
            scale = layer.weight.to(scale.dtype) * scale
        shift = (fixed_mean.to(scale.dtype) - self.mean) * scale
        if layer.bias is not None:
            shift = layer.bias.to(shift.dtype) + shift
        weight = scale * (fixed_var.to(scale.dtype) + eps).sqrt()
        tensors = (weight.to(dtype), shift.to(dtype), fixed_mean, fixed_var)
        return dict(zip(_SWAPPED, tensors, strict=True))


@dataclass(frozen=True)
class Reached:
    """The call at which a forward pass was stopped."""

    name: str
    layer: _BatchNorm
    x: Tensor


class _Stop(BaseException):
    """Ends a forward pass; no ``except Exception`` of the user's catches it."""


class Replay:
    """Runs forward passes under the statistics that are known so far, in the thread that made this.

    A call from another thread would see a layer whose statistics and weights are swapped, so it is
    refused before it changes anything.

    Args:
        layers: The layers whose calls are intercepted, by name.

    Attributes:
        layers: Those layers.
        calls: Those whose statistics are known, in the order of the forward pass.
    """

    def __init__(self, layers: Mapping[str, _BatchNorm]) -> None:
        self.calls: list[Call] = []
        self.layers = layers
        self._names = {layer: name for name, layer in layers.items()}
        self._thread = threading.get_ident()
        self._place = 0
        self._stop_at: int | None = None
        self._reached: Reached | None = None
        self._running = False
        self._swapped: dict[_BatchNorm, tuple[bool, dict[str, Any], dict[str, Any]]] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Intercepts the calls, until the end of the context."""
        with ExitStack() as stack:
            for layer in self.layers.values():
                before = layer.register_forward_pre_hook(self._before, with_kwargs=True)
                stack.callback(before.remove)
                # First of all hooks, so that the others see the layer as it is.
                after = layer.register_forward_hook(self._after, prepend=True)
                stack.callback(after.remove)
            yield

    def run(self, forward: Callable[[], Any], stop_at: int | None = None) -> Any:
        """The result of ``forward()``, or the call number ``stop_at`` if it gets there.

        Raises:
            RuntimeError: The calls are not those of the passes before.
        """
        self._place, self._stop_at, self._running = 0, stop_at, True
        try:
            result = forward()
        except _Stop:
            result, self._reached = self._reached, None
            return result
        finally:
            self._running = False
            for layer in list(self._swapped):
                self._put_back(layer)
        if self._place < len(self.calls):
            missing = self.calls[self._place]
            raise _irregular(missing.name, "was not called this time")
        return result

    def _before(self, layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = self._names[layer]
        in_backward = torch._C._current_graph_task_id() != -1
        if threading.get_ident() != self._thread and not in_backward:
            raise RuntimeError(
                f"accumulate: layer {name!r} is called from another thread while accumulate is at "
                "work on it; wait for its end, or give that thread a copy of the model."
            )
        x = input_of(layer, args, kwargs, name=name, caller="accumulate")
        if not self._running:
            raise RuntimeError(
                f"accumulate: layer {name!r} is called again during the backward pass; switch "
                "activation checkpointing off, accumulate recomputes already."
            )
        if self._place == self._stop_at:
            self._reached = Reached(name, layer, x)
            raise _Stop
        if self._place == len(self.calls):
            raise _irregular(name, "was called once more than before")
        call = self.calls[self._place]
        if call.layer is not layer:
            raise _irregular(name, f"was called where {call.name!r} was before")
        self._place += 1
        self._swap(layer, call.state(torch.promote_types(x.dtype, torch.float32)))

    def _after(self, layer: _BatchNorm, args: Any, output: Any) -> None:
        if layer in self._swapped and threading.get_ident() == self._thread:
            self._put_back(layer)

    def _swap(self, layer: _BatchNorm, state: Mapping[str, Tensor]) -> None:
        kept = (layer.training, dict(layer._parameters), dict(layer._buffers))
        self._swapped[layer] = kept
        layer.training = False
        for name, tensor in state.items():
            home: dict[str, Any] = layer._buffers if "running" in name else layer._parameters
            home[name] = tensor
            if getattr(layer, name) is not tensor:
                raise RuntimeError(
                    f"accumulate: the {name} of layer {self._names[layer]!r} is computed from "
                    "something else (a parametrization); remove that first."
                )

    def _put_back(self, layer: _BatchNorm) -> None:
        training, parameters, buffers = self._swapped.pop(layer)
        layer.training = training
        for home, kept in ((layer._parameters, parameters), (layer._buffers, buffers)):
            home.clear()
            home.update(kept)


def normalizes_by_batch(layer: nn.Module) -> bool:
    """Whether the layer takes its statistics from its input, as things stand."""
    return isinstance(layer, _BatchNorm) and (
        layer.training or (layer.running_mean is None and layer.running_var is None)
    )


def _irregular(name: str, what: str) -> RuntimeError:
    return RuntimeError(
        f"accumulate: layer {name!r} {what}; every micro-batch must call the same layers in the "
        "same order, every time."
    )
