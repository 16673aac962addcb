"""The rivals of a case: our layer, torch's, torch's compiled, oneDNN's; and a copy for comparison.

All of them compute with the same tensors and parameters, through the layers that users call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.bench.cases import Case, Pass
from batchnorm.bench.clock import Timed
from batchnorm.bench.expected import Answers, Operands
from batchnorm.nn import layers as ours

OURS, TORCH, COMPILED, ONEDNN, COPY = "batchnorm", "torch", "compile", "onednn", "copy"

_OURS = {2: ours.BatchNorm1d, 3: ours.BatchNorm1d, 4: ours.BatchNorm2d, 5: ours.BatchNorm3d}
_TORCH = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


class CompilerFailed(ValueError):
    """``torch.compile`` could not compile a rival; the message is a sentence for the user."""


class TorchLayer(nn.Module):
    """``torch.nn``'s batch norm, then ``+ residual``, then ReLU, the last two in place.

    Args:
        case: Decides the number of channels, the rank, and whether ReLU follows.
    """

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.norm = _TORCH[len(case.shape)](case.shape[1])
        self.relu = case.variant != "bn"

    def forward(
        self,
        input: Float[Tensor, "n c *spatial"],
        residual: Float[Tensor, "n c *spatial"] | None = None,
    ) -> Float[Tensor, "n c *spatial"]:
        """Runs up to three operations on one buffer."""
        output = self.norm(input)
        if residual is not None:
            output += residual
        return F.relu(output, inplace=True) if self.relu else output


def our_layer(case: Case) -> nn.Module:
    """Makes our layer, which does the work of `TorchLayer` in one pass and is called like it."""
    activation = None if case.variant == "bn" else "relu"
    return _OURS[len(case.shape)](case.shape[1], activation=activation)


class Rival:
    """One implementation on one case.

    Args:
        layer: Called with ``x`` and, if the case has one, the residual.
        operands: The tensors of the case.
        convert: Converts an operand for this rival, outside of the clock; by default all rivals
            read the same memory.
    """

    def __init__(
        self,
        layer: nn.Module,
        operands: Operands,
        convert: Callable[[Tensor], Tensor] = torch.detach,
    ) -> None:
        self.layer = layer
        inputs = [operands.x] if operands.residual is None else [operands.x, operands.residual]
        self.inputs = [convert(tensor).requires_grad_() for tensor in inputs]
        self.grad_output = convert(operands.grad_output)
        self._norm = next(
            m for m in layer.modules() if isinstance(m, nn.modules.batchnorm._NormBase)
        )
        self._set_state(operands)

    def forward(self, _: Any = None) -> Tensor:
        """Computes the output; in training it carries the graph."""
        return self.layer(*self.inputs)

    def backward(self, output: Tensor) -> tuple[Tensor, ...]:
        """Computes the gradients of ``x``, weight, bias and, if there is one, the residual."""
        x, *residual = self.inputs
        leaves = (x, self._norm.weight, self._norm.bias, *residual)
        return torch.autograd.grad(output, leaves, self.grad_output)

    def timed(self, measured: Pass) -> Timed:
        """Returns one pass for the clock, and sets the mode of the layer for it."""
        self.layer.train(measured != "eval")
        match measured:
            case "forward":
                return Timed(self.forward)
            case "backward":
                return Timed(self.backward, prepare=self.forward)
            case "both":
                return Timed(self._both)
            case "eval":
                return Timed(torch.no_grad()(self.forward))

    def answers(self, case: Case) -> Answers:
        """Computes the results for `expected.check`."""
        answers: Answers = {}
        if "eval" in case.passes:
            self.layer.eval()
            with torch.no_grad():
                answers["output in evaluation"] = _dense(self.forward())
        if set(case.passes) == {"eval"}:
            return answers
        self.layer.train()
        output, gradients = self._both()
        names = ("x", "weight", "bias", "residual")
        answers["output"] = _dense(output.detach())
        answers |= {
            f"gradient of {name}": _dense(gradient)
            for name, gradient in zip(names, gradients, strict=False)
        }
        buffers = dict(self._norm.named_buffers())
        answers["running mean"] = buffers["running_mean"].clone()
        answers["running variance"] = buffers["running_var"].clone()
        return answers

    def saved_bytes(self) -> int:
        """Counts the bytes that autograd saves for backward, ``x`` too, each storage once."""
        self.layer.train()
        saved: list[Tensor] = []

        def record(tensor: Tensor) -> Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            output = self.forward()
        counted = {_storage(tensor): tensor.untyped_storage().nbytes() for tensor in saved}
        del output
        return sum(counted.values())

    def _both(self, _: Any = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        output = self.forward()
        return output, self.backward(output)

    @torch.no_grad()
    def _set_state(self, operands: Operands) -> None:
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(self._norm, name).copy_(getattr(operands, name))


def rivals_of(case: Case, operands: Operands, *, compiled: bool = False) -> dict[str, Rival]:
    """Makes the rivals that can compute a case, ours and torch's first.

    Args:
        case: What to compute.
        operands: The tensors of the case.
        compiled: Also the compiled form of torch's layer.
    """
    found = {
        OURS: Rival(our_layer(case), operands),
        TORCH: Rival(TorchLayer(case), operands),
    }
    if compiled:
        torch.compiler.reset()
        found[COMPILED] = Rival(TorchLayer(case), operands)
        found[COMPILED].layer.compile(dynamic=False)
    if _onednn_computes(case):
        found[ONEDNN] = Rival(TorchLayer(case), operands, _to_onednn)
    return found


def copy_of(operands: Operands) -> Timed:
    """Returns ``y.copy_(x)`` into new memory, the least work for a pass that caches cannot help."""
    x = operands.x
    return Timed(lambda target: target.copy_(x), prepare=lambda: torch.empty_like(x))


def _onednn_computes(case: Case) -> bool:
    """Tells if torch's oneDNN tensors support a case: float32 images in NCHW without ReLU."""
    return (
        torch.backends.mkldnn.is_available()
        and len(case.shape) == 4
        and (case.layout, case.precision, case.variant) == ("nchw", "float32", "bn")
    )


def _to_onednn(tensor: Tensor) -> Tensor:
    return tensor.to_mkldnn()


def _dense(tensor: Tensor) -> Tensor:
    return tensor.to_dense() if tensor.is_mkldnn else tensor


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
