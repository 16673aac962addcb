"""The kit that every tool uses to change a model, for a while or for good.

It selects layers, saves and restores buffers, replaces methods, listens to inputs, recognizes
recomputation, and lets layers that are rebuilt inherit. What it changes for a while it returns as a
`Handle`. What a single tool does with these changes lives in that tool.
"""

from batchnorm.tools.patching.attributes import (
    FALSE_UNTIL_COPIED,
    change_class,
    is_temporary,
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
from batchnorm.tools.patching.inheritance import (
    InheritedMethod,
    add_follower,
    install_inherited,
    remove_follower,
)
from batchnorm.tools.patching.inputs import are_real, listen
from batchnorm.tools.patching.methods import (
    ReplacedMethod,
    install,
    is_replaced_by_others,
    replacements,
)
from batchnorm.tools.patching.names import by_unwrapped_name, inside_wrappers, without_wrappers
from batchnorm.tools.patching.probing import Behavior, probe
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
    is_frozen,
    pass_over,
    unlike,
    warn,
)
from batchnorm.tools.patching.statistics import (
    COUNTER,
    STATISTICS,
    count_in,
    eps_of,
    has_running_statistics,
    is_batch_norm,
    is_counter,
    moves_statistics,
    names_of_statistics,
    number_in,
    state_of,
    statistics_of,
)

__all__ = [
    "ACCELERATED_MARK",
    "COUNTER",
    "FALSE_UNTIL_COPIED",
    "FROZEN_MARK",
    "STATISTICS",
    "Behavior",
    "Handle",
    "InheritedMethod",
    "LayerSelection",
    "RecomputationHook",
    "ReplacedMethod",
    "SavedBuffers",
    "SavedTensors",
    "StandInBuffers",
    "add_follower",
    "are_real",
    "batch_norms",
    "by_unwrapped_name",
    "change_class",
    "count_in",
    "eps_of",
    "has_accelerated_mark",
    "has_frozen_mark",
    "has_running_statistics",
    "inside_wrappers",
    "install",
    "install_inherited",
    "is_batch_norm",
    "is_counter",
    "is_frozen",
    "is_recomputing",
    "is_repeated",
    "is_replaced_by_others",
    "is_temporary",
    "listen",
    "moves_statistics",
    "names_of_statistics",
    "number_in",
    "pass_over",
    "probe",
    "remove_follower",
    "replacements",
    "state_of",
    "statistics_of",
    "temporary_attributes",
    "unlike",
    "updates_suppressed",
    "warn",
    "without_buffer_broadcast",
    "without_wrappers",
    "work_on_copies",
]
