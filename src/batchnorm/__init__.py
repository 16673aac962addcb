"""Batch normalization you can read, trust and run fast, for PyTorch.

Names are looked up when they are first used: ``batchnorm --help`` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchnorm.allocation import keep_freed_memory
    from batchnorm.functional import batch_norm
    from batchnorm.kernels.dispatch import explain
    from batchnorm.layers.batch_norm import (
        BatchNorm1d,
        BatchNorm2d,
        BatchNorm3d,
        LazyBatchNorm1d,
        LazyBatchNorm2d,
        LazyBatchNorm3d,
    )
    from batchnorm.moments import Moments, merge
    from batchnorm.tools.surgery import accelerate, restore

__version__ = "0.1.0"

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "Moments",
    "__version__",
    "accelerate",
    "batch_norm",
    "explain",
    "keep_freed_memory",
    "merge",
    "restore",
]

_HOMES = {
    "accelerate": "batchnorm.tools.surgery",
    "explain": "batchnorm.kernels.dispatch",
    "keep_freed_memory": "batchnorm.allocation",
    "restore": "batchnorm.tools.surgery",
    "batch_norm": "batchnorm.functional",
    "Moments": "batchnorm.moments",
    "merge": "batchnorm.moments",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "batchnorm.layers.batch_norm")), name)


def __dir__() -> list[str]:
    return __all__
