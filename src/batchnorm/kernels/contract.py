"""The kernel contract: the functions that a backend must have.

A backend is a module with the functions of `Backend`, or pyright says which one differs. In all of
them

- ``x``, ``residual`` and their gradients have the shape (N, C, ...), any rank of at least two, in
  any memory layout; ``weight``, ``bias``, ``mean``, ``var`` and the means and sums of the gradient
  are (C,);
- ``mean``, ``var`` (biased, without ``eps``), means and sums have the dtype `statistics_dtype`;
  only `Backend.normalize` also takes running statistics as they are;
- ``gate`` is given to the backward functions when a ReLU was fused;
- nothing is validated: `batchnorm.nn.functional` has done that once.

Four functions are *stages*: `Backend.moments`, `Backend.normalize`, `Backend.grad_sums` and
`Backend.grad_input`. Between stages, moments and sums may be merged with
those of other devices or batches. Two are *composites*, `Backend.forward` and `Backend.backward`:
they mean the composition of the stages, in fewer passes over memory. The library itself calls
``grad_sums`` and ``grad_input`` in its tests only; a pool larger than one call needs them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from batchnorm.moments import Moments

LARGEST_FLOAT32 = torch.finfo(torch.float32).max


def statistics_dtype(device: torch.device) -> torch.dtype:
    """Returns the dtype in which statistics of a tensor on ``device`` are accumulated.

    That is float64, or float32 on a device without float64.
    """
    return torch.float32 if device.type == "mps" else torch.float64


class ReluGate(NamedTuple):
    """The elements that a fused ReLU passed.

    Attributes:
        bias: The bias of the forward pass. Without a residual, the backward pass finds the sign of
            the output again from ``x``, by the same arithmetic as the forward pass; that takes the
            bias.
        mask: With a residual, one bit an element (`batchnorm.kernels.geometry`); else None.
    """

    bias: Tensor | None
    mask: Tensor | None


@dataclass(slots=True)
class Running:
    """Running statistics that `Backend.forward` may update itself, which saves a call.

    All are ordinary tensors. A backend that updates them, with the formula and to the bits of
    `batchnorm.nn.running_statistics.update_running`, sets ``moved``; otherwise the caller updates.

    Attributes:
        mean: Moves towards the batch's mean.
        var: Moves towards the batch's unbiased variance.
        counter: Number of batches so far, which the backend increments; None without a counter.
        weight: Weight of the new batch.
        moved: True if the backend has updated all of them.
        overflowed: True if one of them has become larger than float32 can hold.
    """

    mean: Tensor
    var: Tensor
    counter: Tensor | None
    weight: float | Tensor
    moved: bool = False
    overflowed: bool = False


class Gradients(NamedTuple):
    """Gradients of one call of `Backend.forward`.

    Attributes:
        x: Gradient of the input.
        weight: ``sum(grad * x_hat)``, in the dtype of the statistics or already in the weight's.
        bias: ``sum(grad)``, in the same dtype.
        residual: Gradient before the ReLU, if there is a mask; None if it is
            ``grad_output`` itself.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor | None


@runtime_checkable  # The tests check annotations at run time.
class Backend(Protocol):
    """Batch normalization in four stages and two composites."""

    def refusal(self, x: Tensor) -> str | None:
        """Returns why this backend cannot take ``x``; None if it can."""
        ...

    def moments(self, x: Tensor) -> Moments:
        """Computes count, mean and biased variance of each channel."""
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
        """Computes ``(x - mean) / sqrt(var + eps) * weight + bias + residual``, then ReLU.

        Returns:
            The result in x's dtype, and the mask if a residual and a ReLU are fused (else None).
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
        gate: ReluGate | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Computes ``sum_grad`` and ``sum_grad_x_hat`` of each channel.

        They are the gradients of bias and weight, and divided by the count of the pool that the
        moments came from, the means for `grad_input`.
        """
        ...

    def grad_input(
        self,
        grad_output: Tensor,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        eps: float,
        weight: Tensor | None,
        mean_grad: Tensor,
        mean_grad_x_hat: Tensor,
        gate: ReluGate | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Computes the gradient of ``x`` through the moments of the pool.

        ``mean_grad`` and ``mean_grad_x_hat`` are means over the whole pool, of which ``x`` may be a
        part: a rank's share, a ghost batch, the unmasked samples.

        Returns:
            The gradients of ``x`` and, with a mask, of ``residual`` (else None).
        """
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
        """Composes `moments` and `normalize`; it may update ``running``."""
        ...

    def backward(
        self,
        grad_output: Tensor,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        eps: float,
        weight: Tensor | None,
        gate: ReluGate | None = None,
        *,
        fixed: bool = False,
    ) -> Gradients:
        """Composes `grad_sums` and `grad_input` over the pool that is ``x`` alone.

        If ``fixed``, mean and variance are constants, and the gradient of ``x`` is only scaled.
        """
        ...
