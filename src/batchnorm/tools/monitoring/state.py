"""The numbers of all watched layers at one moment, brought to the host together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.moments import Moments, unbiased_var
from batchnorm.tools.patching import has_running_statistics

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class State:
    """Numbers of one layer at one moment.

    Attributes:
        numbers: By name: ``running_mean``, ``running_var``, ``weight``, ``bias``; ``batch_mean``
            and ``batch_var`` (unbiased) if a hook saw the input. What the layer lacks is absent.
        counter: ``num_batches_tracked``; None if the layer has none.
        rounding: Relative step between neighboring numbers of the buffers' dtype.
        momentum: The layer's.
        eps: The layer's.
    """

    numbers: Mapping[str, Numbers]
    counter: int | None
    rounding: float
    momentum: float | None
    eps: float


def states(layers: Mapping[str, _BatchNorm], seen: Mapping[str, Moments]) -> dict[str, State]:
    """Takes the states of all layers, in one transfer for each device and dtype.

    Args:
        layers: The layers by name.
        seen: Moments of the inputs that a hook saw, by layer.
    """
    tensors: dict[tuple[str, str], Tensor] = {}
    for name, layer in layers.items():
        for kind, tensor in _tensors(layer, seen.get(name)).items():
            tensors[name, kind] = tensor
    counters = {
        (name, "counter"): layer.num_batches_tracked
        for name, layer in layers.items()
        if layer.num_batches_tracked is not None
    }
    numbers: dict[str, dict[str, Numbers]] = {name: {} for name in layers}
    for (owner, kind), value in _on_host(tensors).items():
        numbers[owner][kind] = value
    counted = _on_host(counters)
    return {
        name: State(
            numbers[name],
            int(counted[name, "counter"][0]) if (name, "counter") in counted else None,
            _rounding(layer),
            layer.momentum,
            layer.eps,
        )
        for name, layer in layers.items()
    }


def determines_batch(layer: _BatchNorm) -> bool:
    """Tells if running statistics and counter determine the moments of the batches since."""
    return (
        layer.training
        and layer.track_running_stats
        and has_running_statistics(layer)
        and layer.num_batches_tracked is not None
        and (layer.momentum is None or layer.momentum > 0)
    )


def _tensors(layer: _BatchNorm, seen: Moments | None) -> dict[str, Tensor]:
    tensors = {
        "running_mean": layer.running_mean,
        "running_var": layer.running_var,
        "weight": layer.weight,
        "bias": layer.bias,
    }
    if seen is not None:
        tensors |= {"batch_mean": seen.mean, "batch_var": unbiased_var(seen)}
    return {kind: tensor for kind, tensor in tensors.items() if tensor is not None}


def _rounding(layer: _BatchNorm) -> float:
    return 0.0 if layer.running_var is None else torch.finfo(layer.running_var.dtype).eps


def _on_host(tensors: Mapping[tuple[str, str], Tensor]) -> dict[tuple[str, str], Numbers]:
    """Brings the tensors of each device and dtype to the host as one, to wait only once."""
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[str, str]]] = {}
    for key, tensor in tensors.items():
        groups.setdefault((tensor.device, tensor.dtype), []).append(key)
    found: dict[tuple[str, str], Numbers] = {}
    for keys in groups.values():
        flat = [tensors[key].detach().reshape(-1) for key in keys]
        host = torch.cat(flat).to("cpu", torch.float64).numpy()
        ends = np.cumsum([len(part) for part in flat])
        found |= dict(zip(keys, np.split(host, ends[:-1]), strict=True))
    return found
