"""What the tools share: the batch norm layers of a model, and changes that are undone.

`accelerate` and `restore` put our layers into a model and take them out again.
"""

from batchnorm.tools.surgery.acceleration import Acceleration, Restoration, accelerate, restore
from batchnorm.tools.surgery.changes import Statistics, changed, no_broadcast
from batchnorm.tools.surgery.inputs import input_of
from batchnorm.tools.surgery.selection import Choice, batch_norms, is_held, keeps_statistics

__all__ = [
    "Acceleration",
    "Choice",
    "Restoration",
    "Statistics",
    "accelerate",
    "batch_norms",
    "changed",
    "input_of",
    "is_held",
    "keeps_statistics",
    "no_broadcast",
    "restore",
]
