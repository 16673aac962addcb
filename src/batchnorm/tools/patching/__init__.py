"""The kit that every tool uses to change a model, for a while or for good.

It selects layers, saves and restores buffers, replaces methods, listens to inputs and recognizes
recomputation. What it changes for a while it returns as a `Handle`. What a single tool does with
these changes lives in that tool.
"""

from batchnorm.tools.patching.attributes import (
    FALSE_UNTIL_COPIED,
    change_class,
    temporary_attributes,
    without_buffer_broadcast,
)
from batchnorm.tools.patching.buffers import (
    SavedBuffers,
    SavedTensors,
    StandInBuffers,
    work_on_copies,
)
from batchnorm.tools.patching.handle import Handle
from batchnorm.tools.patching.inputs import listen
from batchnorm.tools.patching.methods import (
    ReplacedMethod,
    install,
    is_replaced_by_others,
    replacements,
)
from batchnorm.tools.patching.recomputation import (
    RecomputationHook,
    is_recomputing,
    is_repeated,
    updates_suppressed,
)
from batchnorm.tools.patching.selection import (
    ACCELERATED_MARK,
    FROZEN_MARK,
    LayerSelection,
    batch_norms,
    has_accelerated_mark,
    has_frozen_mark,
    has_running_statistics,
    is_frozen,
)

__all__ = [
    "ACCELERATED_MARK",
    "FALSE_UNTIL_COPIED",
    "FROZEN_MARK",
    "Handle",
    "LayerSelection",
    "RecomputationHook",
    "ReplacedMethod",
    "SavedBuffers",
    "SavedTensors",
    "StandInBuffers",
    "batch_norms",
    "change_class",
    "has_accelerated_mark",
    "has_frozen_mark",
    "has_running_statistics",
    "install",
    "is_frozen",
    "is_recomputing",
    "is_repeated",
    "is_replaced_by_others",
    "listen",
    "replacements",
    "temporary_attributes",
    "updates_suppressed",
    "without_buffer_broadcast",
    "work_on_copies",
]
