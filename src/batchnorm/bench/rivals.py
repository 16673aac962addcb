"""Who computes: ours, torch, torch compiled, oneDNN through torch; and a copy to hold them against.

All get the same tensors and parameters, and answer through the layers that users call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.bench.cases import Case, Pass
from batchnorm.bench.clock import Timed
from batchnorm.bench.truth import Answers, Operands
from batchnorm.nets import norms

OURS, TORCH, COMPILED, ONEDNN, COPY = "batchnorm", "torch", "compile", "onednn", "copy"


class CompilerFailed(ValueError):
    """``torch.compile`` could not compile a rival; the message is a sentence for the user."""


class Rival:
    """One implementation on one case.

    Args:
        layer: Called with ``x`` and, if there is one, the residual.
        operands: What it computes on.
        arrange: Makes of an operand what this rival computes on, outside of the clock; without it
            all rivals read the same memory.
    """

    def __init__(
        self,
        layer: nn.Module,
        operands: Operands,
        arrange: Callable[[Tensor], Tensor] = torch.detach,
    ) -> None:
        self.layer = layer
        inputs = [operands.x] if operands.residual is None else [operands.x, operands.residual]
        self.inputs = [arrange(tensor).requires_grad_() for tensor in inputs]
        self.grad_output = arrange(operands.grad_output)
        self._norm = next(
            m for m in layer.modules() if isinstance(m, nn.modules.batchnorm._NormBase)
        )
        self._set_state(operands)

    def forward(self, _: Any = None) -> Tensor:
        """Output, with the graph behind it in training."""
        return self.layer(*self.inputs)

    def backward(self, output: Tensor) -> tuple[Tensor, ...]:
        """Gradients of ``x``, weight, bias and, if there is one, the residual."""
        x, *residual = self.inputs
        leaves = (x, self._norm.weight, self._norm.bias, *residual)
        return torch.autograd.grad(output, leaves, self.grad_output)

    def timed(self, measured: Pass) -> Timed:
        """One pass for the clock; the layer is then in the mode of that pass."""
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
        """What it makes of the operands, for `truth.check`."""
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
        """What autograd saves for backward, ``x`` and all; each storage once."""
        self.layer.train()
        saved: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
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
    """Everyone who can compute a case, ours and torch first.

    Args:
        case: What to compute.
        operands: On what.
        compiled: Also the compiled form of torch's layer.
    """
    features, dims, relu = case.shape[1], len(case.shape), case.variant != "plain"
    found = {
        OURS: Rival(norms.fused(features, dims, relu=relu), operands),
        TORCH: Rival(norms.NormThen(features, dims, relu=relu), operands),
    }
    if compiled:
        torch.compiler.reset()
        found[COMPILED] = Rival(norms.NormThen(features, dims, relu=relu), operands)
        found[COMPILED].layer.compile(dynamic=False)
    if _onednn_computes(case):
        found[ONEDNN] = Rival(norms.NormThen(features, dims), operands, _to_onednn)
    return found


def copy_of(operands: Operands) -> Timed:
    """``y.copy_(x)`` into memory as fresh as a layer's result: the least that any pass can do."""
    x = operands.x
    return Timed(lambda target: target.copy_(x), prepare=lambda: torch.empty_like(x))


def _onednn_computes(case: Case) -> bool:
    """What torch's oneDNN tensors support: plain training and inference in NCHW float32."""
    return (
        torch.backends.mkldnn.is_available()
        and len(case.shape) == 4
        and (case.layout, case.precision, case.variant) == ("nchw", "float32", "plain")
    )


def _to_onednn(tensor: Tensor) -> Tensor:
    return tensor.to_mkldnn()


def _dense(tensor: Tensor) -> Tensor:
    return tensor.to_dense() if tensor.is_mkldnn else tensor


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
