"""``accelerate`` and ``restore``: our kernels in an existing model; ``to_torch``: the way back.

Layers get our forward (`replacement`), blocks a rewritten one (`fusion`), and the result is
compared with the original (`verification`). Tracing a forward belongs to `tools.flow`.
"""

from batchnorm.tools.acceleration.accelerating import (
    Acceleration,
    Restoration,
    accelerate,
    restore,
)
from batchnorm.tools.acceleration.conversion import to_torch

__all__ = ["Acceleration", "Restoration", "accelerate", "restore", "to_torch"]
