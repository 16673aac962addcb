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
    from batchnorm.tools.accumulation import accumulate
    from batchnorm.tools.averaging import (
        ema_update,
        keep_statistics_in_float32,
        let_statistics_follow,
        merge_statistics,
    )
    from batchnorm.tools.checkpointing import checkpoint, updates_once
    from batchnorm.tools.freezing import freeze, is_frozen, unfreeze
    from batchnorm.tools.guarding import guard, repair
    from batchnorm.tools.monitoring import watch
    from batchnorm.tools.recalibration import recalibrate
    from batchnorm.tools.surgery import accelerate, restore
    from batchnorm.tools.updates import no_stats_update, transaction

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
    "accumulate",
    "batch_norm",
    "checkpoint",
    "ema_update",
    "explain",
    "freeze",
    "guard",
    "is_frozen",
    "keep_freed_memory",
    "keep_statistics_in_float32",
    "let_statistics_follow",
    "merge",
    "merge_statistics",
    "no_stats_update",
    "recalibrate",
    "repair",
    "restore",
    "transaction",
    "unfreeze",
    "updates_once",
    "watch",
]

_HOMES = {
    "keep_freed_memory": "batchnorm.allocation",
    "batch_norm": "batchnorm.functional",
    "explain": "batchnorm.kernels.dispatch",
    "Moments": "batchnorm.moments",
    "merge": "batchnorm.moments",
    "accumulate": "batchnorm.tools.accumulation",
    "ema_update": "batchnorm.tools.averaging",
    "keep_statistics_in_float32": "batchnorm.tools.averaging",
    "let_statistics_follow": "batchnorm.tools.averaging",
    "merge_statistics": "batchnorm.tools.averaging",
    "checkpoint": "batchnorm.tools.checkpointing",
    "updates_once": "batchnorm.tools.checkpointing",
    "freeze": "batchnorm.tools.freezing",
    "is_frozen": "batchnorm.tools.freezing",
    "unfreeze": "batchnorm.tools.freezing",
    "guard": "batchnorm.tools.guarding",
    "repair": "batchnorm.tools.guarding",
    "watch": "batchnorm.tools.monitoring",
    "recalibrate": "batchnorm.tools.recalibration",
    "accelerate": "batchnorm.tools.surgery",
    "restore": "batchnorm.tools.surgery",
    "no_stats_update": "batchnorm.tools.updates",
    "transaction": "batchnorm.tools.updates",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "batchnorm.layers.batch_norm")), name)


def __dir__() -> list[str]:
    return __all__
