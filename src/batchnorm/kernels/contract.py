"""What a kernel module must offer: five stages and two composites, as plain functions.

A backend is a module. It has these functions, or pyright says which one differs. In all of them

- ``x``, ``residual``, ``output`` and their gradients have the shape (N, C, ...), any rank of at
  least two, in any memory layout; ``weight``, ``bias``, ``mean``, ``var``, ``inv_std`` are (C,);
- ``mean``, ``var``, ``inv_std`` and the sums have the dtype `statistics_dtype`;
- ``output`` is given when a ReLU was fused: the gradient passes where ``output > 0``;
- nothing is validated: `batchnorm.functional` did that, once.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from batchnorm.moments import Moments


def statistics_dtype(x: Tensor) -> torch.dtype:
    """In what statistics of ``x`` are kept: float64, or float32 on a device without float64."""
    return torch.float32 if x.device.type == "mps" else torch.float64


class Gradients(NamedTuple):
    """Gradients of one call of `forward`.

    ``residual`` is the gradient behind the ReLU; without a fused ReLU it is ``grad_output`` itself,
    and None stands for that.
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
        inv_std: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None = None,
        *,
        relu: bool = False,
    ) -> Tensor:
        """``(x - mean) * inv_std * weight + bias + residual``, then ReLU; in x's dtype."""
        ...

    def grad_sums(
        self,
        grad_output: Tensor,
        x: Tensor,
        mean: Tensor,
        inv_std: Tensor,
        output: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``sum(grad)`` and ``sum(grad * x_hat)`` a channel: grad_bias and grad_weight."""
        ...

    def grad_input(
        self,
        grad_output: Tensor,
        x: Tensor,
        mean: Tensor,
        inv_std: Tensor,
        weight: Tensor | None,
        sum_grad: Tensor,
        sum_grad_x_hat: Tensor,
        output: Tensor | None = None,
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
    ) -> tuple[Tensor, Moments]:
        """`moments`, then `normalize` by them."""
        ...

    def backward(
        self,
        grad_output: Tensor,
        x: Tensor,
        mean: Tensor,
        inv_std: Tensor,
        weight: Tensor | None,
        output: Tensor | None = None,
    ) -> Gradients:
        """`grad_sums`, then `grad_input` by them."""
        ...
