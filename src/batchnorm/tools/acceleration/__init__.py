"""``accelerate`` and ``restore``: our layers in a user's model, and torch's back again."""

from batchnorm.tools.acceleration.accelerating import (
    Acceleration,
    Restoration,
    accelerate,
    restore,
)

__all__ = ["Acceleration", "Restoration", "accelerate", "restore"]
