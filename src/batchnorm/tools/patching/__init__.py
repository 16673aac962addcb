"""Changing a model, for a while or for good: what all tools share."""

from batchnorm.tools.patching.changes import Statistics, changed, no_broadcast
from batchnorm.tools.patching.inputs import input_of
from batchnorm.tools.patching.selection import Choice, batch_norms, is_held, keeps_statistics

__all__ = [
    "Choice",
    "Statistics",
    "batch_norms",
    "changed",
    "input_of",
    "is_held",
    "keeps_statistics",
    "no_broadcast",
]
