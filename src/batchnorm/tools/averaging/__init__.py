"""Averages of models: running statistics are moments, and a counter is no number to average.

Averages over time inside one layer, which torch calls running statistics, are updated by the layer.
"""

from batchnorm.tools.averaging.checkpoints import merge_state_dicts
from batchnorm.tools.averaging.moving import ema_update
from batchnorm.tools.averaging.precision import keep_statistics_in_float32

__all__ = ["ema_update", "keep_statistics_in_float32", "merge_state_dicts"]
