"""What a kernel module must offer: five stages and two composites, as plain functions.

A backend is a module. It has these functions, or pyright says which one differs. In all of them

- ``x``, ``residual`` and their gradients have the shape (N, C, ...), any rank of at least two, in
  any memory layout; ``weight``, ``bias``, ``mean``, ``var`` are (C,);
- ``mean``, ``var`` (biased, without ``eps``) and the sums have the dtype `statistics_dtype`; only
  `normalize` also takes running statistics as they are;
- ``gate`` is given to the backward stages when a ReLU was fused;
- nothing is validated: `batchnorm.nn.functional` did that, once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from batchnorm.moments import Moments


def statistics_dtype(x: Tensor) -> torch.dtype:
    """In what statistics of ``x`` are kept: float64, or float32 on a device without float64."""
    return torch.float32 if x.device.type == "mps" else torch.float64


class Gate(NamedTuple):
    """Where a fused ReLU let its input through.

    Without a residual the sign of the output is found again from ``x``, by the same arithmetic as
    in the forward pass; that takes ``bias``. With one it is in ``mask``, one bit an element
    (`batchnorm.kernels.geometry`).
    """

    bias: Tensor | None
    mask: Tensor | None


@dataclass(slots=True)
class Running:
    """Running statistics that `forward` may move itself, while the batch's are at hand.

    All are ordinary tensors. A backend that updates them, with the formula and to the bits of
    `batchnorm.nn.running_statistics.update_running`, sets ``moved``; otherwise the caller updates.

    Attributes:
        mean: Moves towards the batch's mean.
        var: Moves towards the batch's unbiased variance.
        counter: Batches so far, one more is added; None if nobody counts them.
        weight: Of the new batch.
        moved: Whether all that was done.
        overflown: Whether a variance was more than float32 can hold.
    """

    mean: Tensor
    var: Tensor
    counter: Tensor | None
    weight: float | Tensor
    moved: bool = False
    overflown: bool = False


class Gradients(NamedTuple):
    """Gradients of one call of `forward`.

    Those of weight and bias have the dtype of the statistics, or that of the weight already.
    ``residual`` is the gradient behind the ReLU where a mask told it; without a fused ReLU it is
    ``grad_output`` itself, and None stands for that.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor | None


@runtime_checkable
class Stages(Protocol):
    """Batch normalization cut where the mathematics has its joints."""

    def refusal(self, x: Tensor) -> str | None:
        """Why this module cannot take ``x``; None if it can."""
        ...

    def moments(self, x: Tensor) -> Moments:
        """Count, mean and biased variance of each channel."""
        ...

    def normalize(
        self,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        eps: float,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None = None,
        *,
        relu: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """``(x - mean) / sqrt(var + eps) * weight + bias + residual``, then ReLU; in x's dtype.

        The mask comes with it where a residual and a ReLU are fused.
        """
        ...

    def grad_sums(
        self,
        grad_output: Tensor,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        eps: float,
        weight: Tensor | None,
        gate: Gate | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``sum(grad)`` and ``sum(grad * x_hat)`` a channel: grad_bias and grad_weight."""
        ...

    def grad_input(
        self,
        grad_output: Tensor,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        eps: float,
        weight: Tensor | None,
        sum_grad: Tensor,
        sum_grad_x_hat: Tensor,
        gate: Gate | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of ``x`` and ``residual``, through the batch's own mean and variance."""
        ...

    def forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        residual: Tensor | None = None,
        *,
        relu: bool = False,
        running: Running | None = None,
    ) -> tuple[Tensor, Moments, Tensor | None]:
        """`moments`, then `normalize` by them; ``running`` may be moved."""
        ...

    def backward(
        self,
        grad_output: Tensor,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        eps: float,
        weight: Tensor | None,
        gate: Gate | None = None,
        *,
        fixed: bool = False,
    ) -> Gradients:
        """`grad_sums`, then `grad_input` by them; or, if mean and variance are fixed, the scale."""
        ...
