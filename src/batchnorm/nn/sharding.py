"""Tensors that are spread over several processes: ``torch.distributed.tensor.DTensor``.

They take the route of the formula: torch knows for each of its own operations how the parts of a
``DTensor`` communicate, so moments are those of the whole batch, whatever its placement.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor


def is_sharded(tensor: Tensor | None) -> bool:
    """Tells if this is a ``DTensor``, without importing what makes them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def settled(vector: Any) -> Any:
    """The same ``DTensor``, whose gradient will be spread as it is itself, and not in summands."""
    return vector.redistribute(placements=vector.placements) if is_sharded(vector) else vector


def gathered(value: Any) -> Tensor:
    """The whole of a ``DTensor`` on each process; other tensors come back as they are."""
    return value.full_tensor() if is_sharded(value) else value


def evenly_sharded(x: Any) -> Any:
    """Replicates ``x`` over the processes that hold unequal shares of a dimension.

    torch cannot flatten such a dimension, which the sums of a channel have to. Other tensors come
    back as they are.
    """
    if not is_sharded(x):
        return x
    module: Any = sys.modules["torch.distributed.tensor"]
    shares = [1] * x.dim()
    for size, placement in zip(x.device_mesh.shape, x.placements, strict=True):
        if placement.is_shard():
            shares[placement.dim] *= size
    even = [
        module.Replicate()
        if placement.is_shard() and x.shape[placement.dim] % shares[placement.dim]
        else placement
        for placement in x.placements
    ]
    return x if even == list(x.placements) else x.redistribute(placements=even)
