"""Makes the tensors of a case and the results that are expected of every rival, in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from batchnorm.bench.cases import Case, Precision

TOLERANCE: dict[Precision, float] = {"float32": 1e-4, "bfloat16": 2e-2}
"""The largest error allowed, relative to the largest expected value. In bfloat16 torch rounds after
the norm and again after the addition."""

MOMENTUM, EPS = 0.1, 1e-5

Answers = dict[str, Tensor]
"""Outputs, gradients and running statistics by their names in messages."""


class Disagreement(Exception):
    """Rivals compute different results; ``sentences`` says which, one sentence each."""

    def __init__(self, sentences: list[str]) -> None:
        super().__init__("\n".join(sentences))
        self.sentences = sentences


@dataclass(frozen=True)
class Operands:
    """The tensors on which every rival of a case computes."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    residual: Tensor | None
    grad_output: Tensor


def problem(case: Case, seed: int = 0) -> tuple[Operands, Answers]:
    """Makes random operands and the answers that are expected.

    ``grad_output`` is zero where the input of ReLU is so close to zero that rounding may decide its
    sign, so that gradients can be compared everywhere.

    Args:
        case: Shape, layout, dtype, variant; answers are computed for its passes.
        seed: Of the random numbers.
    """
    random = torch.Generator().manual_seed(seed)
    channels = case.shape[1]
    x = _like(case, torch.randn(case.shape, generator=random) * 2 + 1)
    weight = torch.rand(channels, generator=random) + 0.5
    bias = torch.randn(channels, generator=random) / 2
    running_mean = torch.randn(channels, generator=random)
    running_var = torch.rand(channels, generator=random) + 0.5
    residual = None
    if case.variant == "add-relu":
        residual = _like(case, torch.randn(case.shape, generator=random))
    grad_output = _like(case, torch.randn(case.shape, generator=random))
    operands = Operands(x, weight, bias, running_mean, running_var, residual, grad_output)
    return operands, _answers(case, operands)


def errors(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Returns the largest error of each answer, relative to the largest expected value."""
    return {
        name: _largest(got[name].double() - answer) / max(_largest(answer), 1e-30)
        for name, answer in expected.items()
    }


def check(
    case: Case, got: Mapping[str, Mapping[str, Tensor]], expected: Mapping[str, Tensor]
) -> None:
    """Compares the answers of all rivals, by name, with the expected ones.

    Raises:
        Disagreement: An error is above `TOLERANCE`, or not a number.
    """
    allowed = TOLERANCE[case.precision]
    sentences = [
        f"{case}: {rival}'s {name} is off by {error:.1e} of the largest value, {allowed:.0e} is "
        "allowed."
        for rival, answers in got.items()
        for name, error in errors(answers, expected).items()
        if not error <= allowed
    ]
    if sentences:
        raise Disagreement(sentences)


def _like(case: Case, values: Tensor) -> Tensor:
    values = values.to(getattr(torch, case.precision))
    if case.layout == "nchw":
        return values
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return values.contiguous(memory_format=formats[values.dim()])


def _answers(case: Case, operands: Operands) -> Answers:
    x = operands.x.double().contiguous().requires_grad_()
    weight, bias = (v.double().requires_grad_() for v in (operands.weight, operands.bias))
    residual = operands.residual
    if residual is not None:
        residual = residual.double().contiguous().requires_grad_()
    mean, var = operands.running_mean.double(), operands.running_var.double()

    def output(training: bool) -> tuple[Tensor, Tensor]:
        y = F.batch_norm(x, mean, var, weight, bias, training, MOMENTUM, EPS)
        before = y if residual is None else y + residual
        return before, before if case.variant == "bn" else before.relu()

    answers: Answers = {}
    if "eval" in case.passes:
        with torch.no_grad():
            answers["output in evaluation"] = output(False)[1]
    if set(case.passes) == {"eval"}:
        return answers
    before, y = output(True)
    if case.variant != "bn":
        unsure = before.detach().abs() < TOLERANCE[case.precision] * _largest(before)
        operands.grad_output.masked_fill_(unsure, 0)
    leaves = {"x": x, "weight": weight, "bias": bias}
    if residual is not None:
        leaves["residual"] = residual
    gradients = torch.autograd.grad(y, tuple(leaves.values()), operands.grad_output.double())
    answers["output"] = y.detach()
    answers |= {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
    answers["running mean"], answers["running variance"] = mean, var
    return answers


def _largest(values: Tensor) -> float:
    low, high = values.detach().aminmax()
    largest = max(abs(low.item()), abs(high.item()))
    return math.nan if math.isnan(low.item()) else largest
