"""``accelerate`` and ``restore``: our layers in the place of torch's in an existing model.

Layers change their class (`replacement`), blocks get a rewritten forward (`fusion`), and the result
is compared with the original (`verification`). Tracing a forward belongs to `tools.flow`.
"""

from batchnorm.tools.acceleration.accelerating import (
    Acceleration,
    Restoration,
    accelerate,
    restore,
)

__all__ = ["Acceleration", "Restoration", "accelerate", "restore"]
