"""The call that TorchScript compiles, in Python that it can read."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def in_torchscript(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """The call that TorchScript compiles in place of ``batch_norm``; it holds torch's operators."""
    if activation is not None and activation != "relu":
        raise ValueError("activation must be None or 'relu', got '" + activation + "'.")
    if residual is not None and residual.size() != x.size():
        raise RuntimeError("residual must have the input's shape.")
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:
        y = y + residual
    return y if activation is None else y.relu()
