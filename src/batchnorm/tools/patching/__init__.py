"""The kit that every tool uses to change a model, for a while or for good.

It selects layers, saves and restores buffers, replaces methods, listens to inputs and recognizes
recomputation. What it changes for a while it returns as a `Handle`. What a single tool does with
these changes lives in that tool.
"""

from batchnorm.tools.patching.attributes import temporary_attributes, without_buffer_broadcast
from batchnorm.tools.patching.buffers import (
    SavedBuffers,
    SavedTensors,
    StandInBuffers,
    work_on_copies,
)
from batchnorm.tools.patching.changes import Statistics, changed, no_broadcast
from batchnorm.tools.patching.handle import Handle
from batchnorm.tools.patching.inputs import input_of, listen
from batchnorm.tools.patching.methods import ReplacedMethod, install
from batchnorm.tools.patching.selection import (
    Choice,
    LayerSelection,
    batch_norms,
    has_running_statistics,
    is_frozen,
    is_held,
    keeps_statistics,
)

__all__ = [
    "Choice",
    "Handle",
    "LayerSelection",
    "ReplacedMethod",
    "SavedBuffers",
    "SavedTensors",
    "StandInBuffers",
    "Statistics",
    "batch_norms",
    "changed",
    "has_running_statistics",
    "input_of",
    "install",
    "is_frozen",
    "is_held",
    "keeps_statistics",
    "listen",
    "no_broadcast",
    "temporary_attributes",
    "without_buffer_broadcast",
    "work_on_copies",
]
