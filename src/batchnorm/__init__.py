"""Batch normalization you can read, trust and run fast, for PyTorch.

Names are looked up when they are first used: ``batchnorm --help`` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchnorm.functional import batch_norm
    from batchnorm.layers.batch_norm import (
        BatchNorm1d,
        BatchNorm2d,
        BatchNorm3d,
        LazyBatchNorm1d,
        LazyBatchNorm2d,
        LazyBatchNorm3d,
    )
    from batchnorm.moments import Moments, merge

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
    "batch_norm",
    "merge",
]

_HOMES = {
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
