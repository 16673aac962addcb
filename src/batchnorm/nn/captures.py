"""Calls as ``torch.fx`` and TorchScript record them.

``torch.fx`` gets one node for a layer or a call of ``batch_norm``, as for torch's own. TorchScript
compiles Python that it can read, in place of ours: torch's batch norm, then the residual and the
activation. Both are torch's older ways to capture a model; ``torch.export`` needs none of this.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F


def node_of(layer: nn.Module, *inputs: Any) -> Any:
    """The node of a layer that ``torch.fx`` traces; None if it does not.

    Args:
        layer: A module that ``torch.fx`` shall record as one node, like torch's own layers.
        *inputs: Arguments of its call, and parameters, which are proxies too while a model is
            traced. Those after the first two are only looked at.

    Raises:
        TypeError: The layer is the whole model that is traced.
    """
    tracer: Any = next((value.tracer for value in inputs if isinstance(value, Proxy)), None)
    if tracer is None:
        return None
    path = tracer.path_of_module(layer)
    if not path:
        raise TypeError(
            f"torch.fx cannot trace a {type(layer).__name__} that is the whole model, because it "
            "is one node of a graph; trace a model that holds it, such as "
            "torch.nn.Sequential(layer)."
        )
    x, residual = inputs[:2]
    return tracer.create_proxy("call_module", path, (x,) if residual is None else (x, residual), {})


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
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:
        y = y + residual
    return y if activation is None else y.relu()
