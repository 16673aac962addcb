"""The numbers of all watched layers at one moment, brought to the host together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.moments import Moments, unbiased_var
from batchnorm.tools.patching import (
    COUNTER,
    eps_of,
    has_running_statistics,
    number_in,
    statistics_of,
)
from batchnorm.torch_internals import is_real

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class State:
    """Numbers of one layer at one moment.

    Attributes:
        numbers: By name: ``running_mean``, ``running_var``, ``weight``, ``bias``; ``batch_mean``
            and ``batch_var`` (unbiased) if a hook saw the input. What the layer lacks is absent,
            and so is a tensor without values, as on the meta device.
        counter: ``num_batches_tracked``; None if the layer has none.
        rounding: Relative step between neighboring numbers of the buffers' dtype; 0 of integers.
        momentum: The layer's, if it has one.
        eps: The layer's, or 1e-5.
    """

    numbers: Mapping[str, Numbers]
    counter: int | None
    rounding: float
    momentum: float | None
    eps: float


def states(layers: Mapping[str, nn.Module], seen: Mapping[str, Moments]) -> dict[str, State]:
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
        (name, "counter"): counter
        for name, layer in layers.items()
        if _has_values(counter := getattr(layer, COUNTER, None)) and counter.numel() == 1
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
            number_in(getattr(layer, "momentum", None), None),
            eps_of(layer),
        )
        for name, layer in layers.items()
    }


def determines_batch(layer: nn.Module) -> bool:
    """Tells if running statistics and counter determine the moments of the batches since.

    Those of a layer that only looks like batch norm do not: its momentum may mean anything.
    """
    return (
        isinstance(layer, _BatchNorm)
        and layer.training
        and layer.track_running_stats
        and has_running_statistics(layer)
        and layer.num_batches_tracked is not None
        and (layer.momentum is None or number_in(layer.momentum, 0.0) > 0)
    )


def _tensors(layer: nn.Module, seen: Moments | None) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    if has_running_statistics(layer):
        mean, var = statistics_of(layer).values()
        tensors = {"running_mean": mean, "running_var": var}
    channels = {tensor.numel() for tensor in tensors.values()}
    for kind, other in (("weight", "gamma"), ("bias", "beta")):
        tensor = getattr(layer, kind, getattr(layer, other, None))
        if isinstance(tensor, Tensor) and channels <= {tensor.numel()}:
            tensors[kind] = tensor
    if seen is not None:
        tensors |= {"batch_mean": seen.mean, "batch_var": unbiased_var(seen)}
    return {kind: tensor for kind, tensor in tensors.items() if _has_values(tensor)}


def _has_values(tensor: object) -> TypeGuard[Tensor]:
    return isinstance(tensor, Tensor) and is_real(tensor)


def _rounding(layer: nn.Module) -> float:
    mean = next(iter(statistics_of(layer).values()), None)
    if mean is None or not mean.is_floating_point():
        return 0.0
    return torch.finfo(mean.dtype).eps


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
