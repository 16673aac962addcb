"""Compares the results of the lesson with those of the function that it explains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from batchnorm import scratch
from batchnorm.learn import notation
from batchnorm.learn.step import Step

ROUNDING = 64
"""Units in the last place of the largest number by which two ways of taking a mean may differ.

Up to ten were measured: a million values, float32 and float64, means of 0 to 1e8 times the spread.
"""


def compare_with_scratch(
    steps: Sequence[Step], given: Mapping[str, Tensor], eps: float, momentum: float
) -> None:
    """Raises an error if the lesson and `batchnorm.scratch.batch_norm` have different results.

    The lesson takes the mean axis by axis, the function over all axes at once. That rounds
    differently, and the division by √(σ² + ε) magnifies the difference; so does the tolerance.

    Args:
        steps: The steps of the lesson.
        given: Data, parameters and old moving statistics, by their names in the lesson.
        eps: Added to the variance.
        momentum: Weight of the old moving value.

    Raises:
        RuntimeError: A result differs by more than rounding.
    """
    walked = {step.name: step.value for step in steps}
    gamma, beta = given["gamma"], given["beta"]
    old, new = ((found["moving_mean"], found["moving_var"]) for found in (given, walked))
    passes = {
        "Y": (given["X"], old, True),
        "Y_moving": (given["P"], new, False),
        "Y_own": (given["P"], new, True),
        "Y_alone": (given["P"][:1], new, True),
    }
    for name, (data, moving, training) in passes.items():
        if name not in walked or (training and data.numel() == data.shape[1]):
            continue  # With one value per channel the function refuses to train.
        Y, mean, var = scratch.batch_norm(data, gamma, beta, *moving, eps, momentum, training)
        shift = ROUNDING * torch.finfo(data.dtype).eps * data.abs().max()
        axes = notation.reduce_axes(data.dim())
        divisor = data.var(axes, correction=0, keepdim=True) if training else moving[1]
        _compare(name, walked[name], Y, shift * gamma.abs() / torch.sqrt(divisor + eps))
        if name == "Y":
            _compare("moving_mean", new[0], mean, shift)
            _compare("moving_var", new[1], var, shift**2)


def _compare(name: str, walked: Tensor, expected: Tensor, tolerance: Tensor) -> None:
    tolerance = tolerance + ROUNDING * torch.finfo(expected.dtype).eps * expected.abs()
    difference = (walked - expected).abs()
    agree = (walked == expected) | (difference <= tolerance) | (walked.isnan() & expected.isnan())
    if not agree.all():
        raise RuntimeError(
            f"walkthrough: {name} must be that of batchnorm.scratch.batch_norm, got numbers that "
            f"differ by up to {difference.max().item():g}; a line of the lesson's code is wrong."
        )
